"""The package's own data (weights, published tables, prompts), believed only with the checksums that it carries.

`shipped.sha256` is what `sha256sum` writes; `python -m upclose.shipped` writes it anew.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
LIST = PACKAGE / "shipped.sha256"
KINDS = (".json", ".csv", ".txt", ".safetensors")


@cache
def checked(file: Path) -> Path:
    """A file of the package, compared with its checksum when a process asks first; others are returned as they are.

    Raises:
        ValueError: it is not what was shipped
        FileNotFoundError: it is not there
    """
    if not file.is_relative_to(PACKAGE):
        return file
    rows = (line.split("  ", 1) for line in LIST.read_text().splitlines())
    listed = {name: digest for digest, name in rows}
    if sha256(file) != listed.get(file.relative_to(PACKAGE).as_posix()):
        raise ValueError(
            f"{file} is not what was shipped (see {LIST.name}): restore it, or, if it was changed on purpose, write "
            "the list anew with `python -m upclose.shipped`"
        )
    return file


def write() -> None:
    """Write the list anew."""
    found = [file for part in ("weights", "published", "birdlets/prompts") for file in (PACKAGE / part).iterdir()]
    rows = {file.relative_to(PACKAGE).as_posix(): sha256(file) for file in found if file.suffix in KINDS}
    LIST.write_text("".join(f"{rows[name]}  {name}\n" for name in sorted(rows)))
    checked.cache_clear()


def sha256(file: Path) -> str:
    """The checksum of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


if __name__ == "__main__":
    write()
