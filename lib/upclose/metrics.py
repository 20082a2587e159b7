"""Accuracies, and the rows of `metrics.csv`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from upclose import features

COLUMNS = ["paper", "table", "method", "dataset", "backbone", "setting", "metric", "value", "std", "n", "run"]


def correct(scores: Tensor, label: Tensor, k: int = 1) -> Tensor:
    """Whether the true class is among the k best.

    A class that ties with the true one counts as better when its index is lower, as `argmax` would decide.

    Args:
        scores: (B, C), larger is better
        label: (B,) int64
        k: how many guesses

    Returns:
        (B,) bool

    Raises:
        ValueError: scores that are not finite, another number of labels than of images, or k < 1
    """
    if k < 1:
        raise ValueError(f"top-k needs k >= 1, not {k}")
    if not torch.isfinite(scores).all():
        row = int((~torch.isfinite(scores)).any(1).nonzero()[0])
        raise ValueError(f"the scores of image {row} are not finite")
    label = torch.as_tensor(label, device=scores.device)
    features.check_labels(label, len(scores))
    own = scores.gather(1, label[:, None])
    before = torch.arange(scores.shape[1], device=scores.device) < label[:, None]
    return ((scores > own) | ((scores == own) & before)).sum(1) < k


def accuracy(scores: Tensor, label: Tensor, k: int = 1) -> float:
    """Top-k accuracy.

    Args:
        scores: (B, C), larger is better
        label: (B,) int64
        k: how many guesses

    Returns:
        per cent

    Raises:
        ValueError: as `correct`

    Example:
        >>> accuracy(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]))
        50.0
    """
    return 100 * correct(scores, label, k).double().mean().item()


def per_class(hit: Tensor, label: Tensor, classes: int) -> Tensor:
    """Accuracy of each class.

    Args:
        hit: (B,) bool, of `correct`
        label: (B,) int64
        classes: C

    Returns:
        (C,) float64 per cent, NaN for a class without images
    """
    label = torch.as_tensor(label)
    total = torch.bincount(label, minlength=classes)
    return 100 * torch.bincount(label, weights=hit.double(), minlength=classes) / total


def confusion(scores: Tensor, label: Tensor) -> Tensor:
    """Which class is taken for which.

    Args:
        scores: (B, C), larger is better
        label: (B,) int64

    Returns:
        (C, C) int64: entry (i, j) counts the images of class i that are taken for class j
    """
    classes = scores.shape[1]
    return torch.bincount(torch.as_tensor(label) * classes + scores.argmax(1), minlength=classes**2).view(
        classes, classes
    )


def standardised(scores: Tensor) -> Tensor:
    """Scores of an image less their mean and over their spread, so that those of two methods can be averaged.

    Args:
        scores: (B, C), C >= 2; an image whose classes all have one score keeps zeros
    """
    spread = scores.std(1, keepdim=True)
    return (scores - scores.mean(1, keepdim=True)) / torch.where(spread > 0, spread, 1)


def errors_in_common(first: Tensor, second: Tensor) -> float:
    """Of the images that one of two methods gets wrong or both, the share that both get wrong; NaN without errors.

    Args:
        first: (...) bool, of `correct`
        second: the same shape
    """
    both, one = (~first & ~second).sum(), (~first | ~second).sum()
    return (both / one).item()


class Spread(NamedTuple):
    """Mean and sample standard deviation over crop sets that were drawn anew; std is NaN for a single one."""

    mean: float
    std: float


def spread(values: Sequence[float]) -> Spread:
    """The mean of the values and their standard deviation (n - 1 in the denominator)."""
    values = np.asarray(values, float)
    return Spread(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else float("nan"))


def percent(hits: Tensor) -> Spread:
    """Accuracy in percent, its mean and standard deviation over crop sets or seeds.

    Args:
        hits: (S, n) bool, of `correct`, a row a crop set or seed

    Example:
        >>> percent(torch.tensor([[True, False], [True, True]])).mean
        75.0
    """
    return spread([100 * hit.double().mean().item() for hit in hits])


def row(
    method: str,
    hits: Tensor,
    *,
    dataset: str,
    backbone: str,
    paper: str = "",
    table: str = "",
    setting: str = "zero-shot",
    metric: str = "top1",
) -> dict:
    """One line of `metrics.csv`, without the run's name.

    Args:
        method: as the papers call it
        hits: (S, n) or (n,) bool, for each crop set and image whether it is right
        dataset: the registry's name
        backbone: of the encoder
        paper: whose table the line belongs to
        table: of that paper
        setting: as in `published/*.csv`
        metric: as in `published/*.csv`
    """
    hits = torch.atleast_2d(hits)
    mean, std = spread([100 * h.double().mean().item() for h in hits])
    facts = (paper, table, method, dataset, backbone, setting, metric, mean, std, hits.shape[1])
    return dict(zip(COLUMNS, facts))
