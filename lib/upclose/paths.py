"""Where things are, never relative to the working directory; and how a file is written whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent.parent
NOTEBOOKS = ROOT / "notebooks"
PARAMS = ROOT / "params"
WEIGHTS = PACKAGE / "weights"
PUBLISHED = PACKAGE / "published"
MOST_SAID = 900  # characters of an error


def cache() -> Path:
    """`UPCLOSE_CACHE`, else `upclose` in the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "upclose"
    return Path(os.environ.get("UPCLOSE_CACHE") or default)


def bank() -> str:
    """Where feature banks are kept: `UPCLOSE_BANK`, a folder or an fsspec URL (s3://...), else `bank` in the cache."""
    return os.environ.get("UPCLOSE_BANK") or str(cache() / "bank")


def data() -> Path:
    """Where data sets are looked for: `UPCLOSE_DATA`, else `data` in the cache."""
    return Path(os.environ.get("UPCLOSE_DATA") or cache() / "data")


def results() -> Path:
    """Where runs are written: `UPCLOSE_RESULTS`, else `results` in the repository."""
    return Path(os.environ.get("UPCLOSE_RESULTS") or ROOT / "results")


def run_folder() -> Path | None:
    """Where the run writes that this notebook is part of (`UPCLOSE_RUN`), None when somebody runs it by hand."""
    folder = os.environ.get("UPCLOSE_RUN")
    return Path(folder) if folder else None


def run_name() -> str:
    """The name of that run, empty when there is none."""
    folder = run_folder()
    return name_of(folder) if folder else ""


def note(name: str, rows: list) -> None:
    """Add rows to a list of the run's `run.json`; outside a run nothing is kept."""
    if (folder := run_folder()) is None or not rows:
        return
    file = folder / "facts.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    before = known.get(name, [])
    write(file, json.dumps(known | {name: before + [row for row in rows if row not in before]}).encode())


def name_of(folder: Path) -> str:
    """The name of a run from its folder, which is `.partial-<name>.<something>` until the run is complete."""
    name = folder.name
    return name.removeprefix(".partial-").rsplit(".", 1)[0] if name.startswith(".partial-") else name


_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?)")  # what commands a terminal


def printable(text: str) -> str:
    """A text without what commands a terminal and other characters that are not for reading."""
    return "".join(c for c in _ESCAPE.sub("", text) if c.isprintable())


def sentence(error: object) -> str:
    """What went wrong in one line that a terminal can show, of at most some hundred characters."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(error))
    return text if len(text) <= MOST_SAID else f"{text[: MOST_SAID * 2 // 3]} ... {text[-MOST_SAID // 3 :]}"


def reason(error: BaseException) -> str:
    """The first line of an error's message, for use within a sentence; the second too, if the first announces it."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join([first, *(line.strip() for line in more[: first.endswith(":")])])[:160].rstrip(".")


def cell(value: object) -> object:
    """A value as a table's cell: printable, and no formula where a spreadsheet opens it."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") and not _NUMBERS.fullmatch(text) else text


_NUMBERS = re.compile(r"[-+][-+\d.,eE \[\]]*")


def checksums(folder: Path) -> dict[str, str]:
    """The sha256 of every file below a folder; each is on the disk when this returns."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as open_file:
            found[file.relative_to(folder).as_posix()] = hashlib.file_digest(open_file, "sha256").hexdigest()
            os.fsync(open_file.fileno())
    return found


def seal(facts: dict) -> bytes:
    """Facts as JSON that carries its own checksum."""
    body = {name: value for name, value in facts.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, sort_keys=True, indent=1).encode()


def unseal(content: bytes) -> dict | None:
    """The facts that `seal` wrote, None when they are damaged."""
    try:
        facts = json.loads(content)
        return facts if seal(facts) == content else None
    except (ValueError, AttributeError, RecursionError):
        return None


def damage(run: Path) -> str:
    """What is wrong with the files of a complete run, "" when nothing is.

    `run.json` lists them with their checksums, and carries its own; runs that were recorded before it did are
    believed. The notebook as it was run may be absent, for it is not committed.
    """
    try:
        content = (run / "run.json").read_bytes()
        facts = json.loads(content)
        listed = dict(facts.get("files", {}))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        return f"run.json cannot be read ({error})"
    if {"files", "sha256"} & set(facts) and unseal(content) is None:
        return "run.json is not what the run wrote"
    for name, digest in listed.items():
        if not (run / name).is_file():
            if name != "notebook.ipynb":
                return f"{name} is missing"
        elif hashlib.sha256((run / name).read_bytes()).hexdigest() != digest:
            return f"{name} is not what the run wrote"
    return ""


def mode() -> int:
    """The permissions of a lock: what the process's umask allows, and never that everybody writes."""
    umask = os.umask(0o077)
    os.umask(umask)
    return 0o664 & ~umask


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a temporary name beside it, fsync, rename, fsync of the folder.

    Raises:
        OSError: it cannot be written; names the file
    """
    partial = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:  # a full disk says no name
        error.filename = error.filename or str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
