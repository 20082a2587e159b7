"""Data sets by name: Birdlets, every data set of the papers in its official layout, anybody's pictures or features."""

from upclose.datasets.encoded import Encoded
from upclose.datasets.loading import CountWarning, FolderWarning, Listed, download, get, load

__all__ = ["CountWarning", "Encoded", "FolderWarning", "Listed", "download", "get", "load"]
