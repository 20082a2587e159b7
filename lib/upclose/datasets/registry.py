"""What is known of every data set: one line a (data set, protocol) in `published/datasets.csv`.

A protocol says whose split it is: "official", "coop" (the `split_zhou_*.json` files), "vissl" (folders that VISSL's
scripts make) or "held-out" (CIFAR-100 with 10,000 training images as validation). The first line of a data set is its
default.

Where the counts come from. Official: the data sets' own pages. CoOp: its released program halves every class of
Caltech101, DTD, EuroSAT, Flowers102 and Food-101 into train, a fifth is validation and the rest test, and takes a fifth
of the training images of Pets, Cars, SUN397 and UCF101 as validation. The sums are exact, and so are the splits where
classes are of one size; the others, rounded class by class, were not compared with the split files. VISSL: as FAIR and
the papers it follows print them, not compared with what the scripts write; Caltech101's 4,403 and 6,645 are more than
the pictures that it has (CoOp's three parts are 8,242), so train and test overlap or a number is wrong.
"""

from __future__ import annotations

import csv
import difflib
from functools import cache
from typing import NamedTuple

from upclose import paths, shipped

SPLITS = ("train", "validation", "test")
OWN = {"imagefolder": "PATH", "features": "FILE", "webdataset": "PLACE"}  # what is not registered: a name is KIND:PLACE


def is_own(name: str) -> bool:
    """Whether a name stands for somebody's own data: a kind of `OWN` and a colon."""
    return name.partition(":")[0] in OWN and ":" in name


class Entry(NamedTuple):
    """A data set under one protocol.

    Attributes:
        dataset, protocol: its key
        classes: how many
        train, validation, test: how many items; 0 where the split does not exist
        folder: below the root, of this protocol's files
        licence, homepage, get: whose pictures they are and how to get them
        domains: name -> (train, test) items, of the data sets that have domains
    """

    dataset: str
    protocol: str
    classes: int
    train: int
    validation: int
    test: int
    folder: str
    licence: str
    homepage: str
    get: str
    domains: dict[str, tuple[int, int]]


@cache
def entries() -> dict[tuple[str, str], Entry]:
    """Every entry of the registry."""
    found: dict[tuple[str, str], Entry] = {}
    with shipped.checked(paths.PUBLISHED / "datasets.csv").open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            domain = line.pop("domain")
            key = line["dataset"], line["protocol"]
            numbers = {name: int(line.pop(name)) for name in ("classes", *SPLITS)}
            entry = found.setdefault(key, Entry(**line, **numbers, domains={}))
            if domain:
                entry.domains[domain] = numbers["train"], numbers["test"]
    return found


def names() -> list[str]:
    """The data sets of the registry, without Birdlets and one's own."""
    return list(dict.fromkeys(dataset for dataset, _ in entries()))


def entry(dataset: str, protocol: str | None = None) -> Entry:
    """One entry.

    Args:
        dataset: of `names()`
        protocol: None for the default, the first that is listed

    Raises:
        ValueError: no such data set or protocol
    """
    protocols = [p for name, p in entries() if name == dataset]
    if not protocols:
        known = [*names(), "birdlets", *(f"{kind}:{place}" for kind, place in OWN.items())]
        close = difflib.get_close_matches(dataset, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
        raise ValueError(f"no data set {dataset!r}; {hint}")
    if protocol and protocol not in protocols:
        raise ValueError(f"{dataset} has no protocol {protocol!r}; there are {', '.join(protocols)}")
    return entries()[dataset, protocol or protocols[0]]


@cache
def imagenet_classes() -> dict[str, str]:
    """Folder (wnid) -> name of ImageNet's 1000 classes, in label order; every name is different.

    Deviates:
        OpenAI's current list has two pairs of equal names ("missile", "sunglasses"); this is its first list,
        which the published descriptions use and in which they differ.
    """
    with shipped.checked(paths.PUBLISHED / "imagenet_classes.csv").open(newline="", encoding="utf-8") as file:
        return {line["folder"]: line["name"] for line in csv.DictReader(file)}
