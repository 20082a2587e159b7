"""Strong augmentation of whole batches where the encoder is: RandomResizedCrop, horizontal flip, RandAugment.

What is drawn depends on (seed, key) alone and is drawn on the host; nothing is read back from the device. The crop is
`crops`' own. The five operations that move pixels are one nearest-neighbour lookup for all pictures of a batch; the
others are torchvision's, each on the pictures that drew it.

Source:
    Cubuk et al., "RandAugment", 2020; operations and strengths are torchvision's, `v2.RandAugment`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, grid_sample
from torchvision.transforms.v2 import functional as F

from upclose import crops, seeds

LEVEL = 9 / 30  # magnitude 9 of 31 bins
SLOTS = 2  # operations a picture
MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
COLOURS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "Brightness": lambda x, sign: F.adjust_brightness(x, 1 + sign * 0.9 * LEVEL),
    "Color": lambda x, sign: F.adjust_saturation(x, 1 + sign * 0.9 * LEVEL),
    "Contrast": lambda x, sign: F.adjust_contrast(x, 1 + sign * 0.9 * LEVEL),
    "Sharpness": lambda x, sign: _sharpened(x, 1 + sign * 0.9 * LEVEL),
    "Posterize": lambda x, sign: F.posterize(x, 8 - round(4 * LEVEL)),
    "Solarize": lambda x, sign: F.solarize(x, 255 * (1 - LEVEL)),
    "AutoContrast": lambda x, sign: F.autocontrast(x),
    "Equalize": lambda x, sign: F.equalize(x),
}
OPERATIONS = ("Identity", *MOVES, *COLOURS)


class Draw(NamedTuple):
    """What one picture draws.

    Attributes:
        box: (4,) float32, 8 to 100 % of the area
        flip: left to right
        operations: `SLOTS` of `OPERATIONS` with their signs, +1 or -1
    """

    box: Tensor
    flip: bool
    operations: tuple[tuple[str, int], ...]


def draw(height: int, width: int, seed: int, key: str) -> Draw:
    """The strong view of a picture of this size and key.

    Args:
        height: of the picture, pixels
        width: of the picture, pixels
        seed: of the epoch
        key: of the picture
    """
    random = seeds.rng(seed, "augment", key)
    flip, signs = random.random() < 0.5, np.where(random.random(SLOTS) < 0.5, -1, 1)
    names = random.integers(len(OPERATIONS), size=SLOTS)
    box = crops.sample_area_boxes(height, width, 1, (0.08, 1.0), seed, key)[0]
    return Draw(box, bool(flip), tuple((OPERATIONS[name], int(sign)) for name, sign in zip(names, signs)))


def views(pictures: Sequence[Tensor], keys: Sequence[str], size: int, seed: int, device: torch.device) -> Tensor:
    """A(x) of a batch.

    Args:
        pictures: B, uint8 (3, H, W) of any sizes, on the host or the device
        keys: of the pictures
        size: side S of the result
        seed: of the epoch
        device: of the result

    Returns:
        uint8 (B, 3, S, S)

    Deviates:
        Torchvision draws an aspect until the crop fits; see `crops.sample_area_boxes`.
    """
    draws = [draw(*picture.shape[1:], seed, key) for picture, key in zip(pictures, keys)]
    if crops.has_kernels(device):
        box, owner = np.stack([each.box.numpy() for each in draws]).astype(np.int64), np.arange(len(pictures))
        x = crops.cut(pictures, owner, crops.crop_view(box, size), device, size, torch.uint8, crops.MEAN, crops.STD)
    else:
        box = torch.stack([each.box[None] for each in draws])
        x = crops.extract([picture.to(device) for picture in pictures], box, size, torch.uint8)[:, 0]
    return augment(x, draws)


def augment(x: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Flip and RandAugment of uint8 (B, 3, S, S), one draw a picture."""
    size = x.shape[-1]
    moves = [[_inverse(*each.operations[k], size, each.flip and k == 0) for each in draws] for k in range(SLOTS)]
    groups: list[dict] = [defaultdict(list) for _ in range(SLOTS)]
    for i, each in enumerate(draws):
        for group, (name, sign) in zip(groups, each.operations):
            if name in COLOURS:
                group[name, sign].append(i)
    at = [i for group in groups for rows in group.values() for i in rows]
    index = crops.upload([torch.tensor(at, dtype=torch.int64)], x.device)
    inverse = crops.upload([torch.tensor(moves, dtype=torch.float32)], x.device)  # (SLOTS, B, 2, 3)
    lengths = [len(rows) for group in groups for rows in group.values()]
    parts = iter(index.split(lengths))
    for k, group in enumerate(groups):
        x = _moved(x, inverse[k])
        for (name, sign), rows in zip(group, parts):
            x = x.index_copy(0, rows, COLOURS[name](x.index_select(0, rows), sign))
    return x


def _inverse(name: str, sign: int, size: int, flip: bool) -> list[list[float]]:
    """Where a pixel of the result comes from: (x, y, 1) -> (x, y), reckoned from the picture's centre."""
    shear, far, angle = sign * 0.3 * LEVEL, int(sign * 150 / 331 * size * LEVEL), math.radians(sign * 30 * LEVEL)
    rows = {
        "ShearX": [[1.0, shear, shear * size / 2], [0.0, 1.0, 0.0]],
        "ShearY": [[1.0, 0.0, 0.0], [shear, 1.0, shear * size / 2]],
        "TranslateX": [[1.0, 0.0, -far], [0.0, 1.0, 0.0]],
        "TranslateY": [[1.0, 0.0, 0.0], [0.0, 1.0, -far]],
        "Rotate": [[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]],
    }.get(name, [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    return [[-value for value in rows[0]], rows[1]] if flip else rows


def _moved(x: Tensor, inverse: Tensor) -> Tensor:
    """Nearest pixels of uint8 (B, 3, S, S) by (B, 2, 3); black where there are none."""
    size = x.shape[-1]
    line = torch.linspace((1 - size) / 2, (size - 1) / 2, size, device=x.device)
    base = torch.stack(
        [line.expand(size, size), line[:, None].expand(size, size), torch.ones_like(line).expand(size, size)], -1
    )
    grid = (base.view(1, -1, 3) @ (inverse.mT * (2 / size))).view(len(x), size, size, 2)
    return grid_sample(x.float(), grid, "nearest", "zeros", align_corners=False).to(torch.uint8)


def _sharpened(x: Tensor, factor: float) -> Tensor:
    """`adjust_sharpness`, whose blur is made where the pictures are."""
    full = x.float()
    kernel = full.new_full((3, 1, 3, 3), 1 / 13)
    kernel[:, :, 1, 1] = 5 / 13
    blurred = conv2d(full, kernel, groups=3).round_()
    inside = full[..., 1:-1, 1:-1]
    inside.add_(blurred.sub_(inside), alpha=1 - factor)
    return full.clamp_(0, 255).to(torch.uint8)
