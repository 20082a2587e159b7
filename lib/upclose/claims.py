"""Claims and their verdicts: "A beats B by more than d on this data"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile, zip_longest
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor

RESAMPLES = 10_000
VERDICTS = ("holds", "fails", "equal", "undecided")


class Claim(NamedTuple):
    """A claim, tested.

    Attributes:
        name: short, "C1"
        text: what is claimed
        difference, low, high: of the accuracies and its 95 % interval, in points
        margin: d, in points
        n: images
        sets: crop sets
        p: two-sided, of "the difference is the margin"; below 0.05 where the interval leaves the margin out
        equal_within: a difference from the margin, in points, that does not matter
    """

    name: str
    text: str
    difference: float
    low: float
    high: float
    margin: float
    n: int
    sets: int
    p: float = float("nan")
    equal_within: float = 1.0

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`.

        The claim holds when the interval lies above the margin, fails when below, is "equal" when all of it is within
        `equal_within` of a margin that it contains, else undecided. The interval has 95 %, so that "equal" is said of
        a difference that matters in 2.5 % at most.
        """
        if self.low > self.margin or self.high < self.margin:
            return "holds" if self.low > self.margin else "fails"
        near = max(self.high - self.margin, self.margin - self.low) <= self.equal_within
        return "equal" if near else "undecided"

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
    return _bootstrap(*_gaps(better, worse), resamples, seed)[:3]


def _gaps(better: Tensor, worse: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The different gaps of images, in points, and how many images have each."""
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
    return np.unique(gap.round(9), return_counts=True)


def _bootstrap(
    values: np.ndarray, counts: np.ndarray, resamples: int, seed: int
) -> tuple[float, float, float, np.ndarray]:
    """As `interval`, from the gaps of images, and the difference in every resample, (resamples,)."""
    n = counts.sum()
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, resamples)  # (R, K): n images drawn again
    means = drawn @ values / n
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values @ counts / n), float(low), float(high), means


def check(
    name: str,
    text: str,
    better: Tensor,
    worse: Tensor,
    margin: float = 0.0,
    seed: int = 0,
    equal_within: float = 1.0,
) -> Claim:
    """Decide a claim, that `better` minus `worse` is more than `margin`: see `Claim.verdict`.

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
    sets = max(len(torch.atleast_2d(torch.as_tensor(hit))) for hit in (better, worse))
    return _decide(name, text, *_gaps(better, worse), sets, margin, seed, equal_within)


def _decide(
    name: str,
    text: str,
    values: np.ndarray,
    counts: np.ndarray,
    sets: int,
    margin: float = 0.0,
    seed: int = 0,
    equal_within: float = 1.0,
) -> Claim:
    """`check`, from the gaps of images."""
    difference, low, high, drawn = _bootstrap(values, counts, RESAMPLES, seed)
    p = min(1.0, 2 * (1 + min((drawn <= margin).sum(), (drawn >= margin).sum())) / (1 + len(drawn)))
    return Claim(name, text, difference, low, high, margin, int(counts.sum()), sets, float(p), equal_within)


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


def table(claims: Sequence[Claim], unit: str = "crop set") -> pd.DataFrame:
    """The claims with what it took to decide them, one a line.

    Args:
        claims: all claims of a notebook, tested
        unit: what each image was measured several times over, in the singular

    Returns:
        claim, text, verdict
        difference: with its interval, in words
        margin, half-width: in points
        n: images and crop sets, in words
        images to halve it: the half-width; in all
        after Holm: "stands" where a claim holds or fails at 5 % among all of them
    """
    corrected = holm([c.p for c in claims])
    decided = [c.verdict in ("holds", "fails") and p < 0.05 for c, p in zip(claims, corrected)]
    return pd.DataFrame(
        {
            "claim": [c.name for c in claims],
            "text": [c.text for c in claims],
            "verdict": [c.verdict for c in claims],
            "difference": [f"{c.difference:+.1f} [{c.low:+.1f}, {c.high:+.1f}]" for c in claims],
            "margin": [c.margin for c in claims],
            "half-width": [round(c.half_width, 1) for c in claims],
            "n": [f"{c.n} images x {c.sets} {unit}{'s' * (c.sets > 1)}" for c in claims],
            "images to halve it": [4 * c.n for c in claims],
            "after Holm": ["stands" if stands else "" for stands in decided],
        }
    )


def grouped(claims: Sequence[Claim]) -> dict[str, list[Claim]]:
    """The claims by the first word of their names, under it and the words with which all their texts begin.

    Example:
        >>> worlds = [Claim(f"C1 {w}", f"A > B, {w}", 2, 1, 3, 0, 9, 3) for w in ("photo", "sketch")]
        >>> {said: [c.name for c in members] for said, members in grouped(worlds).items()}
        {'C1 A > B': ['C1 photo', 'C1 sketch']}
    """
    groups: dict[str, list[Claim]] = {}
    for claim in claims:
        groups.setdefault(claim.name.split(" ")[0], []).append(claim)
    return {f"{number} {_in_common([c.text for c in members])}".strip(): members for number, members in groups.items()}


def _in_common(texts: Sequence[str]) -> str:
    """The words with which all texts begin, without the stop after them."""
    words = takewhile(lambda word: len(set(word)) == 1, zip_longest(*(text.split(" ") for text in texts)))
    return " ".join(word[0] for word in words).rstrip(",:;")


def count(claims: Sequence[Claim]) -> str:
    """How many claims there are, of which verdict, and how many of these stand after Holm's correction, in words."""
    frame = table(claims)
    said = []
    for verdict, word in zip(VERDICTS, ("hold", "fail", "equal", "undecided")):
        rows = frame[frame.verdict == verdict]
        standing = f" ({(rows['after Holm'] == 'stands').sum()} after Holm)" if verdict in ("holds", "fails") else ""
        said += [f"{len(rows)} {word}{standing}"] if len(rows) else []
    return f"{len(claims)} claims: {', '.join(said)}"


# -------------------------------------------------------------------------------------------- method against method


def pairs(hits: Mapping[str, Tensor], **facts: str) -> pd.DataFrame:
    """What a paired test of every two methods needs, and nothing more: a line a pair, whatever the number of images.

    Args:
        hits: {method: (S, n) bool}, as in `interval`, best first; a method without crops may have S = 1
        facts: columns that stand before, such as dataset="cub"

    Returns:
        The facts, "method", "rival" (each pair once, in the order of `hits`) and "gaps", 2 S + 1 numbers with spaces
        between: how many images the method gets right in -S, ..., S crop sets more than the rival does

    Raises:
        ValueError: as `interval`

    Example:
        >>> pairs({"A": torch.tensor([True, True, False]), "B": torch.tensor([True, False, False])}).gaps[0]
        '0 2 1'
    """
    sets = max((len(torch.atleast_2d(hit)) for hit in hits.values()), default=1)
    rows, names = [], list(hits)
    for k, method in enumerate(names):
        for rival in names[k + 1 :]:
            values, counts = _gaps(hits[method], hits[rival])
            places = (values * sets / 100).round().astype(int) + sets
            gaps = np.bincount(places, counts, 2 * sets + 1).astype(int)
            rows.append((*facts.values(), method, rival, " ".join(map(str, gaps))))
    return pd.DataFrame(rows, columns=[*facts, "method", "rival", "gaps"])


def matrix(pairs: pd.DataFrame) -> pd.DataFrame:
    """A paired test of every two methods, with Holm's correction over all pairs that share their facts.

    Args:
        pairs: from `pairs`, or several of them with the same columns below each other

    Returns:
        The lines of `pairs`, with in place of "gaps": "difference" (method minus rival), "low" and "high" in points as
        `interval` gives them, "p", "p after Holm", "n" images and "sets"

    Raises:
        ValueError: gaps that are not as `pairs` writes them; names the pair
    """
    facts = [column for column in pairs if column not in ("method", "rival", "gaps")]
    tests = pd.DataFrame([_tested(line) for line in pairs.to_dict("records")], index=pairs.index)
    found = pairs.drop(columns="gaps").join(tests)
    groups = found.groupby(facts, sort=False) if facts else [("", found)]
    corrected = [pd.Series(holm(group.p.tolist()), group.index) for _, group in groups]
    return found.assign(**{"p after Holm": pd.concat(corrected) if corrected else []})


def _tested(line: Mapping[str, str]) -> dict[str, float]:
    counts = np.array([int(count) if count.isdigit() else -1 for count in str(line["gaps"]).split(" ")])
    if len(counts) % 2 == 0 or (counts < 0).any() or counts.sum() == 0:
        raise ValueError(
            f"the gaps of {line['method']} and {line['rival']} are {line['gaps']!r}, not an odd number of counts"
        )
    sets = len(counts) // 2
    values = (100 * np.arange(-sets, sets + 1) / max(sets, 1)).round(9)
    there = counts > 0
    test = _decide("", "", values[there], counts[there], sets)
    return {"difference": test.difference, "low": test.low, "high": test.high, "p": test.p, "n": test.n, "sets": sets}


def square(matrix: pd.DataFrame, column: str = "difference") -> pd.DataFrame:
    """One matrix as a square: row minus column, NaN on the diagonal.

    Args:
        matrix: from `matrix`, the lines of one set of facts
        column: "difference", which changes its sign below the diagonal, or another, which does not
    """
    names = list(dict.fromkeys([*matrix.method, *matrix.rival]))
    above = matrix.pivot(index="method", columns="rival", values=column).reindex(index=names, columns=names)
    return above.combine_first(-above.T if column == "difference" else above.T).loc[names, names]


def same_sign(matrix: pd.DataFrame) -> pd.Series:
    """On how many backbones a difference has the sign that it has on most.

    Args:
        matrix: from `matrix`, with a column "backbone"

    Returns:
        A text a line, "2 of 3"; a difference of zero has no sign
    """
    turned = matrix.method > matrix.rival  # one run has "A, B", another "B, A"
    pair = matrix.method.where(~turned, matrix.rival), matrix.rival.where(~turned, matrix.method)
    alike = [matrix[column] for column in matrix.loc[:, :"rival"] if column not in ("backbone", "method", "rival")]
    alike += pair
    difference = matrix.difference.where(~turned, -matrix.difference)
    above, below = ((difference * sign > 0).groupby(alike).transform("sum") for sign in (1, -1))
    total = matrix.difference.groupby(alike).transform("size")
    return np.maximum(above, below).astype(str) + " of " + total.astype(str)


def concordance(values: np.ndarray) -> np.ndarray | float:
    """Kendall's W: how far m judges rank k things alike, from 0 (not at all) to 1 (all the same).

    Ranks that have nothing to do with each other give 1 / m in the mean, two judges that contradict each other 0.

    Args:
        values: (..., m, k), larger is better; of equal values each has the mean of their ranks

    Returns:
        (...), NaN where every judge finds all things equal

    Source:
        Kendall and Smith 1939, "The problem of m rankings"; with Kendall's correction for ties.
    """
    values = np.asarray(values, float)
    m, k = values.shape[-2:]
    spread = rankdata(values, axis=-1).sum(-2).var(-1) * k  # of the sums of ranks
    alike = (values[..., :, None] == values[..., None, :]).sum(-1)  # the t of a tie stand here t times
    ties = (alike**2 - 1).sum((-1, -2))  # t^3 - t a tie
    with np.errstate(invalid="ignore"):
        return 12 * spread / (m**2 * (k**3 - k) - m * ties)


def ranks_alike(
    judges: Sequence[Mapping[str, Tensor]], resamples: int = RESAMPLES // 5, seed: int = 0
) -> tuple[float, float, float]:
    """Kendall's W of the ranks that several encoders give the same methods, with a 95 % interval over images.

    A resample draws the images again, the same for all encoders. It ranks methods that are nearly equal by chance, so
    that the interval lies rather low: methods that differ by less than the images tell apart have no rank.

    Args:
        judges: one an encoder, {method: (S, n) bool} of the same methods and images
        resamples: of the bootstrap
        seed: of the bootstrap

    Returns:
        W, lower and upper end

    Raises:
        ValueError: fewer than two encoders, or other methods or images
    """
    names = list(judges[0]) if judges else []
    if len(judges) < 2 or any(set(judge) != set(names) for judge in judges):
        raise ValueError(f"ranks are compared of the same methods on two encoders or more, not on {len(judges)}")
    rows = [[torch.atleast_2d(judge[name]).double().mean(0).numpy() for name in names] for judge in judges]
    if len({len(row) for judge in rows for row in judge}) > 1:
        raise ValueError("ranks are compared on the same images: the encoders have different numbers of them")
    right = np.array(rows)  # (m, k, n)
    n = right.shape[2]
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples)  # (R, n)
    drawn = np.moveaxis(right @ weights.T, -1, 0).round(9)  # (R, m, k)
    low, high = np.nanquantile(concordance(drawn), [0.025, 0.975])
    return float(concordance(right.sum(2).round(9))), float(low), float(high)
