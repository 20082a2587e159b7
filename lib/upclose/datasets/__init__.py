"""Data sets by name: Birdlets, every data set of the papers in its official layout, anybody's pictures or features."""

from upclose.datasets.archives import LackingError, download
from upclose.datasets.encoded import Encoded
from upclose.datasets.loading import CountWarning, FolderWarning, Listed, load, verify
from upclose.datasets.tars import CollectionWarning, ShardError, Tars

__all__ = [
    "CollectionWarning",
    "CountWarning",
    "Encoded",
    "FolderWarning",
    "LackingError",
    "Listed",
    "ShardError",
    "Tars",
    "download",
    "load",
    "verify",
]
