"""Features of one's own: `features:FILE` is a data set and a bank at once.

A safetensors or npz file holds

    image (n, D), label (n,)                   embeddings of unit norm, and their classes: what a split must hold
    crop (n, N, D) or (n, T, N, D)             of N crops, or of N crops at T sizes
    box, image_cls, crop_cls                   as in `features.Views`
    text.label (C, D)                          the class prompts
    text.description (L, D), text.owner (L,)   the sentences and the class of each, class after class
    text.SOURCE.label, ...description, ...     the words of a source that is defined by its words, such as "clip-e"
    class_names, dataset                       C names; the data set's name in tables. In safetensors the metadata
                                               holds them, the names as a JSON list

A name that begins with "train." or "validation." is of that split, any other of the test split. Tip-Adapter's caches
are read too: a `.pt` file with `keys` (D, K), `values` (K, C), `test_f` (n, D), `test_l` (n,) and, where they are kept,
`val_f`, `val_l` and `clip_weights` (D, C); or a folder with a file for each of them, `keys_16shots.pt` and so on. The
keys are the train split.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import normalize

from upclose.datasets import registry
from upclose.features import Ladder, Plan, Text, Views, check_owner, check_unit
from upclose.paths import printable

OWN_WORDS = ("clip-e", "clip-d-shuffled", "waffle", "cupl")  # of `prompts.SOURCES`: no other sentences stand for theirs
_CACHE = re.compile(r"(keys|values)(?:_\d+shots)?|(?:val|test)_[fl]|clip_weights")


class File(NamedTuple):
    """What a file of features holds: tensors by name, the names of its classes if it tells them, and its own."""

    tensors: dict[str, Tensor]
    class_names: list[str] | None
    dataset: str


class Encoded:
    """A split of a file of features. See `upclose.features.Dataset`; `read` and `batches` are those of a bank.

    Attributes:
        views: of all images, in the file's precision; without crops where the file has none
        file: the path
    """

    domain, domain_names, errors = None, (), ()

    def __init__(self, path: Path, split: str):
        """Read a file.

        Raises:
            FileNotFoundError: there is none
            ValueError: it is damaged or no such file, does not hold this split, or its tensors do not fit
        """
        self.path, self.split = path, split
        tensors, names, self.name = _read(path)
        here = {name: x for name, x in tensors.items() if name.partition(".")[0] not in registry.SPLITS}
        if split != "test":
            here = {name: x for name, x in here.items() if name.startswith("text.")}
        here |= {name.removeprefix(f"{split}."): x for name, x in tensors.items() if name.startswith(f"{split}.")}
        if "image" not in here or "label" not in here:
            raise ValueError(f"{path} holds no image and label of the split {split!r}; it holds {', '.join(tensors)}")
        self._text = {name.removeprefix("text."): x for name, x in here.items() if name.startswith("text.")}
        image, label = here["image"], here["label"].long()
        crop = here.get("crop", image[:, None, :][:, :0])
        more = {name: here[name] for name in Views._fields[2:] if name in here}
        self.views: Views | Ladder = (
            Ladder(image, crop, more.get("box")) if crop.ndim == 4 else Views(image, crop, **more)
        )
        self.label = label.numpy().astype(np.int64)
        self._check()
        classes = max([len(self._text.get("label", ())), int(label.max()) + 1 if len(label) else 0])
        self.class_names = [printable(n) for n in names] if names else [f"class {c}" for c in range(classes)]
        if len(set(self.class_names)) < len(self.class_names):
            raise ValueError(f"{path}: two of the {len(self.class_names)} classes have the same name")
        if classes > len(self.class_names) or len(self._text.get("label", self.class_names)) != len(self.class_names):
            raise ValueError(
                f"{path}: {len(self.class_names)} class names, {len(self._text.get('label', ()))} class prompts and "
                f"labels up to {int(label.max())} do not fit together"
            )
        self.key = [str(i) for i in range(len(label))]
        self.fingerprint = hashlib.sha256(f"{_digest(path)} {split}".encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.label)

    @property
    def numbers(self) -> int:
        """In the crops of an image."""
        return self.views.crop.shape[1:].numel()

    def load(self, i: int) -> Tensor:
        """There are no pictures.

        Raises:
            ValueError: always
        """
        raise ValueError(f"{self.path} holds features and no pictures: what looks at pictures needs another data set")

    def select(self, index: Sequence[int] | np.ndarray) -> Encoded:
        """The same with some of its images, in the order of `index`."""
        chosen = self._with(self.views.select(torch.as_tensor(index)))
        chosen.label, chosen.key = self.label[index], [self.key[int(i)] for i in index]
        chosen.fingerprint = hashlib.sha256(repr([self.fingerprint, chosen.key]).encode()).hexdigest()[:32]
        return chosen

    def crop_set(self, plan: Plan | None) -> Encoded:
        """The same with the crops that a plan stands for, None for all.

        The file's crops were drawn before, so that of a plan only numbers are read: seed s with n crops takes the n
        crops that follow the first s * n, and the first `steps` sizes. A file without crops gives none.

        Raises:
            ValueError: the file has fewer crops or sizes
        """
        if plan is None or not self.views.crop.shape[-2]:
            return self
        ladder, start, stop = isinstance(self.views, Ladder), plan.seed * plan.n, (plan.seed + 1) * plan.n
        levels, crops = (self.views.crop.shape[1] if ladder else 1), self.views.crop.shape[-2]
        if plan.steps > levels:
            raise ValueError(
                f"{self.path} has its crops at {levels} sizes, not {plan.steps}: write crop as (n, T, N, D) with "
                f"T = {plan.steps}, or set steps={levels}"
            )
        if stop > crops:
            raise ValueError(
                f"{self.path} has {crops} crops an image: {plan.n} crops of seed {plan.seed} are those from {start} "
                f"to {stop - 1}; ask for fewer crops or seeds"
            )
        if not ladder:
            image, crop, box, image_cls, crop_cls = self.views
            cut = [None if x is None else x[:, start:stop] for x in (crop, box, crop_cls)]
            return self._with(Views(image, cut[0], cut[1], image_cls, cut[2]))
        cut = Ladder(self.views.image, *(None if x is None else x[:, : plan.steps, start:stop] for x in self.views[1:]))
        return self._with(cut if plan.steps > 1 else cut.level(0))

    def read(self, images: slice = slice(None)) -> tuple[Views | Ladder, Tensor, Tensor]:
        """Some of the images, as `bank.Bank.read` gives them.

        Raises:
            ValueError: the slice has a step, or an embedding is not of unit norm
        """
        start, stop, step = images.indices(len(self))
        if step != 1:
            raise ValueError(f"features are read by ranges: {images} has a step; read all of them and select")
        views = self.views.select(slice(start, stop))
        where = f"{self.path}, of the images {start} to {stop - 1}: "
        views = views._replace(image=_unit(views.image, f"{where}image"), crop=_unit(views.crop, f"{where}crop"))
        views = type(views)(*(None if x is None else x.float() for x in views))
        return views, torch.from_numpy(self.label[start:stop]), torch.arange(start, max(start, stop))

    def batches(self, size: int) -> Iterator[tuple[Views | Ladder, Tensor, Tensor]]:
        """`read` over blocks of images."""
        for start in range(0, len(self), size):
            yield self.read(slice(start, start + size))

    def text(self, source: str) -> Text:
        """The words of the file: those of a source by its name where the file has them, else its own.

        Without sentences the text has no description.

        Raises:
            ValueError: the source is defined by its words and the file has none of it, or there are no class prompts
        """
        parts = {name.removeprefix(f"{source}."): x for name, x in self._text.items() if name.startswith(f"{source}.")}
        if not parts and source in OWN_WORDS:
            raise ValueError(f"{self.path} holds no words of {source!r}: write text.{source}.label and .description")
        parts = self._text | parts
        if "label" not in parts:
            raise ValueError(
                f"{self.path} holds no text.label: without class prompts (C, D) there is no zero-shot score"
            )
        label = _unit(parts["label"], f"{self.path}: text.label")
        description, owner = parts.get("description", label[:0]), parts.get("owner", torch.empty(0)).long()
        if len(description) != len(owner):
            raise ValueError(f"{self.path}: {len(description)} sentences but {len(owner)} owners: give one to each")
        if len(owner):
            check_owner(owner, len(label))
        return Text(label, _unit(description, f"{self.path}: text.description"), owner)

    def _with(self, views: Views | Ladder) -> Encoded:
        other = object.__new__(Encoded)
        other.__dict__ = self.__dict__ | {"views": views}
        return other

    def _check(self) -> None:
        shapes = {name: tuple(x.shape) for name, x in self.views._asdict().items() if x is not None}
        image = shapes["image"]
        n, d = image[0], image[-1]
        shapes |= {f"text.{name}": tuple(x.shape) for name, x in self._text.items() if not name.endswith("owner")}
        fits = {
            "label": self.label.shape == (n,),
            "image": image == (n, d),
            "crop": len(shapes["crop"]) in (3, 4) and shapes["crop"][0] == n and shapes["crop"][-1] == d,
            "box": shapes.get("box", (*shapes["crop"][:-1], 4)) == (*shapes["crop"][:-1], 4),
            "image_cls": shapes.get("image_cls", (n,))[0] == n,
            "crop_cls": shapes.get("crop_cls", shapes["crop"])[:-1] == shapes["crop"][:-1],
        } | {name: shape[1:] == (d,) for name, shape in shapes.items() if name.startswith("text.")}
        if wrong := [name for name, right in fits.items() if not right]:
            raise ValueError(
                f"{self.path}: {wrong[0]} {shapes.get(wrong[0], self.label.shape)} does not fit image {image}"
            )
        if n and self.label.min() < 0:
            raise ValueError(f"{self.path}: label {self.label.argmin()} is {self.label.min()}: classes count from 0")


def _unit(x: Tensor, name: str) -> Tensor:
    """Embeddings as float32 of unit norm: those of half precision are divided by their norm."""
    check_unit(x.float(), name)
    return x if x.dtype == torch.float32 else normalize(x.float(), dim=-1)


def _digest(path: Path) -> str:
    files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _read(path: Path) -> File:
    if not path.exists():
        raise FileNotFoundError(
            f"no file {path}; features:FILE needs one of .safetensors, .npz or .pt, or a folder of .pt"
        )
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                notes = file.metadata() or {}
                names = json.loads(notes["class_names"]) if "class_names" in notes else None
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return File(held, names, notes.get("dataset", "features"))
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                held = {name: file[name] for name in file.files}
            names = [str(name) for name in held.pop("class_names")] if "class_names" in held else None
            name = str(held.pop("dataset", "features"))
            return File({name: torch.from_numpy(x) for name, x in held.items()}, names, name)
        if path.is_dir() or path.suffix == ".pt":
            return _cache(path)
    except (SafetensorError, zipfile.BadZipFile, pickle.UnpicklingError, ValueError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged or holds something else than tensors ({error})") from error
    raise ValueError(f"{path} is neither .safetensors nor .npz nor .pt: features:FILE reads these")


def _cache(path: Path) -> File:
    """Tip-Adapter's cache, in one file or in a folder."""
    files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
    held = {file.stem: torch.load(file, map_location="cpu", weights_only=True) for file in files}
    held = held if path.is_dir() else held[path.stem]
    found: dict[str, Tensor] = {}
    for name, x in held.items():
        if (match := _CACHE.fullmatch(name)) and isinstance(x, Tensor):
            if (short := match[1] or name) in found:
                raise ValueError(f"it has {short} of several numbers of shots: keep those of one")
            found[short] = x
    if not {"keys", "values"} <= found.keys() and not {"test_f", "test_l"} <= found.keys():
        raise ValueError(f"neither keys and values nor test_f and test_l are there, but {', '.join(held)}")
    tensors = {}
    if "keys" in found:
        key = found["keys"].T if found["keys"].shape[1] == len(found["values"]) else found["keys"]  # (K, D)
        tensors |= {"train.image": key.contiguous(), "train.label": found["values"].argmax(1)}
    for split, short in (("validation", "val"), ("test", "test")):
        tensors |= {
            f"{split}.{what}": found[f"{short}_{letter}"]
            for what, letter in (("image", "f"), ("label", "l"))
            if f"{short}_{letter}" in found
        }
    if "clip_weights" in found:
        tensors["text.label"] = found["clip_weights"].T.contiguous()
    return File(tensors, None, "features")
