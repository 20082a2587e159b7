"""The shapes that flow between the modules: text, views, ladders, crop plans, data sets.

Everything here is a plain container. Embeddings are float32 and have unit norm; B images, N crops an image,
C classes, L descriptions in all, D embedding dimensions, W the width of the image tower.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_WIDEST: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # owner -> descriptions of the class with most


class Text(NamedTuple):
    """The text side of a classification problem.

    Attributes:
        label: (C, D) unit norm, the embedding of the class prompt, "a photo of a {name}."
        description: (L, D) unit norm, every class's descriptions, class after class
        owner: (L,) int64, non-decreasing, the class that each description describes
    """

    label: Tensor
    description: Tensor
    owner: Tensor

    @classmethod
    def from_lists(cls, label: Tensor, description: Sequence[Tensor], names: Sequence[str] | None = None) -> Text:
        """Join per-class description embeddings.

        Args:
            label: (C, D) class prompt embeddings
            description: C tensors (M_c, D), one a class, M_c >= 1
            names: C class names, only to make the errors readable

        Raises:
            ValueError: a class has no description, or the number of classes differs

        Example:
            >>> text = Text.from_lists(torch.eye(2), [torch.eye(2), torch.eye(2)[1:]])
            >>> text.owner.tolist()  # two descriptions of class 0, one of class 1
            [0, 0, 1]
            >>> text.mean().tolist()
            [[0.5, 0.5], [0.0, 1.0]]
        """
        if len(description) != len(label):
            raise ValueError(f"{len(label)} class prompts but descriptions for {len(description)} classes")
        for c, rows in enumerate(description):
            if len(rows) == 0:
                name = f"{names[c]!r} (class {c})" if names is not None else f"class {c}"
                raise ValueError(f"{name} has no description: give it at least one, for example its own prompt")
        counts = [len(rows) for rows in description]
        owner = torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(label.device, non_blocking=True)
        _WIDEST[owner] = max(counts, default=0)
        return cls(label, torch.cat(list(description)), owner)

    @property
    def counts(self) -> Tensor:
        """(C,) int64: how many descriptions each class has."""
        return self.owner.new_zeros(len(self.label)).index_add_(0, self.owner, torch.ones_like(self.owner))

    @property
    def widest(self) -> int:
        """How many descriptions the class with most has; a device is asked for it at most once a text."""
        if self.owner not in _WIDEST:
            _WIDEST[self.owner] = int(self.counts.max())
        return _WIDEST[self.owner]

    def sum(self, x: Tensor | None = None) -> Tensor:
        """Sums over each class's descriptions: (L, ...) -> (C, ...); without `x` of the embeddings, (C, D)."""
        x = self.description if x is None else x
        return x.new_zeros(len(self.label), *x.shape[1:]).index_add(0, self.owner, x)

    def mean(self, x: Tensor | None = None) -> Tensor:
        """Means over each class's descriptions, as `sum`; means of embeddings are not normalised.

        Raises:
            ValueError: on the CPU, a class without descriptions
        """
        check_described(self)
        total = self.sum(x)
        count = self.sum(total.new_ones(len(self.owner)))
        return total / count.view(-1, *[1] * (total.ndim - 1))

    def of(self, c: int) -> Text:
        """The text of one class: its prompt (1, D) and its descriptions, which now belong to class 0."""
        mine = self.description[self.owner == c]
        return Text(self.label[c : c + 1], mine, self.owner.new_zeros(len(mine)))

    def to(self, device: torch.device | str) -> Text:
        """The same text on a device."""
        moved = Text(*_on(device, self))
        if self.owner in _WIDEST:
            _WIDEST[moved.owner] = _WIDEST[self.owner]
        return moved

    def padded(self) -> tuple[Tensor, Tensor]:
        """The descriptions as a rectangle: (C, M, D) padded with zeros, and (C, M) bool that is True on real ones.

        Raises:
            ValueError: on the CPU, an owner that is not as described, or a class without descriptions
        """
        check_described(self)
        counts = self.counts
        place = torch.arange(self.widest, device=counts.device)
        mask, first = place < counts[:, None], (counts.cumsum(0) - counts)[:, None]  # (C, M), (C, 1)
        rows = self.description[first + place.minimum(counts[:, None] - 1)]
        return rows.masked_fill(~mask[..., None], 0.0), mask


def check_unit(x: Tensor, name: str, tolerance: float = 1e-2) -> None:
    """Raise for the first embedding of `x` (..., D) that is not finite or not of unit norm, on the CPU only.

    Raises:
        ValueError: names the embedding and its norm
    """
    if x.device.type != "cpu":
        return
    norm = torch.linalg.vector_norm(x.detach(), dim=-1)
    if (bad := ~((norm - 1).abs() <= tolerance)).any():
        index = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name}{index} has norm {norm[tuple(index)]:.4g}, not 1: "
            f"the embeddings {tuple(x.shape)} must be finite and divided by their norm"
        )


def check_finite(x: Tensor, name: str) -> None:
    """Raise for the first embedding of `x` (..., D) that is not finite, on the CPU only.

    Raises:
        ValueError: names the embedding
    """
    if x.device.type == "cpu" and (bad := ~x.isfinite().all(-1)).any():
        raise ValueError(f"{name}{bad.nonzero()[0].tolist()} is not finite: drop it or encode it again")


def check_described(text: Text) -> None:
    """`check_owner` of a text's descriptions: the mean of a class without any would be 0 / 0."""
    check_owner(text.owner, len(text.label))


def check_owner(owner: Tensor, classes: int) -> None:
    """Raise unless descriptions stand class after class and each class has one, on the CPU only.

    Args:
        owner: (L,) int64
        classes: C

    Raises:
        ValueError: names the classes without descriptions
    """
    if owner.device.type != "cpu":
        return
    if (owner.diff() < 0).any() or (len(owner) and not 0 <= owner[0] <= owner[-1] < classes):
        raise ValueError(f"owner must be non-decreasing from 0 to {classes - 1}: descriptions stand class after class")
    if empty := (torch.bincount(owner, minlength=classes) == 0).nonzero().flatten().tolist():
        raise ValueError(f"classes {empty} have no description: give each at least one, for example its own prompt")


def check_cropped(views: Views) -> None:
    """Raise for images without crops.

    Raises:
        ValueError: quotes the shape
    """
    if views.crop.shape[1] == 0:
        raise ValueError(f"views.crop {tuple(views.crop.shape)} holds no crop: make the views with a plan of n >= 1")


def check_labels(label: Tensor, images: int) -> None:
    """Raise unless each of so many images has one label, where broadcasting would give all the same.

    Raises:
        ValueError: quotes both numbers
    """
    if label.shape != (images,):
        raise ValueError(f"{images} images, but labels {tuple(label.shape)}: give one to each")


def _on(device: torch.device | str, parts: Iterable[Tensor | None]) -> Iterator[Tensor | None]:
    return (None if part is None else part.to(device) for part in parts)


class Views(NamedTuple):
    """A batch of B images, N crops each.

    Attributes:
        image: (B, D) unit norm, the whole image (short side resized, centre crop: CLIP's preprocessing)
        crop: (B, N, D) unit norm
        box: (B, N, 4) float32, x0, y0, x1, y1 in pixels of the original image
        image_cls: (B, W) the [CLS] token before projection
        crop_cls: (B, N, W) the same of every crop

    Example:
        >>> views = Views(image=torch.eye(2), crop=torch.eye(2)[:, None])  # the one crop is the image
        >>> views.select(slice(0, 1)).crop.shape
        torch.Size([1, 1, 2])
    """

    image: Tensor
    crop: Tensor
    box: Tensor | None = None
    image_cls: Tensor | None = None
    crop_cls: Tensor | None = None

    def select(self, index: slice | Tensor) -> Views:
        """The same views of some of the images."""
        return Views(*(None if part is None else part[index] for part in self))

    def cut(self, *, crops: int | None = None) -> Views:
        """The first crops, as if only those had been drawn."""
        crop, box, token = (None if part is None else part[:, :crops] for part in (self.crop, self.box, self.crop_cls))
        return Views(self.image, crop, box, self.image_cls, token)

    def to(self, device: torch.device | str) -> Views:
        """The same views on a device."""
        return Views(*_on(device, self))


class Ladder(NamedTuple):
    """A batch of B images whose N crops were each expanded 0 .. T-1 times.

    Attributes:
        image: (B, D) unit norm, the whole image
        crop: (B, T, N, D) unit norm, crop n expanded t times
        box: (B, T, N, 4) float32, x0, y0, x1, y1 in pixels of the original image
    """

    image: Tensor
    crop: Tensor
    box: Tensor | None = None

    def level(self, step: int) -> Views:
        """The crops of one expansion step as `Views`."""
        return Views(self.image, self.crop[:, step], None if self.box is None else self.box[:, step])

    def flat(self) -> Views:
        """All T * N crops as `Views`, as if they had been drawn at their sizes."""
        return Views(self.image, self.crop.flatten(1, 2), None if self.box is None else self.box.flatten(1, 2))

    def select(self, index: slice | Tensor) -> Ladder:
        """The same ladder of some of the images."""
        return Ladder(*(None if part is None else part[index] for part in self))

    def cut(self, *, levels: int | None = None, crops: int | None = None) -> Ladder:
        """The first levels and the first crops, as if only those had been expanded and drawn."""
        return Ladder(self.image, *(None if part is None else part[:, :levels, :crops] for part in self[1:]))

    def distinct(self, mask: Tensor | None = None) -> float:
        """Encodings an image: the mean number of distinct boxes, of those in `mask` (B, T, N) where it is given."""
        rows = self.box.flatten(1, 2) if mask is None else [box[kept] for box, kept in zip(self.box, mask)]
        return sum(len(row.unique(dim=0)) for row in rows) / len(rows)

    def to(self, device: torch.device | str) -> Ladder:
        """The same ladder on a device."""
        return Ladder(*_on(device, self))


class Plan(NamedTuple):
    """Which crops a bank holds.

    Attributes:
        sampler: "square" (side U(scale) * short side) | "area" (share U(scale) of the area)
        n: crops an image
        scale: the range that the sampler draws from
        seed: of the crop set
        factor: of one expansion, 1 = none
        steps: levels of the ladder, 1 = no ladder
        cls: keep the [CLS] tokens before projection too
    """

    sampler: str = "square"
    n: int = 30
    scale: tuple[float, float] = (0.5, 0.9)
    seed: int = 0
    factor: float = 1.0
    steps: int = 1
    cls: bool = False


@runtime_checkable
class Dataset(Protocol):
    """What every loader gives.

    Attributes:
        name, split: of the data set
        class_names: in the data set's own order
        fingerprint: a hash of the names, the sizes and the order of the items
        key: one string an item, stable across machines; crops are drawn from (seed, key)
        label: (n,) int64
        domain: (n,) int64 or None
        domain_names: what the numbers of `domain` mean
    """

    name: str
    split: str
    class_names: list[str]
    fingerprint: str
    key: list[str]
    label: np.ndarray
    domain: np.ndarray | None
    domain_names: list[str]

    def __len__(self) -> int: ...

    def load(self, i: int) -> Tensor:
        """Item i as uint8 (3, H, W)."""
        ...
