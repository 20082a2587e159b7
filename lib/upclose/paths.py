"""Where things are: never relative to the working directory."""

from __future__ import annotations

import os
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


def bank() -> Path:
    """Where feature banks are kept: `UPCLOSE_BANK`, else `bank` in the cache."""
    return Path(os.environ.get("UPCLOSE_BANK") or cache() / "bank")


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
