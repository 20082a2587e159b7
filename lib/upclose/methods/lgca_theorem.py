"""LGCA's Theorem 1 counted and timed: encodings, similarity entries, comparisons, for Q and for LGCA_Q.

    N, M      crops an image, descriptions a class      T      steps, `lgca.steps(N)`
    Q         the non-expanding model: weights, then the cross-alignment matrix A and its sum
    LGCA_Q    Q inside the expansion steps; T times a sort of A's entries
    I, L      exponents: Q costs N^I M^L for one image and one class

Everything is for one image and one class unless it says otherwise.

Source: LGCA (arXiv 2511.00419), section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cmp_to_key
from math import log2
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student
from torch import Tensor

from upclose.features import Text, Views
from upclose.methods import lgca, wca


class Counts(NamedTuple):
    """What one image and one class cost; the M descriptions are encoded once in either model and are not counted.

    Attributes:
        encodings: crops encoded
        entries: of all cross-alignment matrices
        comparisons: between entries, to select the topK
    """

    encodings: float
    entries: float
    comparisons: float


class Fit(NamedTuple):
    """Exponents of seconds = constant * N^I * M^L, each with its 95 % interval (lower, upper)."""

    crops: float
    crops_interval: tuple[float, float]
    descriptions: float
    descriptions_interval: tuple[float, float]


def non_expanding(crops: int, descriptions: int) -> Counts:
    """Exact counts of Q."""
    return Counts(crops, crops * descriptions, 0)


def worst_case(crops: int, descriptions: int) -> Counts:
    """Upper bounds for LGCA_Q: |C^(j-1)| = floor(N / 2^(j-1)) in every step, n log2 n comparisons to sort n entries.

    Deviates:
        The proof sorts step j's entries at the price of floor(N / 2^j) M of them, the size of the set after the
        selection. The matrix that is sorted has the rows of the set before it, twice as many; `equation_9` is the
        printed term. The theorem's order is the same.
    """
    sizes = [crops >> j for j in range(lgca.steps(crops))]
    return Counts(sum(sizes), sum(sizes) * descriptions, sum(_sort(n * descriptions) for n in sizes))


def equation_9(crops: int, descriptions: int) -> Counts:
    """The terms of eq. 9 as printed, with I = L = 1 and logarithms to base 2."""
    before = [crops >> j for j in range(lgca.steps(crops))]
    after = [crops >> j for j in range(1, lgca.steps(crops) + 1)]
    return Counts(sum(before), sum(before) * descriptions, sum(_sort(n * descriptions) for n in after))


def count(ladder: Tensor, image: Tensor, label: Tensor, description: Tensor) -> tuple[float, list[Counts]]:
    """Run the naive algorithm of section 4 on one image and one class, and count what it does.

    Every step, the last one too, sorts its entries with Python's merge sort, whose comparisons are counted one by one.

    Args:
        ladder: (T, N, D) unit norm
        image: (D,)
        label: (D,)
        description: (M, D)

    Returns:
        Sim with alpha_j = 1/T, and the counts of each step
    """
    levels, crops, _ = ladder.shape
    v = (description @ label).softmax(0)
    members, similarity, steps = list(range(crops)), 0.0, []
    for t in range(levels):
        crop = ladder[t, members]
        a = (crop @ image).softmax(0)[:, None] * v * (crop @ description.mT)
        similarity += a.sum().item() / levels
        order, comparisons = _counted_sort(a.flatten().tolist())
        steps.append(Counts(len(members), a.numel(), comparisons))
        members = sorted({members[i // len(v)] for i in order[: max(1, crops >> (t + 1))]})
    return similarity, steps


def total(steps: Sequence[Counts]) -> Counts:
    """The sum over steps."""
    return Counts(*map(sum, zip(*steps)))


def q(views: Views, text: Text) -> Tensor:
    """Q as the theorem counts it: every entry of A is made, then summed. Equal to `wca.scores`, which makes none.

    Args:
        views: B images, N crops each
        text: C classes of M descriptions each

    Returns:
        (B, C); memory grows with B * C * N * M

    Raises:
        ValueError: classes with different numbers of descriptions
    """
    if len(text.counts.unique()) > 1:
        raise ValueError("the theorem has one M: give every class the same number of descriptions")
    batch, crops, _ = views.crop.shape
    a = (views.crop @ text.description.mT).view(batch, crops, len(text.label), -1)
    a = a * wca.image_weights(views)[:, :, None, None] * wca.text_weights(text).view(len(text.label), -1)
    return a.sum((1, 3))


def exponents(crops: Sequence[int], descriptions: Sequence[int], time: Sequence[float]) -> Fit:
    """Least squares of log(time) on log N and log M.

    Args:
        crops: N of each measurement, at least 4 of them, not all the same
        descriptions: M of each measurement, not all the same
        time: of each measurement, seconds

    Raises:
        ValueError: too few measurements to fit the exponents and their intervals
    """
    design = np.stack([np.ones(len(crops)), np.log(crops), np.log(descriptions)], 1)
    freedom = len(design) - 3
    if freedom < 1 or np.linalg.matrix_rank(design) < 3:
        raise ValueError(f"{len(design)} measurements cannot fit two exponents: vary N and M, at least 4 in all")
    target = np.log(time)
    value, *_ = np.linalg.lstsq(design, target, rcond=None)
    variance = np.square(target - design @ value).sum() / freedom
    half = student.ppf(0.975, freedom) * np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    low, high = value - half, value + half
    return Fit(value[1], (low[1], high[1]), value[2], (low[2], high[2]))


def encodings(selected: Tensor, classes: Sequence[int]) -> list[dict[str, float]]:
    """Crops encoded for an image as the number of classes grows: what the theorem leaves out.

    Args:
        selected: (B, C, T, N) bool, `lgca.trace`
        classes: numbers of classes, each at most C; the first ones are taken

    Returns:
        one row a number of classes: "classes"; "naive", each class encodes its own set at every step; "lazy", the
        pairs that some class selects, each once; "ladder", N * T. Means over the images

    Raises:
        ValueError: more classes than `selected` has
    """
    if max(classes) > selected.shape[1]:
        raise ValueError(f"{max(classes)} classes asked for, but `selected` has {selected.shape[1]}")
    return [
        {
            "classes": k,
            "naive": selected[:, :k].sum((1, 2, 3)).float().mean().item(),
            "lazy": selected[:, :k].any(1).sum((1, 2)).float().mean().item(),
            "ladder": selected.shape[2] * selected.shape[3],
        }
        for k in classes
    ]


def _sort(n: int) -> float:
    return n * log2(n)


def _counted_sort(values: list[float]) -> tuple[list[int], int]:
    """Indices from the largest value to the smallest, equal ones in order, and the comparisons that it took."""
    comparisons = 0

    def compare(i: int, j: int) -> int:
        nonlocal comparisons
        comparisons += 1
        return -1 if values[i] > values[j] else values[i] < values[j]

    return sorted(range(len(values)), key=cmp_to_key(compare)), comparisons
