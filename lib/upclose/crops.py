"""Crops: boxes first, pixels second.

A box is x0, y0, x1, y1 in pixels of the original picture, x to the right, y down, x1 and y1 outside. Sampled boxes lie
on whole pixels; expanded ones need not, and `extract` rounds them as PIL's `crop` does, half to even. `plan_boxes`
rounds already, so that what a bank stores is what was encoded, and boxes that have become equal compare equal.

Legend: H, W height and width of a picture; S side of what the encoder takes; N crops an image; T steps of a ladder;
B images.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from upclose import seeds
from upclose.devices import has_kernels
from upclose.features import Plan

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
BLOCK_BYTES = 2**30
ELONGATED = 4


def sample_boxes(
    height: int, width: int, n: int, scale: tuple[float, float] = (0.5, 0.9), seed: int = 0, key: str = ""
) -> Tensor:
    """Square boxes of side int(U(scale) * min(height, width)) at a uniform position.

    The boxes depend on (seed, key) and the size of the picture alone; the first k of n are the same for every n.

    Args:
        height: of the picture, pixels
        width: of the picture, pixels
        n: number of boxes
        scale: (alpha, beta), the share of the short side
        seed: of the crop set
        key: of the image

    Returns:
        (n, 4) float32 on whole pixels

    Raises:
        ValueError: n < 1, an empty picture, or not 0 < alpha <= beta <= 1

    Source:
        WCA (arXiv 2406.02915) and LGCA sections 3.1 and 4.1, gamma ~ U(alpha, beta), side gamma * min(H, W).

    Deviates:
        The side is at least 1 pixel.

    Example:
        >>> box = sample_boxes(height=100, width=200, n=5, scale=(0.5, 0.9), seed=0, key="a picture")
        >>> box.shape, bool(((box[:, 2] - box[:, 0]) == (box[:, 3] - box[:, 1])).all())
        (torch.Size([5, 4]), True)
    """
    _check_sampling(height, width, n, scale)
    draw = seeds.rng(seed, "crops", key).random((n, 3))
    side = np.maximum((_uniform(draw[:, 0], *scale) * min(height, width)).astype(int), 1)
    return _place(side, side, height, width, draw[:, 1:])


def sample_area_boxes(
    height: int,
    width: int,
    n: int,
    scale: tuple[float, float] = (0.10, 0.75),
    seed: int = 0,
    key: str = "",
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Boxes that hold a share U(scale) of the area, at a uniform position.

    Width over height is log-uniform in `ratio`; `extract` resizes the box to a square. `ratio=(1, 1)` gives squares.

    Args:
        height: of the picture, pixels
        width: of the picture, pixels
        n: number of boxes
        scale: the share of the area
        seed: of the crop set
        key: of the image
        ratio: smallest and largest width over height

    Returns:
        (n, 4) float32 on whole pixels

    Raises:
        ValueError: n < 1, an empty picture, not 0 < scale[0] <= scale[1] <= 1, or not 0 < ratio[0] <= ratio[1]

    Source:
        D&D section 4.1, random crops of 10 to 75 % of the image.

    Deviates:
        The paper does not say what the per cent are of, nor the aspect. We take the area and the aspect range of
        torchvision's RandomResizedCrop. Where a drawn box would not fit, torchvision draws again and at last takes the
        centre; we draw the aspect only from those that fit (or take the nearest), so that the area is kept.
    """
    _check_sampling(height, width, n, scale)
    if not 0 < ratio[0] <= ratio[1] < math.inf:
        raise ValueError(f"ratio must be (low, high) with 0 < low <= high, not {tuple(ratio)}")
    draw = seeds.rng(seed, "crops", key).random((n, 4))
    area = _uniform(draw[:, 0], *scale) * height * width
    low, high = (np.log(r).clip(np.log(area / height**2), np.log(width**2 / area)) for r in ratio)
    aspect = np.exp(_uniform(draw[:, 3], low, high))
    box_width = np.rint(np.sqrt(area * aspect)).astype(int).clip(1, width)
    box_height = np.rint(np.sqrt(area / aspect)).astype(int).clip(1, height)
    return _place(box_width, box_height, height, width, draw[:, 1:3])


def expand_boxes(box: Tensor, factor: float, height: int, width: int, boundary: str = "shift") -> Tensor:
    """Scale boxes about their centres and keep them in the picture.

    Args:
        box: (..., 4)
        factor: of both sides, at least 1
        height: of the picture, pixels
        width: of the picture, pixels
        boundary: "shift" moves a box that sticks out back inside, and clamps a side longer than the picture's to it;
            "clip" cuts off what sticks out

    Returns:
        (..., 4) float32, not rounded

    Raises:
        ValueError: no box, factor < 1, an empty picture, an unknown boundary

    Source:
        LGCA section 4.2, both directions by the margin tau in {1.1, 1.25}.

    Deviates:
        The paper calls tau a fixed margin and a scaling factor; we scale. It does not say what happens at the border;
        "shift" keeps the crop square.

    Example:
        >>> expand_boxes(torch.tensor([[0.0, 40, 20, 60]]), 2, height=100, width=100).tolist()  # shifted back inside
        [[0.0, 30.0, 40.0, 70.0]]
    """
    _check_picture(height, width)
    if box.shape[-1:] != (4,) or box.numel() == 0:
        raise ValueError(f"box must have the shape (..., 4) with at least one box, not {tuple(box.shape)}")
    if not 1 <= factor < math.inf:
        raise ValueError(f"factor must be a finite number of at least 1, not {factor}: 1 leaves a box as it is")
    if boundary not in ("shift", "clip"):
        raise ValueError(f'boundary must be "shift" or "clip", not {boundary!r}')
    box = box.float()
    near, far = zip(*(_expand_side(box[..., i], box[..., i + 2], factor, (width, height)[i], boundary) for i in (0, 1)))
    return torch.stack([*near, *far], dim=-1)


def ladder_boxes(box: Tensor, factor: float, steps: int, height: int, width: int, boundary: str = "shift") -> Tensor:
    """Crop n expanded t times, t = 0 .. steps - 1.

    Args:
        box: (N, 4)
        factor: of one expansion, at least 1
        steps: levels T, the first of which is `box` itself
        height: of the picture, pixels
        width: of the picture, pixels
        boundary: as in `expand_boxes`

    Returns:
        (T, N, 4) float32, not rounded: rounding does not accumulate

    Raises:
        ValueError: steps < 1, or as `expand_boxes`

    Source:
        LGCA section 4.3; the selection between the steps is `lgca`'s.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}: a ladder of 1 step is the boxes themselves")
    level = [box.float()]
    for _ in range(steps - 1):
        level.append(expand_boxes(level[-1], factor, height, width, boundary))
    return torch.stack(level)


def plan_boxes(plan: Plan, height: int, width: int, key: str) -> Tensor:
    """The boxes of a plan for one image, on whole pixels: what a bank stores and encodes.

    Args:
        plan: sampler, n, scale, seed; factor and steps for a ladder
        height: of the picture, pixels
        width: of the picture, pixels
        key: of the image

    Returns:
        (N, 4) float32, or (T, N, 4) when plan.steps > 1

    Raises:
        ValueError: an unknown sampler, or as the functions it calls
    """
    sampler = {"square": sample_boxes, "area": sample_area_boxes}
    if plan.sampler not in sampler:
        raise ValueError(f"plan.sampler must be one of {', '.join(map(repr, sampler))}, not {plan.sampler!r}")
    box = sampler[plan.sampler](height, width, plan.n, plan.scale, plan.seed, key)
    ladder = ladder_boxes(box, plan.factor, plan.steps, height, width).round()
    return ladder if plan.steps > 1 else ladder[0]


def extract(
    image: Tensor | Sequence[Tensor],
    box: Tensor,
    size: int,
    dtype: torch.dtype = torch.float32,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Tensor:
    """Cut boxes out of a picture, or out of each of several, and resize them to what an encoder takes.

    Every pixel is within 2/255 of PIL's `image.crop(box).resize((size, size), BICUBIC)`. On the CPU torch's vectorised
    uint8 kernel does a crop at a time, normalised in float32 while it is in the cache; on a GPU `kernels` does all of
    them at once, and other devices multiply with banded matrices. Boxes on a device are not read back: they must lie in
    the picture (`kernels` clamps them to it). PIL is Pillow 13, which resizes a box much taller than wide along y
    first; older ones, which never do, differ there.

    Args:
        image: uint8 (3, H, W), or a sequence of B such pictures of any sizes
        box: (..., 4), or (B, ..., 4) for B pictures; rounded to whole pixels; on the CPU or where the pictures are
        size: side S of the result
        dtype: of the result; torch.uint8 gives the resized pixels, not normalised
        mean: of each channel, of pixels in 0 .. 1
        std: of each channel

    Returns:
        (..., 3, S, S), or (B, ..., 3, S, S), where the pictures are

    Raises:
        ValueError: pictures that are not uint8 (3, H, W), boxes of another shape, empty or (on the CPU) outside the
            picture, size < 1
    """
    images, boxes = ([image], box[None]) if isinstance(image, Tensor) else (image, box)
    _check_extract(images, boxes, size)
    rows = boxes
    if boxes.device.type == "cpu":
        rows = np.rint(boxes.numpy()).astype(np.int64)
        for picture, some in zip(images, rows):
            check_inside(some, *picture.shape[1:])
    device = images[0].device
    if has_kernels(device):
        owner = np.arange(len(images)).repeat(boxes[0].numel() // 4)
        rows = rows.reshape(-1, 4)
        window = np.tile([size, size, 0, 0], (len(rows), 1))
        out = _cut(*pack(images, device), owner, rows, window, size, dtype, mean, std)
    elif device.type == "cpu":
        out = torch.empty(*boxes.shape[:-1], 3, size, size, dtype=dtype)
        for picture, rows, target in zip(images, boxes, out):
            _extract_cpu(picture, rows.reshape(-1, 4), size, mean, std, target.view(-1, 3, size, size))
    else:
        out = _extract_banded(images, boxes, size, dtype, mean, std)
    out = out.view(*boxes.shape[:-1], 3, size, size)
    return out[0] if isinstance(image, Tensor) else out


def whole(
    image: Tensor | Sequence[Tensor],
    size: int,
    dtype: torch.dtype = torch.float32,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Tensor:
    """CLIP's preprocessing of a whole picture: the short side resized to `size` (antialiased bicubic), centre crop.

    Every pixel is within 2/255 of open_clip's evaluation transform (torchvision's Resize and CenterCrop on PIL).

    Args:
        image: uint8 (3, H, W), or a sequence of B such pictures of any sizes
        size: side S of the result
        dtype: of the result; torch.uint8 gives the resized pixels, not normalised
        mean: of each channel, of pixels in 0 .. 1
        std: of each channel

    Returns:
        (3, S, S), or (B, 3, S, S), where the pictures are

    Raises:
        ValueError: no picture, one that is not uint8 (3, H, W), or size < 1
    """
    images = [image] if isinstance(image, Tensor) else image
    _check_images(images, size)
    device = images[0].device
    if has_kernels(device):
        view = np.concatenate([whole_view(*picture.shape[1:], size) for picture in images])
        out = cut(images, np.arange(len(images)), view, device, size, dtype, mean, std)
    else:
        out = torch.stack([_normalise(_whole(picture, size), dtype, mean, std) for picture in images])
    return out[0] if isinstance(image, Tensor) else out


def crop_view(box: np.ndarray, size: int) -> np.ndarray:
    """Boxes of a picture, (n, 4) int64, as views for `cut`."""
    return np.concatenate([box, np.tile([size, size, 0, 0], (len(box), 1))], axis=1)


def whole_view(height: int, width: int, size: int, squash: bool = False) -> np.ndarray:
    """A whole picture as a view for `cut`: its short side at `size` and the centre, or all of it squashed."""
    tall, wide = (size, size) if squash else _short_side(height, width, size)
    return np.array([[0, 0, width, height, tall, wide, round((tall - size) / 2), round((wide - size) / 2)]])


def cut(
    images: Sequence[Tensor],
    owner: np.ndarray,
    view: np.ndarray,
    device: torch.device,
    size: int,
    dtype: torch.dtype,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Views of pictures by `kernels`: what `extract` and `whole` give, in any mixture.

    Nothing waits for the device: pictures on the host are copied on a stream of their own.

    Args:
        images: B pictures, uint8 (3, H, W) of any sizes, on the host or the device
        owner: (n,) which picture each view shows
        view: (n, 8) int64 from `crop_view` and `whole_view`, inside the pictures
        device: of the result
        size: side S of the result
        dtype: of the result
        mean: of each channel, of pixels in 0 .. 1
        std: of each channel

    Returns:
        (n, 3, S, S)
    """
    return _cut(*pack(images, device), owner, view[:, :4], view[:, 4:], size, dtype, mean, std)


def pack(images: Sequence[Tensor], device: torch.device) -> tuple[Tensor, np.ndarray]:
    """Pictures one after the other on a device: uint8, and (B, 3) int64 where each starts, its height and width."""
    shape = np.array([image.shape[1:] for image in images], dtype=np.int64).reshape(-1, 2)
    length = 3 * shape.prod(axis=1)
    place = np.concatenate([(length.cumsum() - length)[:, None], shape], axis=1)
    parts = [image.reshape(-1) for image in images]
    if all(part.device.type == "cpu" for part in parts):
        return upload(parts, device), place
    return torch.cat([part.to(device) for part in parts]), place


def upload(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """Some tensors of the host, joined on a device; copied on a stream of their own, while the device computes.

    The present stream of the device waits for the copy, the host does not.
    """
    if not torch.cuda.is_initialized():
        return torch.cat(list(parts)).to(device)
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    host = torch.cat(list(parts), out=torch.empty(shape, dtype=parts[0].dtype, pin_memory=True))
    present, aside = torch.cuda.current_stream(device), _aside(device)
    with torch.cuda.stream(aside):
        there = host.to(device, non_blocking=True)
    present.wait_stream(aside)
    there.record_stream(present)
    return there


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _uniform(draw: np.ndarray, low, high) -> np.ndarray:
    return low + draw * (high - low)


def _place(box_width: np.ndarray, box_height: np.ndarray, height: int, width: int, draw: np.ndarray) -> Tensor:
    """Whole-pixel corners for boxes of given sides, every position equally likely; `draw` is (n, 2) in [0, 1)."""
    x0 = (draw[:, 0] * (width - box_width + 1)).astype(int)
    y0 = (draw[:, 1] * (height - box_height + 1)).astype(int)
    return torch.from_numpy(np.stack([x0, y0, x0 + box_width, y0 + box_height], axis=1).astype(np.float32))


def _expand_side(near: Tensor, far: Tensor, factor: float, length: int, boundary: str) -> tuple[Tensor, Tensor]:
    margin = (far - near) * ((factor - 1) / 2)
    near, far = near - margin, far + margin
    if boundary == "shift":
        over = (far - length).clamp(min=0) + near.clamp(max=0)
        near, far = near - over, far - over
    return near.clamp(0, length), far.clamp(0, length)


def _is_down_first(height, width, tall, wide):
    """Whether PIL resizes (height, width) to (tall, wide) along y before x: numbers or tensors."""
    return (height > tall) & (height - tall > 2 * (width - wide))


def _channels_last(image: Tensor) -> Tensor:
    return image[None].contiguous(memory_format=torch.channels_last)[0]


def _resize(image: Tensor, tall: int, wide: int) -> Tensor:
    """uint8 (3, h, w) on the CPU to (3, tall, wide); torch always begins with x, hence the transposition."""
    if _is_down_first(*image.shape[1:], tall, wide):
        return F.interpolate(_channels_last(image.mT)[None], (wide, tall), mode="bicubic", antialias=True)[0].mT
    return F.interpolate(_channels_last(image)[None], (tall, wide), mode="bicubic", antialias=True)[0]


def _extract_cpu(
    image: Tensor, box: Tensor, size: int, mean: Sequence[float], std: Sequence[float], out: Tensor
) -> None:
    """Fill `out` (N, 3, S, S); a crop stays in the cache from the resize to its last conversion."""
    image = _channels_last(image)
    gain, bias = (torch.tensor(values).view(3, 1, 1) for values in _affine(mean, std))
    scratch = torch.empty(3, size, size)
    for (x0, y0, x1, y1), target in zip(box.round().long().tolist(), out):
        crop = _resize(image[:, y0:y1, x0:x1], size, size)
        if out.dtype == torch.uint8:
            target.copy_(crop)
        else:
            torch.add(scratch.copy_(crop).mul_(gain), bias, out=target)


def _extract_banded(
    images: Sequence[Tensor],
    box: Tensor,
    size: int,
    dtype: torch.dtype,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """`extract` as two batched matrix products with banded weights, rounded and clamped between them as PIL does.

    For devices without Triton: no loop over crops and no synchronisation. Where a picture is taller than S both orders
    of the passes are computed, and each crop takes its own. The weights and what stands between the products take at
    most about `BLOCK_BYTES` at a time (or one crop of each picture, if that is more).
    """
    canvas = _canvas(images)
    height, width = canvas.shape[-2:]
    rows = box.to(canvas.device, torch.float32, non_blocking=True).reshape(len(box), -1, 4).round()
    block = max(1, BLOCK_BYTES // (24 * len(images) * size * (height + width + size)))
    out = []
    for part in rows.split(block, dim=1):
        x0, y0, x1, y1 = part.unbind(-1)
        across, down = _weights(x0, x1, size, width), _weights(y0, y1, size, height)
        pixels = _resample(canvas, across, down)
        if height > size:
            first = _is_down_first(y1 - y0, x1 - x0, size, size)[..., None, None, None]
            pixels = torch.where(first, _resample(canvas.mT, down, across).mT, pixels)
        out.append(_normalise(pixels, dtype, mean, std))
    return torch.cat(out, dim=1)


def _short_side(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width of a picture whose short side has become `size`."""
    short, long = sorted((height, width))
    return tuple(size if side == short else size * long // short for side in (height, width))


def _whole(image: Tensor, size: int) -> Tensor:
    """(3, S, S) in 0 .. 255."""
    height, width = image.shape[-2:]
    tall, wide = _short_side(height, width, size)
    top, left = round((tall - size) / 2), round((wide - size) / 2)
    if image.device.type == "cpu" and max(height, width) <= ELONGATED * min(height, width):
        return _resize(image, tall, wide)[..., top : top + size, left : left + size]
    start = torch.zeros(1, 1, device=image.device)
    across = _weights(start, start + width, size, width, wide, left)
    down = _weights(start, start + height, size, height, tall, top)
    if _is_down_first(height, width, tall, wide):
        return _resample(image[None].mT, down, across).mT[0, 0]
    return _resample(image[None], across, down)[0, 0]


def _cut(pixels, place, owner, box: np.ndarray | Tensor, window, size, dtype, mean, std) -> Tensor:
    """`cut` for packed pictures, with boxes on the host or, as floats or whole numbers, on the device."""
    from upclose import kernels

    here = isinstance(box, np.ndarray)
    layout = kernels.lay_out(np.concatenate([place[owner], window], axis=1), box if here else None, size)
    table = upload([torch.from_numpy(layout.table)], pixels.device)
    box = upload([torch.from_numpy(box.astype(np.int32))], pixels.device) if here else box.round().int().contiguous()
    gain, bias = ([1.0] * 3, [0.0] * 3) if dtype == torch.uint8 else _affine(mean, std)
    return kernels.cut(pixels, table, box, *layout[1:], size, dtype, gain, bias)


def _affine(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """Gain and bias that take a pixel in 0 .. 255 to its normalised value."""
    return [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std)]


def _normalise(pixels: Tensor, dtype: torch.dtype, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(..., 3, S, S) pixels in 0 .. 255 to `dtype`; Python numbers, since a copy to a device would synchronise."""
    if dtype == torch.uint8:
        return pixels.to(dtype)
    return torch.stack(
        [pixels[..., c, :, :] * gain + bias for c, (gain, bias) in enumerate(zip(*_affine(mean, std)))], -3
    ).to(dtype)


def _canvas(images: Sequence[Tensor]) -> Tensor:
    """B pictures in the upper left corners of uint8 (B, 3, H, W), H and W the largest."""
    if len(images) == 1:
        return images[0][None]
    height, width = (max(image.shape[i] for image in images) for i in (1, 2))
    canvas = images[0].new_zeros(len(images), 3, height, width)
    for image, target in zip(images, canvas):
        target[:, : image.shape[1], : image.shape[2]].copy_(image)
    return canvas


def _bicubic(x: Tensor) -> Tensor:
    """The cubic convolution kernel with a = -1/2, as in PIL; 0 from |x| = 2."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _weights(near: Tensor, far: Tensor, size: int, length: int, total: int | None = None, offset: int = 0) -> Tensor:
    """Banded weights of pixels near .. far - 1 of a line resized to `total` pixels, of which `size` from `offset` on.

    Args:
        near: (B, N) first pixel of the box
        far: (B, N) one past its last pixel
        size: output pixels S
        length: pixels of the line
        total: pixels that the whole box is resized to; None is `size`
        offset: first output pixel

    Returns:
        (B, N, S, length) float32, rows sum to 1, 0 outside the box
    """
    near, far = near[..., None, None], far[..., None, None]
    scale = (far - near) / (total or size)
    output = torch.arange(size, device=near.device)[:, None] + (offset + 0.5)
    pixel = torch.arange(length, device=near.device)
    weight = _bicubic((pixel + 0.5 - near - output * scale) / scale.clamp(min=1))
    weight = torch.where((pixel >= near) & (pixel < far), weight, 0.0)
    return weight / weight.sum(-1, keepdim=True)


def _resample(image: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Resize along x, round, clamp, then along y, round, clamp.

    Args:
        image: (B, 3, H, W) whole numbers
        across: (B, N, S, W) weights
        down: (B, N, S, H) weights

    Returns:
        (B, N, 3, S, S) float32, whole numbers in 0 .. 255
    """
    b, _, height, width = image.shape
    n, size = across.shape[1:3]
    with torch.autocast(image.device.type, enabled=False):
        lines = image.reshape(b, 3 * height, width).float() @ across.reshape(b, n * size, width).mT
        lines = lines.view(b, 3, height, n, size).permute(0, 3, 2, 1, 4).reshape(b, n, height, 3 * size)
        pixels = down @ lines.round_().clamp_(0, 255)
    return pixels.round_().clamp_(0, 255).view(b, n, size, 3, size).transpose(2, 3)


def _check_picture(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"a picture of height {height} and width {width} has no pixels to crop")


def _check_sampling(height: int, width: int, n: int, scale: tuple[float, float]) -> None:
    _check_picture(height, width)
    if n < 1:
        raise ValueError(f"n must be at least 1 crop, not {n}")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale must be (alpha, beta) with 0 < alpha <= beta <= 1, not {tuple(scale)}")


def check_inside(box: np.ndarray, height: int, width: int) -> None:
    """Raise for the first of some boxes (..., 4) that is empty or not inside the picture."""
    x0, y0, x1, y1 = np.moveaxis(np.rint(box), -1, 0)
    wrong = ~((x0 >= 0) & (x0 < x1) & (x1 <= width) & (y0 >= 0) & (y0 < y1) & (y1 <= height))
    if wrong.any():
        first = tuple(box[wrong][0].tolist())
        raise ValueError(f"box {first} is empty or not inside the picture of width {width} and height {height}")


def _check_images(images: Sequence[Tensor], size: int) -> None:
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, not {size}")
    if len(images) == 0:
        raise ValueError("there is no picture to cut: give at least one")
    for image in images:
        if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3 or image.numel() == 0:
            raise ValueError(f"a picture must be uint8 (3, H, W) and not empty, not {image.dtype} {tuple(image.shape)}")


def _check_extract(images: Sequence[Tensor], box: Tensor, size: int) -> None:
    _check_images(images, size)
    if len(images) == 0 or len(box) != len(images):
        raise ValueError(
            f"{len(images)} pictures but boxes for {len(box)}: give at least one, and one set of boxes each"
        )
    if box.shape[-1] != 4 or box.numel() == 0:
        raise ValueError(f"box must have the shape (..., 4) with at least one box, not {tuple(box.shape)}")
