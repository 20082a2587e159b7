"""Data sets by name."""

from __future__ import annotations

from upclose import birdlets
from upclose.features import Dataset


def load(name: str, split: str = "test", root=None, limit: int | None = None, **options) -> Dataset:
    """A data set of the registry.

    Args:
        name: of the data set
        split: "test", "validation" or "train"
        root: the folder that holds it
        limit: only so many items
        options: of the data set; Birdlets' are those of `birdlets.dataset`
    """
    if name != "birdlets":
        raise ValueError(f"no data set {name!r}; there are birdlets")
    return birdlets.dataset(split, **({"n": limit} if limit else {}), **options)
