"""LGCA, localized-globalized cross-alignment: select the salient crops, expand them, score again.

    i        (D,)       the whole image             l       (D,)     the class prompt
    c_s      (N, D)     crop s                      d_t     (M, D)   description t of the class
    w_s      (N,)       image weights, eq. 7        v_t     (M,)     text weights, eq. 8
    A        (N, M)     A[s, t] = w_s v_t (c_s . d_t), section 4.2
    Z                   the topK largest entries of A
    T                   steps; step j = 1..T scores ladder.crop[:, j - 1], the crops expanded j - 1 times
    alpha_j  (T,)       Sim(i, l) = sum_j alpha_j score_j, section 4.3

The expanded box of a crop does not depend on the class, so all classes share one ladder of N * T encodings; what a
class selects are members of {0..N-1}. After step j at most topK_j crops remain, so a class carries a short list of
crop numbers, and step j + 1 costs half of step j.

Source: Hieu et al. 2025, "LGCA: Enhancing Semantic Representation via Progressive Expansion" (arXiv 2511.00419).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import inf
from typing import Literal

import torch
from torch import Tensor

from upclose.crops import expand_boxes
from upclose.features import Ladder, Text
from upclose.methods import wca
from upclose.methods.entry import Method

ENTRIES = 2**21
"""Entries of A in a chunk of images and classes, 8 MB; about six numbers an entry are held at the peak."""

TopK = Literal["halving"] | int | Sequence[int]


def steps(crops: int) -> int:
    """The paper's T for N crops: the largest T with floor(N / 2^T) = 1, and 1 for N = 1 (section 4.3)."""
    return max(1, crops.bit_length() - 1)


def schedules(levels: int) -> dict[str, list[float]]:
    """Named weights alpha_j of so many steps; each sums to 1.

    Source:
        The paper "fine-tunes" alpha_j "for each experiment" (section 4.3) and prints none.
    """
    j = torch.arange(1, levels + 1, dtype=torch.float64)
    rows = {
        "uniform": torch.ones_like(j),
        "rising": j,
        "falling": j.flip(0),
        "halving": 0.5**j,
        "doubling": 2.0 ** (j - 1),
        **{f"step {t + 1} only": row for t, row in enumerate(torch.eye(levels, dtype=torch.float64))},
    }
    return {name: (row / row.sum()).tolist() for name, row in rows.items()}


def margin_boxes(box: Tensor, margin: float, steps: int, height: int, width: int) -> Tensor:
    """A ladder by the other reading of tau, a "margin": every expansion adds so many pixels to both sides.

    Args:
        box: (N, 4) square
        margin: pixels, at least 0
        steps: levels T, the first of which is `box` itself
        height: of the picture, pixels
        width: of the picture, pixels

    Returns:
        (T, N, 4) float32, not rounded; boxes that stick out are shifted inside, as in `crops.expand_boxes`

    Source:
        Section 4.2, "margin tau"; `crops.ladder_boxes` reads tau as a factor.
    """
    levels = [box.float()]
    for _ in range(steps - 1):
        factors = 1 + margin / (levels[-1][:, 2] - levels[-1][:, 0])
        grown = [expand_boxes(b, float(f), height, width) for b, f in zip(levels[-1], factors)]
        levels.append(torch.stack(grown))
    return torch.stack(levels)


def scores(
    ladder: Ladder,
    text: Text,
    *,
    alphas: Sequence[float] | Tensor | None = None,
    top_k: TopK = "halving",
    image_scale: float = 1.0,
    text_scale: float = 1.0,
) -> Tensor:
    """LGCA: Sim = sum_j alpha_j score_j over the T levels of a ladder.

    Args:
        ladder: image (B, D), crop (B, T, N, D), crop n expanded t times; the paper's T is max(1, floor(log2 N))
        text: C classes and their descriptions
        alphas: (T,) weights of the steps; None is 1/T each
        top_k: "halving" is topK_j = floor(N / 2^j); an int is the same topK at every step; a sequence gives T - 1
            values, one for each selection
        image_scale: multiplies cos(c_s, i) before the softmax; 0 is uniform, 1 is the paper
        text_scale: multiplies cos(d_t, l) before the softmax; 0 is uniform, 1 is the paper

    Returns:
        (B, C) float32, larger is better

    Raises:
        ValueError: shapes, `alphas` or `top_k` that do not fit the ladder

    Source:
        Sections 4.2 and 4.3. Memory beyond the inputs: the padded descriptions, (B, T, C) scores and a chunk of
        about six times `ENTRIES` numbers (a single image and class can exceed it when N * M does).

    Deviates:
        - Section 4.3 halves topK, section 6 says "the initial topK = 10" and not what follows it. Default: section 4.3.
          `top_k=10` keeps 10 at every step, `top_k=[10, 5, 2, ...]` halves from 10. topK is never below 1, and is all
          entries when fewer remain.
        - Ties in Z: the lower s * M + t first. The paper is silent.
        - alpha_j is "fine-tuned for each experiment"; the default is uniform.
        - Step T expands a last set that the paper never scores. A ladder of T + 1 levels scores it.
        - Two crops whose expanded boxes have become equal share one encoding and stay two members of the set, as two
          equal random crops would at step 1.
        - Re-weighting is eq. 7 over the crops that remain, at their new size; v_t never changes.

    Example:
        >>> ladder = Ladder(torch.eye(2)[:1], torch.eye(2).expand(1, 1, 2, 2))  # one step of two crops: WCA
        >>> text = Text.from_lists(torch.eye(2), list(torch.eye(2)[:, None]))
        >>> scores(ladder, text)
        tensor([[0.7311, 0.2689]])
    """
    levels = ladder.crop.shape[1]
    if alphas is None:
        alphas = [1 / levels] * levels
    if len(alphas) != levels:
        raise ValueError(f"{len(alphas)} alphas for a ladder of {levels} steps: give one a step, or None for 1/T each")
    alpha = torch.as_tensor(alphas, dtype=torch.float32, device=ladder.crop.device)
    each = step_scores(ladder, text, top_k=top_k, image_scale=image_scale, text_scale=text_scale)
    return torch.einsum("btc,t->bc", each, alpha)


def step_scores(
    ladder: Ladder,
    text: Text,
    *,
    top_k: TopK = "halving",
    image_scale: float = 1.0,
    text_scale: float = 1.0,
) -> Tensor:
    """score_j of every step: `scores` before the sum over j. Arguments as there.

    Returns:
        (B, T, C) float32
    """
    out = ladder.crop.new_empty(*ladder.crop.shape[:2], len(text.label), dtype=torch.float32)
    for b, c, t, score, _ in _chunks(ladder, text, top_k, image_scale, text_scale):
        out[b, t, c] = score
    return out


def survivors(
    ladder: Ladder,
    text: Text,
    *,
    top_k: TopK = "halving",
    image_scale: float = 1.0,
    text_scale: float = 1.0,
) -> Tensor:
    """The (step, crop) pairs that some class selects: what a lazy encoder would have to encode.

    Returns:
        (B, T, N) bool; step 0 is all True. Arguments as in `scores`
    """
    out = ladder.crop.new_zeros(ladder.crop.shape[:3], dtype=torch.bool)
    for b, _, t, _, member in _chunks(ladder, text, top_k, image_scale, text_scale):
        out[b, t] |= _mask(member, ladder.crop.shape[2]).any(1)
    return out


def lazy_ladder(encode: Callable[[int, Tensor], Tensor], image: Tensor, text: Text, crops: int, levels: int) -> Ladder:
    """One image's ladder with the crops alone that some class selects: its `scores` are those of the whole ladder.

    It saves encodings for these classes and the paper's topK (a third, with 37 classes and 100 crops that grow by 1.1);
    a whole ladder in the bank serves all classes and all settings.

    Args:
        encode: (step t from 0, crop numbers (k,)) -> (k, D) unit norm, the crops expanded t times
        image: (D,) unit norm
        text: C classes and their descriptions
        crops: N
        levels: T

    Returns:
        crop (1, T, N, D), zeros where no class looks, and the image; no boxes

    Raises:
        ValueError: on the CPU, a class without descriptions
    """
    ladder = Ladder(image[None], image.new_zeros(1, levels, crops, len(image)))
    wanted = torch.arange(crops, device=image.device)
    for t in range(levels):
        ladder.crop[0, t, wanted] = encode(t, wanted).to(image.dtype)
        if t + 1 < levels:
            chosen = survivors(ladder._replace(crop=ladder.crop[:, : t + 2]), text)
            wanted = chosen[0, t + 1].nonzero()[:, 0]
    return ladder


def trace(
    ladder: Ladder,
    text: Text,
    *,
    classes: Tensor | Sequence[int] | None = None,
    top_k: TopK = "halving",
    image_scale: float = 1.0,
    text_scale: float = 1.0,
) -> Tensor:
    """The crops that each class selects, for drawing and for counting.

    Args:
        ladder: image (B, D), crop (B, T, N, D), unit norm
        text: C classes and their descriptions
        classes: (K,) class numbers; None is all. Other classes do not matter to what a class selects
        top_k: as in `scores`
        image_scale: of eq. 7
        text_scale: of eq. 8

    Returns:
        (B, K, T, N) bool; step 0 is all True
    """
    if classes is not None:
        classes = torch.as_tensor(classes, device=text.owner.device)
        text = Text.from_lists(text.label[classes], [text.description[text.owner == c] for c in classes])
    batch, levels, crops, _ = ladder.crop.shape
    out = ladder.crop.new_zeros(batch, len(text.label), levels, crops, dtype=torch.bool)
    for b, c, t, _, member in _chunks(ladder, text, top_k, image_scale, text_scale):
        out[b, c, t] = _mask(member, crops)
    return out


def _chunks(
    ladder: Ladder, text: Text, top_k: TopK, image_scale: float, text_scale: float
) -> Iterator[tuple[slice, slice, int, Tensor, Tensor]]:
    """Walk chunks of images and classes; yields (images, classes, step, score (b, c), member (b, c, S))."""
    image, crop, _ = ladder
    if crop.ndim != 4 or image.shape != (crop.shape[0], crop.shape[3]) or 0 in crop.shape[1:3]:
        shapes = f"ladder.crop {tuple(crop.shape)}, ladder.image {tuple(image.shape)}"
        raise ValueError(f"{shapes}: expected (B, T, N, D) with T, N >= 1, and (B, D)")
    batch, levels, crops, _ = crop.shape
    sizes = _sizes(top_k, crops, levels)
    weighted = wca.text_weights(text, scale=text_scale)[:, None] * text.description
    row, real = text._replace(description=weighted).padded()
    entries = crops * row.shape[1]
    c_size = min(len(row), max(1, ENTRIES // entries))
    b_size = max(1, ENTRIES // (entries * c_size))
    for c in (slice(i, i + c_size) for i in range(0, len(row), c_size)):
        for b in (slice(i, i + b_size) for i in range(0, batch, b_size)):
            for t, (score, member) in enumerate(_walk(crop[b], image[b], row[c], real[c], sizes, image_scale)):
                yield b, c, t, score, member


def _sizes(top_k: TopK, crops: int, levels: int) -> list[int]:
    """topK_j for j = 1..T-1, the selections between T steps."""
    if top_k == "halving":
        return [max(1, crops >> j) for j in range(1, levels)]
    sizes = [top_k] * (levels - 1) if isinstance(top_k, int) else list(top_k)
    if len(sizes) != levels - 1 or not all(isinstance(k, int) and k >= 1 for k in sizes):
        raise ValueError(
            f'top_k={top_k!r} for a ladder of {levels} steps: choose "halving", an int >= 1, or {levels - 1} of them'
        )
    return sizes


def _walk(
    crop: Tensor, image: Tensor, row: Tensor, real: Tensor, sizes: list[int], image_scale: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """The expansion steps of b images and K classes.

    Args:
        crop: (b, T, N, D)
        image: (b, D)
        row: (K, M, D) the weighted descriptions v_t d_t, padded with zeros
        real: (K, M) bool, False on padding
        sizes: topK_j of the T - 1 selections
        image_scale: of eq. 7

    Yields:
        score_j (b, K) and member (b, K, S): the crop numbers of the set, ascending, then N in empty places
    """
    batch, levels, crops, _ = crop.shape
    classes = len(row)
    member = torch.arange(crops, device=crop.device).expand(batch, classes, crops)
    first = torch.arange(batch, device=crop.device)[:, None, None] * crops
    column = torch.arange(classes, device=crop.device)[:, None]
    for t, level in enumerate(crop.unbind(1)):
        last = t + 1 == levels
        if last:
            row = row.sum(1, keepdim=True)  # nothing is selected after the last step: sum_t v_t d_t is all it needs
        empty = member == crops
        index = member.clamp(max=crops - 1)

        cosine = image_scale * torch.einsum("bd,bnd->bn", image, level)
        w = cosine[:, None].expand(-1, classes, -1).gather(-1, index).masked_fill(empty, -inf).softmax(-1)  # eq. 7
        table = (level @ row.flatten(0, 1).mT).view(batch * crops * classes, -1)  # of all crops, then of the members:
        a = table.index_select(0, ((first + index) * classes + column).flatten()).view(*index.shape, -1)
        yield (w * a.sum(-1)).sum(-1), member

        if not last:
            bar = torch.zeros_like(w).masked_fill(empty, -inf)
            a = torch.addcmul(bar[..., None], w[..., None], a).masked_fill_(~real[:, None], -inf)
            size = min(sizes[t], a.shape[-2] * a.shape[-1])
            member = member.masked_fill(~_occurs(a, size), crops).sort(-1).values[..., :size]


def _occurs(a: Tensor, size: int) -> Tensor:
    """Which rows s of A (..., S, M) occur in Z, the `size` largest entries, ties by lower s * M + t: (..., S) bool."""
    top = a.flatten(-2).topk(size, sorted=False).values
    least = top.amin(-1, keepdim=True)
    tied = (a == least[..., None]).sum(-1)
    room = (top == least).sum(-1, keepdim=True)  # of the tied entries, the first `room` are in Z
    return (a.amax(-1) > least) | ((tied > 0) & (tied.cumsum(-1) - tied < room))


def _mask(member: Tensor, crops: int) -> Tensor:
    """Crop numbers (..., S), `crops` where empty, as a mask (..., N)."""
    mask = torch.zeros(*member.shape[:-1], crops + 1, dtype=torch.bool, device=member.device)
    return mask.scatter(-1, member, True)[..., :crops]


METHODS = (
    Method(
        "LGCA",
        scores,
        ("ladder", "descriptions"),
        "#029e73",
        lambda crops: 1 + crops * max(1, crops.bit_length() - 1),  # the paper's T levels
    ),
)
