"""Where things are, never relative to the working directory; and how a file is written whole."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent.parent
NOTEBOOKS = ROOT / "notebooks"
PARAMS = ROOT / "params"
WEIGHTS = PACKAGE / "weights"
PUBLISHED = PACKAGE / "published"


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
    return folder.name.removeprefix(".partial-") if folder else ""


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a temporary name beside it, fsync, rename, fsync of the folder."""
    partial = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
