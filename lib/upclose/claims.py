"""Claims and their verdicts: "A beats B by more than d on this data"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

RESAMPLES = 10_000


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
        p: two-sided, of "the difference is the margin"; below 0.05 where the interval leaves the margin out
        equal_within: a difference from the margin, in points, that does not matter
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
    p: float = float("nan")
    equal_within: float = 1.0

    @property
    def decided(self) -> str:
        """The verdict, or "equal" of one that is undecided with its whole interval within `equal_within` of the margin.

        The interval has 95 %, so that "equal" is said of a difference that matters in 2.5 % at most.
        """
        near = max(self.high - self.margin, self.margin - self.low) <= self.equal_within
        return "equal" if self.verdict == "undecided" and near else self.verdict

    @property
    def half_width(self) -> float:
        """Of the interval, in points; four times the images halve it."""
        return (self.high - self.low) / 2


def interval(better: Tensor, worse: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float, float]:
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
    return _bootstrap(better, worse, resamples, seed)[:3]


def _bootstrap(better: Tensor, worse: Tensor, resamples: int, seed: int) -> tuple[float, float, float, np.ndarray]:
    """As `interval`, and the difference in every resample, (resamples,)."""
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
    means = drawn @ values / n
    low, high = np.quantile(means, [0.025, 0.975])
    return float(gap.mean()), float(low), float(high), means


def check(
    name: str,
    text: str,
    better: Tensor,
    worse: Tensor,
    margin: float = 0.0,
    seed: int = 0,
    equal_within: float = 1.0,
) -> Claim:
    """Decide a claim.

    It holds when the interval of `better` minus `worse` lies above `margin`, fails when below, else it is undecided;
    `Claim.decided` says of an undecided one whether it is "equal".

    Args:
        name: "C1"
        text: what is claimed
        better: (S, n) bool, as in `interval`
        worse: (S, n) bool
        margin: d, in points
        seed: of the bootstrap
        equal_within: a difference from the margin, in points, that does not matter

    Example:
        >>> better = torch.tensor([[True] * 90 + [False] * 10] * 3)  # three crop sets, 100 images
        >>> check("C1", "A beats B", better, ~better).verdict
        'holds'
    """
    difference, low, high, drawn = _bootstrap(better, worse, RESAMPLES, seed)
    verdict = "holds" if low > margin else "fails" if high < margin else "undecided"
    p = min(1.0, 2 * (1 + min((drawn <= margin).sum(), (drawn >= margin).sum())) / (1 + len(drawn)))
    shape = torch.atleast_2d(torch.as_tensor(better)).shape, torch.atleast_2d(torch.as_tensor(worse)).shape
    sets = max(shape[0][0], shape[1][0])
    return Claim(name, text, verdict, difference, low, high, margin, shape[0][1], sets, float(p), equal_within)


def holm(p: Sequence[float]) -> list[float]:
    """P values corrected for being several, by Holm's rule: the k-th smallest of m is multiplied by m - k + 1.

    Args:
        p: of m tests, in any order

    Returns:
        In the same order, at most 1 and in the order of p

    Source:
        Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    order = np.argsort(p)
    corrected = np.maximum.accumulate(np.asarray(p, float)[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return corrected[np.argsort(order)].tolist()


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


def table(claims: list[Claim], unit: str = "crop set") -> pd.DataFrame:
    """The ledger with what it takes to decide: "equal" as a verdict, the power, and Holm's correction over all claims.

    Args:
        claims: all claims of a notebook, tested
        unit: as in `ledger`

    Returns:
        The columns of `ledger`, of which "verdict" is `Claim.decided`, and
        half-width: of the interval, in points
        images to halve it: in all
        after Holm: "stands" where a claim holds or fails at 5 % among all of them
    """
    corrected = holm([c.p for c in claims])
    return ledger(claims, unit).assign(
        **{
            "verdict": [c.decided for c in claims],
            "half-width": [round(c.half_width, 1) for c in claims],
            "images to halve it": [4 * c.n for c in claims],
            "after Holm": [
                "stands" if c.verdict in ("holds", "fails") and p < 0.05 else "" for c, p in zip(claims, corrected)
            ],
        }
    )


def count(claims: list[Claim]) -> str:
    """How many claims there are, of which verdict, and how many of these stand after Holm's correction, in words."""
    frame = table(claims)
    said = []
    for verdict, word in (("holds", "hold"), ("fails", "fail"), ("equal", "equal"), ("undecided", "undecided")):
        rows = frame[frame.verdict == verdict]
        standing = f" ({(rows['after Holm'] == 'stands').sum()} after Holm)" if verdict in ("holds", "fails") else ""
        said += [f"{len(rows)} {word}{standing}"] if len(rows) else []
    return f"{len(claims)} claims: {', '.join(said)}"
