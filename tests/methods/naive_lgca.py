"""LGCA written straight from the equations: one image, one class, one step at a time, with its own expansion."""

from collections.abc import Callable, Sequence
from math import floor

import torch
from torch import Tensor


def expand(box: Sequence[float], factor: float, height: int, width: int, boundary: str = "shift") -> list[float]:
    """One expansion about the centre by `factor`: "shift" moves it back inside, "clip" cuts off what sticks out."""
    x0, y0, x1, y1 = box
    w, h = factor * (x1 - x0), factor * (y1 - y0)
    left, top = (x0 + x1) / 2 - w / 2, (y0 + y1) / 2 - h / 2
    if boundary == "clip":
        return [max(left, 0), max(top, 0), min(left + w, width), min(top + h, height)]
    w, h = min(w, width), min(h, height)
    left, top = (x0 + x1) / 2 - w / 2, (y0 + y1) / 2 - h / 2
    left, top = min(max(left, 0), width - w), min(max(top, 0), height - h)
    return [left, top, left + w, top + h]


def pair(
    embed: Callable[[int, int], Tensor],
    crops: int,
    steps: int,
    image: Tensor,
    label: Tensor,
    description: Tensor,
    alphas: Sequence[float] | None = None,
    top_k: Sequence[int] | None = None,
    image_scale: float = 1.0,
    text_scale: float = 1.0,
) -> tuple[Tensor, list[list[int]]]:
    """Sim(i, l) and the sets C^(0), .., C^(T-1) for one image and one class.

    Args:
        embed: (crop number s, expansions t) -> (D,) unit norm
        crops: N
        steps: T
        image, label: (D,)
        description: (M, D)
        alphas: T weights; None is 1/T
        top_k: topK_j for j = 1..T; None is floor(N / 2^j), at least 1
    """
    v = torch.exp(text_scale * (description @ label))
    v = v / v.sum()  # eq. 8
    members, sets, similarity = list(range(crops)), [], 0.0
    for j in range(1, steps + 1):
        sets.append(members)
        c = torch.stack([embed(s, j - 1) for s in members])
        w = torch.exp(image_scale * (c @ image))
        w = w / w.sum()  # eq. 7
        a = w[:, None] * v[None, :] * (c @ description.T)
        similarity = similarity + (1 / steps if alphas is None else alphas[j - 1]) * a.sum()
        k = max(1, floor(crops / 2**j)) if top_k is None else top_k[j - 1]
        z = a.flatten().sort(descending=True, stable=True).indices[:k]
        members = sorted({members[i // len(description)] for i in z.tolist()})
    return similarity, sets


def scores(ladder: Tensor, image: Tensor, text, **options) -> tuple[Tensor, Tensor]:
    """Sim (B, C) and the selected sets as masks (B, C, T, N), by loops over images and classes."""
    batch, steps, crops, _ = ladder.shape
    similarity = torch.zeros(batch, len(text.label), dtype=ladder.dtype)
    selected = torch.zeros(batch, len(text.label), steps, crops, dtype=torch.bool)
    for b in range(batch):
        for c in range(len(text.label)):
            description = text.description[text.owner == c]
            similarity[b, c], sets = pair(
                lambda s, t, b=b: ladder[b, t, s], crops, steps, image[b], text.label[c], description, **options
            )
            for t, members in enumerate(sets):
                selected[b, c, t, members] = True
    return similarity, selected
