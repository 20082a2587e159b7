"""Pointing: does an attribute's mass lie on the crops that show the part it names?

    mass     (..., N, M)  on crop n for attribute m: a transport plan, or any weights of crops
    inside   (..., N, M)  bool, crop n shows the part that attribute m names
    share    (..., M)     sum_n mass * inside / sum_n mass; under uniform mass this is chance, the share of such crops

No paper measures this: it needs the true boxes of the parts, which Birdlets has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor


def part_boxes(parts: Sequence[Mapping[str, Sequence[float]]], names: Sequence[str | None]) -> Tensor:
    """The boxes that a class's attributes name, image by image.

    Args:
        parts: for each of B images, part -> (x0, y0, x1, y1) in pixels
        names: for each of M attributes the part it names, None for an attribute that names none

    Returns:
        (B, M, 4) float32, NaN where there is no such part
    """
    nowhere = (float("nan"),) * 4
    rows = [[tuple(have.get(name, nowhere)) for name in names] for have in parts]
    return torch.tensor(rows, dtype=torch.float32).view(len(parts), len(names), 4)


def contains(box: Tensor, part: Tensor, least: float = 0.6) -> Tensor:
    """Which crops show which parts. Exact for whole pixels, also at exactly `least` of a part.

    Args:
        box: (..., N, 4) of the crops, x0, y0, x1, y1
        part: (..., M, 4) of the parts in the same pixels, NaN for a part that is not there
        least: share of the part's box that a crop must hold; 0.6 is where birdlets-tiny's training captions name a part

    Returns:
        (..., N, M) bool, False for parts that are not there

    Raises:
        ValueError: boxes without four numbers, `least` outside (0, 1]
    """
    for name, value in (("box", box), ("part", part)):
        if value.shape[-1] != 4:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: its last dimension must be x0, y0, x1, y1")
    if not 0 < least <= 1:
        raise ValueError(f"least is {least}: give a share of the part above 0 and at most 1")
    box, part, ratio = box.double(), part.double(), Fraction(least).limit_denominator(10**6)
    near = torch.maximum(box[..., :, None, :2], part[..., None, :, :2])
    far = torch.minimum(box[..., :, None, 2:], part[..., None, :, 2:])
    shown = (far - near).clamp(min=0).prod(-1)
    whole = (part[..., 2:] - part[..., :2]).prod(-1)[..., None, :]
    return (shown > 0) & (ratio.denominator * shown >= ratio.numerator * whole)


def share(mass: Tensor, inside: Tensor) -> Tensor:
    """The share of each attribute's mass that lies on crops that show its part.

    Args:
        mass: (..., N, M) at least 0, of any total; its batch dimensions and those of `inside` broadcast
        inside: (..., N, M) bool, from `contains`

    Returns:
        (..., M) in 0 to 1; NaN where no crop or every crop shows the part, since nothing could be pointed at wrongly or
        rightly there, and where an attribute has no mass

    Example:
        >>> inside = torch.tensor([[True], [False]])  # crop 0 shows the part
        >>> share(torch.tensor([[0.8], [0.2]]), inside).tolist()
        [0.800000011920929]
    """
    told = inside.any(-2) & ~inside.all(-2)
    return torch.where(told, (mass * inside).sum(-2) / mass.sum(-2), torch.nan)


def shuffled(box: Tensor, generator: torch.Generator) -> Tensor:
    """The same boxes dealt anew to the crops of each image: with them every mass must point as uniform mass does.

    Args:
        box: (B, N, 4)
        generator: on the CPU

    Returns:
        (B, N, 4)
    """
    order = torch.rand(box.shape[:2], generator=generator).argsort(1).to(box.device)
    return box.gather(1, order[..., None].expand_as(box))
