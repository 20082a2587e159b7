"""Triton kernels: crops of pictures of any sizes, resized as PIL does, for all crops at once; and a LayerNorm.

Imported only for tensors on a GPU, or under TRITON_INTERPRET=1, where the same kernels run on the CPU, slowly.

PIL resizes in two passes with whole numbers between them. Here each pass is a kernel: it gathers the pixels that a
result needs straight from one buffer of all pictures, or from what the first pass left. Which axis comes first is
decided box by box, as Pillow 13 does it.

Legend: n views; S side of the result; h, w sides of a box. A box is resized to (tall, wide), of which the S x S
pixels from (top, left) on are kept: a crop is tall = wide = S, a whole picture has its short side at S.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 16, 64  # of a tile: results that a program computes at once
PROGRAMS = 64  # at most, for a view and pass
BLOCK_BYTES = 2**28  # about what stands between the passes


@triton.jit
def _bicubic(x):
    """The cubic convolution kernel with a = -1/2; 0 from |x| = 2."""
    x = tl.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return tl.where(x < 1, near, tl.where(x < 2, far, 0.0))


@triton.jit
def _whole(x):
    return tl.floor(tl.minimum(tl.maximum(x, 0.0), 255.0) + 0.5)


@triton.jit
def _resize(source, plane, stride, y, x, inside, length, total, DOWN: tl.constexpr):
    """Three channels of a tile, resized along one axis from `length` to `total` pixels, rounded and clamped.

    Along y (DOWN) `y` counts results and `x` source pixels, along x the other way round.
    """
    scale = length.to(tl.float32) / total
    support = tl.maximum(scale, 1.0)
    if DOWN:
        centre = (y + 0.5) * scale
    else:
        centre = (x + 0.5) * scale
    first = tl.maximum((centre - 2 * support + 0.5).to(tl.int32), 0)
    red = tl.full(inside.shape, 0.0, tl.float32)
    green = red
    blue = red
    norm = tl.full(centre.shape, 0.0, tl.float32)
    for k in range((4 * support + 2).to(tl.int32)):
        tap = first + k
        weight = tl.where(tap < length, _bicubic((tap + 0.5 - centre) / support), 0.0)
        norm += weight
        tap = tl.minimum(tap, length - 1)
        if DOWN:
            place = source + (tap * stride)[:, None] + x[None, :]
            weight = weight[:, None]
        else:
            place = source + (y * stride)[:, None] + tap[None, :]
            weight = weight[None, :]
        red += tl.load(place, mask=inside, other=0).to(tl.float32) * weight
        green += tl.load(place + plane, mask=inside, other=0).to(tl.float32) * weight
        blue += tl.load(place + 2 * plane, mask=inside, other=0).to(tl.float32) * weight
    if DOWN:
        norm = norm[:, None]
    else:
        norm = norm[None, :]
    return _whole(red / norm), _whole(green / norm), _whole(blue / norm)


@triton.jit
def _view(table, box, c, size):
    """Facts of view c; a box that sticks out is clamped to the picture and to at least one pixel."""
    row, corner = table + c * 8, box + c * 4
    start, middle = tl.load(row), tl.multiple_of(tl.load(row + 1), 16)
    height, width = tl.load(row + 2).to(tl.int32), tl.load(row + 3).to(tl.int32)
    tall, wide = tl.load(row + 4).to(tl.int32), tl.load(row + 5).to(tl.int32)
    top, left = tl.load(row + 6).to(tl.int32), tl.load(row + 7).to(tl.int32)
    x0 = tl.minimum(tl.maximum(tl.load(corner), 0), width - 1)
    y0 = tl.minimum(tl.maximum(tl.load(corner + 1), 0), height - 1)
    w = tl.minimum(tl.maximum(tl.load(corner + 2), x0 + 1), width) - x0
    h = tl.minimum(tl.maximum(tl.load(corner + 3), y0 + 1), height) - y0
    stride, down_first = width.to(tl.int64), (h > tall) & (h - tall > 2 * (w - wide))
    rows = tl.where(down_first, size, h)
    columns = tl.multiple_of((tl.where(down_first, w, size) + 15) // 16 * 16, 16).to(tl.int64)
    source = start + y0 * stride + x0
    return source, height * stride, stride, h, w, tall, wide, top, left, down_first, middle, rows, columns


@triton.jit
def _first(pixels, table, box, between, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One axis: from the pictures to uint8 (3, rows, columns) a view, x before y unless the box is tall."""
    source, plane, stride, h, w, tall, wide, top, left, down_first, middle, rows, columns = _view(
        table, box, tl.program_id(0), size
    )
    used = tl.where(down_first, w, size)
    across = (used + COLUMNS - 1) // COLUMNS
    for tile in range(tl.program_id(1), across * ((rows + ROWS - 1) // ROWS), tl.num_programs(1)):
        y = tile // across * ROWS + tl.arange(0, ROWS)
        x = tile % across * COLUMNS + tl.arange(0, COLUMNS)
        inside = (y < rows)[:, None] & (x < used)[None, :]
        if down_first:
            red, green, blue = _resize(pixels + source, plane, stride, y + top, x, inside, h, tall, True)
        else:
            red, green, blue = _resize(pixels + source, plane, stride, y, x + left, inside, w, wide, False)
        place = between + middle + (y * columns)[:, None] + x[None, :]
        tl.store(place, red.to(tl.uint8), mask=inside)
        tl.store(place + rows * columns, green.to(tl.uint8), mask=inside)
        tl.store(place + 2 * rows * columns, blue.to(tl.uint8), mask=inside)


@triton.jit
def _second(
    between, table, box, out, size, g0, g1, g2, b0, b1, b2,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The other axis: from what `_first` left to (3, S, S) a view, normalised."""
    c = tl.program_id(0)
    _, _, _, h, w, tall, wide, top, left, down_first, middle, rows, columns = _view(table, box, c, size)
    plane = rows * columns
    across = (size + COLUMNS - 1) // COLUMNS
    for tile in range(tl.program_id(1), across * ((size + ROWS - 1) // ROWS), tl.num_programs(1)):
        y = tile // across * ROWS + tl.arange(0, ROWS)
        x = tile % across * COLUMNS + tl.arange(0, COLUMNS)
        inside = (y < size)[:, None] & (x < size)[None, :]
        if down_first:
            red, green, blue = _resize(between + middle, plane, columns, y, x + left, inside, w, wide, False)
        else:
            red, green, blue = _resize(between + middle, plane, columns, y + top, x, inside, h, tall, True)
        place = out + c.to(tl.int64) * 3 * size * size + (y * size)[:, None] + x[None, :]
        tl.store(place, (red * g0 + b0).to(out.dtype.element_ty), mask=inside)
        tl.store(place + size * size, (green * g1 + b1).to(out.dtype.element_ty), mask=inside)
        tl.store(place + 2 * size * size, (blue * g2 + b2).to(out.dtype.element_ty), mask=inside)


class Layout(NamedTuple):
    """What the kernels need to know beside the boxes, reckoned on the host.

    Attributes:
        table: (n, 8) int64: where the view's picture starts, where its share of the buffer between the passes, H, W,
            tall, wide, top, left
        first: the views that begin a block; the blocks use one buffer in turn
        room: bytes of that buffer
        programs: of a view in each pass
    """

    table: np.ndarray
    first: list[int]
    room: int
    programs: int


def lay_out(view: np.ndarray, box: np.ndarray | None, size: int) -> Layout:
    """How views are spread over blocks and programs.

    Args:
        view: (n, 7) int64: where the view's picture starts in the buffer of pictures, H, W, tall, wide, top, left
        box: (n, 4) int64 x0, y0, x1, y1; None where the host does not know them
        size: side S of the result
    """
    start, height, width, *window = view.T
    w, h = (width, height) if box is None else (box[:, 2:] - box[:, :2]).clip(1, view[:, [2, 1]]).T
    need = 3 * np.maximum(h * _aligned(size), size * _aligned(w))
    end = need.cumsum()
    first = np.flatnonzero(np.diff((end - need) // BLOCK_BYTES, prepend=-1))
    middle = end - need - (end - need)[first].repeat(np.diff(first, append=len(view)))
    tiles = -(-np.maximum(h, size) // ROWS) * -(-np.maximum(w, size) // COLUMNS)
    return Layout(
        np.stack([start, middle, height, width, *window], axis=1),
        first.tolist(),
        int((middle + need).max(initial=0)),
        min(PROGRAMS, int(tiles.max(initial=1))),
    )


def _aligned(side):
    return (side + 15) // 16 * 16


@torch.library.custom_op("upclose::cut", mutates_args=())
def cut(
    pixels: Tensor,
    table: Tensor,
    box: Tensor,
    first: list[int],
    room: int,
    programs: int,
    size: int,
    dtype: torch.dtype,
    gain: list[float],
    bias: list[float],
) -> Tensor:
    """Views of pictures, resized and normalised, without a look at what stands on the device.

    Args:
        pixels: uint8, pictures (3, H, W) one after the other
        table: (n, 8) int64, of a `Layout`, as are `first`, `room` and `programs`
        box: (n, 4) int32 x0, y0, x1, y1; clamped to the picture
        first: as in `Layout`
        room: as in `Layout`
        programs: as in `Layout`
        size: side S of the result
        dtype: of the result
        gain: of each channel, of pixels in 0 .. 255
        bias: of each channel

    Returns:
        (n, 3, S, S)
    """
    out = pixels.new_empty(len(table), 3, size, size, dtype=dtype)
    between = pixels.new_empty(room)
    with torch.cuda.device_of(pixels):  # Triton launches on the present device
        for a, b in zip(first, [*first[1:], len(table)]):
            grid, facts = (b - a, programs), (table[a:b], box[a:b])
            _first[grid](pixels, *facts, between, size, ROWS, COLUMNS)
            _second[grid](between, *facts, out[a:b], size, *gain, *bias, ROWS, COLUMNS)
    return out


@cut.register_fake
def _(pixels, table, box, first, room, programs, size, dtype, gain, bias):
    return pixels.new_empty(len(table), 3, size, size, dtype=dtype)


@triton.jit
def _norm(x, weight, bias, out, width, epsilon, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, COLUMNS)
    inside = column < width
    value = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(inside, value - tl.sum(value, 0) / width, 0.0)
    value = value / tl.sqrt(tl.sum(value * value, 0) / width + epsilon)
    value = value * tl.load(weight + column, mask=inside, other=0.0) + tl.load(bias + column, mask=inside, other=0.0)
    tl.store(out + row + column, value.to(out.dtype.element_ty), mask=inside)


@torch.library.custom_op("upclose::layer_norm", mutates_args=())
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """LayerNorm of 16-bit rows with float32 weights, in float32, in one pass over memory.

    Args:
        x: (..., W)
        weight: (W,) float32
        bias: (W,) float32
        epsilon: added to the variance

    Returns:
        (..., W) in the type of `x`
    """
    x, width = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _norm[(x.numel() // width,)](x, weight, bias, out, width, epsilon, triton.next_power_of_2(width))
    return out


@layer_norm.register_fake
def _(x, weight, bias, epsilon):
    return torch.empty_like(x.contiguous())
