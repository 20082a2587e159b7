"""What the runs of a parameter file encode: banks, which several runs share, and what trainings draw anew.

It is reckoned from the parameters, the registry of data sets and what the registry of methods says of an image's
encodings; no picture is looked at. What it leaves out: a notebook's own controls, equal boxes that are encoded once
(fewer), text, and everything that is not encoding, such as transport and the training of small networks.
"""

from __future__ import annotations

import heapq
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from upclose import compare, crops, encode, methods, params
from upclose.datasets import registry

BYTES = 16  # of a box; an embedding is kept in float16
PICTURE = 375, 500  # height and width, as ImageNet's are


class Backbone(NamedTuple):
    """A model and its weights, as `encode.load` takes them."""

    name: str
    pretrained: str

    @property
    def label(self) -> str:
        """As the papers print it."""
        return compare.backbone_label(*self)


class Bank(NamedTuple):
    """The views of a split with one crop set: encoded once, read by every run that needs the same.

    Attributes:
        paper: whose notebooks draw crops alike
        dataset, protocol, split: whose pictures
        backbone: that encodes them
        crops: which are drawn, in words
        seed: of the crops, None for whole pictures
        images: how many
        views: encodings of an image, itself included
    """

    paper: str
    dataset: str
    protocol: str
    split: str
    backbone: Backbone
    crops: str
    seed: int | None
    images: int
    views: int

    @property
    def encodings(self) -> int:
        """Of all images."""
        return self.images * self.views

    @property
    def bytes(self) -> int:
        """On disk."""
        return self.encodings * (2 * int(_facts(self.backbone).dim) + BYTES)


class Work(NamedTuple):
    """What one run encodes: the banks that it reads, and views of trainings, which no bank keeps."""

    backbone: Backbone
    banks: tuple[Bank, ...]
    passing: int


def methods_of(values: dict[str, Any]) -> list[methods.Method]:
    """Of the rows of a cell those that are registered, once a row."""
    return [method for row in values["methods"] if (method := methods.find(row))]


def work(about: params.About, values: dict[str, Any]) -> Work:
    """What a cell of a parameter file encodes.

    Args:
        about: its notebook
        values: of the cell, see `params.cells`

    Raises:
        ValueError: a data set or a backbone that no paper has
    """
    backbone = Backbone(values["backbone"], values.get("pretrained", ""))
    banks = tuple(
        Bank(about.paper, entry.dataset, entry.protocol, split, backbone, crops, seed, images, views)
        for entry, split, images in _pictures(about, values)
        for crops, seed, views in _plans(values)
        if images
    )
    images = _source(values).train * values.get("epochs", 0) * len(values.get("seeds", [0]))
    return Work(backbone, banks, images * sum(m.encodings(values.get("crops", 0)) for m in _trained(values)))


def _source(values: dict[str, Any]) -> registry.Entry:
    """Whose training pictures a cell reads."""
    if values.get("train_dataset"):
        return registry.entry(values["train_dataset"])
    return registry.entry(values["dataset"], values.get("protocol"))


def _trained(values: dict[str, Any]) -> list[methods.Method]:
    return [method for method in methods_of(values) if {"cls", "encoder"} <= set(method.needs)]


def _pictures(about: params.About, values: dict[str, Any]) -> list[tuple[registry.Entry, str, int]]:
    """The splits that a cell reads, and how many pictures of each."""
    entry, source = registry.entry(values["dataset"], values.get("protocol")), _source(values)
    found = [(source, "train", source.train), (source, "validation", source.validation)]
    found += [(entry, "test", sum(test for _, test in entry.domains.values()) or entry.test)]
    found += [(source, "test", source.test)] * (source != entry)
    shots = max(values.get("shots", [0])) * entry.classes * ("train" not in about.splits)
    return [line for line in found if line[1] in about.splits] + [(source, "train", shots)]


def _plans(values: dict[str, Any]) -> list[tuple[str, int | None, int]]:
    """The crops that are drawn of every picture: in words, the seed, and the encodings of a picture."""
    if "budgets" in values:
        return _affordable(values)
    count, seeds = values.get("crops", 0), values.get("crop_seeds") or values.get("seeds", [0])
    drawing = [method for method in methods_of(values) if {"crops", "ladder"} & set(method.needs)]
    drawing = [method for method in drawing if method not in _trained(values)]
    own = [method for method in drawing if method.encodings(1) == method.encodings(2)]  # whatever N is
    views = max((method.encodings(count) for method in drawing if method not in own), default=1)
    said = ", ".join([f"{count} crops", *(f"{k} {values[k]:g}" for k in ("alpha", "beta", "tau") if k in values)])
    shared = [(said, seed, views) for seed in seeds] if views > 1 else [("whole pictures", None, 1)]
    return shared + [(f"{method.name}'s views", seeds[0], method.encodings(count)) for method in own]


def _affordable(values: dict[str, Any]) -> list[tuple[str, int | None, int]]:
    """`_plans`, where methods draw what a budget pays for: the compared one, and the largest where that is larger."""
    budgets = {values["budget"]: values["crop_seeds"]}
    if (most := max(values["budgets"])) > values["budget"]:
        budgets[most] = values["large_seeds"]
    views: dict[tuple[str, int], int] = {}
    for method in methods_of(values):
        if {"crops", "ladder"} & set(method.needs):
            for budget, seeds in budgets.items():
                for drawn in [(f"{method.crop_set} crops, {budget} encodings", seed) for seed in seeds]:
                    views[drawn] = max(views.get(drawn, 1), method.encodings(method.afford(budget)))
    return [(*drawn, n) for drawn, n in views.items()] or [("whole pictures", None, 1)]


def readers(works: Iterable[Work]) -> dict[Bank, list[int]]:
    """Every bank, once, and the positions of the runs that read it; the first of them builds it."""
    found: dict[Bank, list[int]] = {}
    for k, each in enumerate(works):
        for bank in each.banks:
            found.setdefault(bank, []).append(k)
    return found


def encodings(banks: Iterable[Bank], works: Iterable[Work]) -> Counter[Backbone]:
    """How often each backbone encodes for some different banks and for the trainings of some runs."""
    found: Counter[Backbone] = Counter()
    for bank in banks:
        found[bank.backbone] += bank.encodings
    for each in works:
        found[each.backbone] += each.passing
    return found


def order(works: Sequence[Work]) -> list[int]:
    """The positions of some runs in an order in which few wait for others: who builds a bank before who reads it."""
    place = [0] * len(works)
    for by in readers(works).values():
        for k, reader in enumerate(by):
            place[reader] = max(place[reader], k)
    return sorted(range(len(works)), key=place.__getitem__)


def hours(works: Sequence[Work], rate: Mapping[Backbone, float], places: int = 1) -> tuple[float, float]:
    """Hours of encoding: in all, and until the last of so many GPUs is done. Who reads a bank first pays for it.

    Args:
        works: of the runs, in their order
        rate: encodings a second of each backbone
        places: GPUs that work at the same time
    """
    by_bank, whole, busy = readers(works), 0.0, [0.0] * places
    for k, each in enumerate(works):
        paid = encodings([bank for bank, by in by_bank.items() if by[0] == k], [each])
        own = sum(n / rate[backbone] for backbone, n in paid.items()) / 3600
        whole += own
        heapq.heapreplace(busy, busy[0] + own)
    return whole, max(busy)


def rate(backbone: Backbone, device: str | None = None, precision: str = "fp32", seconds: float = 5.0) -> float:
    """Crops that a backbone encodes a second, at best, from a picture in memory; with random weights.

    Args:
        backbone: whose shape
        device: as in `encode.load`
        precision: as in `encode.load`
        seconds: that the measurement takes, at least one call long
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = encode.load(backbone.name, None, device, precision)
    picture = torch.randint(0, 256, (3, *PICTURE), dtype=torch.uint8)
    count, best, stop = 1, 0.0, time.perf_counter() + seconds
    while True:
        box = crops.sample_boxes(*PICTURE, count, seed=0, key="")
        start = time.perf_counter()
        encoder.encode_crops(picture, box).cpu()  # which waits for the device
        now = time.perf_counter()
        best = max(best, count / (now - start))
        if now > stop:
            return best
        count = min(2 * count, encoder.batch_size)


def gflops(backbone: Backbone) -> float:
    """GFLOP of an encoding.

    Raises:
        ValueError: no paper has the backbone
    """
    return float(_facts(backbone).gflops)


def _facts(backbone: Backbone):
    for line in compare.backbones().itertuples():
        if (line.name, line.pretrained) == backbone:
            return line
    raise ValueError(f"{backbone.name!r} with {backbone.pretrained!r} is no backbone of the papers' tables")
