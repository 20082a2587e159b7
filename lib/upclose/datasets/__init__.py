"""Data sets by name: Birdlets, every data set of the five papers in its official layout, anybody's pictures."""

from upclose.datasets.loading import CountWarning, FolderWarning, Listed, download, get, load

__all__ = ["CountWarning", "FolderWarning", "Listed", "download", "get", "load"]
