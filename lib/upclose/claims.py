"""Claims and their verdicts: "A beats B by more than d on this data"."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor


class Claim(NamedTuple):
    """A claim, tested.

    Attributes:
        name: short, "C1"
        text: what is claimed
        verdict: "holds" | "fails" | "undecided"
        difference, low, high: of the accuracies and its 95 % interval, in points
        margin: d, in points
        n: images
        sets: crop sets
    """

    name: str
    text: str
    verdict: str
    difference: float
    low: float
    high: float
    margin: float
    n: int
    sets: int


def interval(better: Tensor, worse: Tensor, resamples: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """The difference of two accuracies with a 95 % interval, in points.

    A paired bootstrap: each resample draws the images again, every image with all of its crop sets, for they are
    nested in it: crops are drawn anew for each image and set, so that images are the independent units. Both methods
    are always compared on the same images and the same crop sets. An image's mean gap takes few distinct values, and
    the resamples are drawn as counts of those.

    Args:
        better: (S, n) or (n,) bool, for each crop set and image whether the first method is right
        worse: the same for the second; a method without crops may have S = 1
        resamples: of the bootstrap
        seed: of the bootstrap

    Returns:
        difference, lower and upper end

    Raises:
        ValueError: the two were not measured on the same number of images, or on different numbers of crop sets
    """
    first, second = (torch.atleast_2d(torch.as_tensor(x)).double() for x in (better, worse))
    if first.shape[1] != second.shape[1] or min(first.shape[1], second.shape[1]) == 0:
        raise ValueError(
            f"a paired test needs the same images: one method has {first.shape[1]}, the other {second.shape[1]}"
        )
    if len(first) != len(second) and 1 not in (len(first), len(second)):
        raise ValueError(
            f"a paired test needs the same crop sets: one method has {len(first)}, the other {len(second)}"
        )
    gap = 100 * (first - second).numpy().mean(0)  # (n,), broadcast where one method draws no crops
    values, counts = np.unique(gap.round(9), return_counts=True)
    n = len(gap)
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, resamples)  # (R, K): n images drawn again
    low, high = np.quantile(drawn @ values / n, [0.025, 0.975])
    return float(gap.mean()), float(low), float(high)


def check(name: str, text: str, better: Tensor, worse: Tensor, margin: float = 0.0, seed: int = 0) -> Claim:
    """Decide a claim.

    It holds when the interval of `better` minus `worse` lies above `margin`, fails when below, else it is undecided.

    Args:
        name: "C1"
        text: what is claimed
        better: (S, n) bool, as in `interval`
        worse: (S, n) bool
        margin: d, in points
        seed: of the bootstrap

    Example:
        >>> better = torch.tensor([[True] * 90 + [False] * 10] * 3)  # three crop sets, 100 images
        >>> check("C1", "A beats B", better, ~better).verdict
        'holds'
    """
    difference, low, high = interval(better, worse, seed=seed)
    verdict = "holds" if low > margin else "fails" if high < margin else "undecided"
    shape = torch.atleast_2d(torch.as_tensor(better)).shape, torch.atleast_2d(torch.as_tensor(worse)).shape
    sets = max(shape[0][0], shape[1][0])
    return Claim(name, text, verdict, difference, low, high, margin, shape[0][1], sets)


def ledger(claims: list[Claim], unit: str = "crop set") -> pd.DataFrame:
    """The claims as a table, one a line, with the interval in words.

    Args:
        claims: the claims, tested
        unit: what each image was measured several times over, in the singular
    """
    return pd.DataFrame(
        {
            "claim": [c.name for c in claims],
            "text": [c.text for c in claims],
            "verdict": [c.verdict for c in claims],
            "difference": [f"{c.difference:+.1f} [{c.low:+.1f}, {c.high:+.1f}]" for c in claims],
            "margin": [c.margin for c in claims],
            "n": [f"{c.n} images x {c.sets} {unit}{'s' * (c.sets > 1)}" for c in claims],
        }
    )
