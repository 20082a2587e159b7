"""A Triton kernel for many small problems of optimal transport: each is solved on the chip by a program of its own.

Imported only for tensors on a GPU, or under TRITON_INTERPRET=1, where the same kernel runs on the CPU, slowly.

Problem (c, b) lies between the N rows of image b and the M_c columns of class c. A program loads its logits, scales
rows and columns in turn in registers until the marginals are right, and writes <plan, logit>, or the plan where it is
asked for. What `transport` decides for a batch is decided here for each problem: logits that lie too far apart for the
plain kernel, and classes wider than a tile, take the log domain, in which a round reads the logits again.

Legend: x logits, a and share the marginals of rows and columns, k = exp(x - largest of the column), u and v the
scalings; the plan is u k v.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRIES = 2**13  # of a tile, at most: 32 a thread in eight warps
NOTHING = tl.constexpr(-1e30)  # the logarithm of no mass


@triton.jit
def _faster(factor, rate):
    """`transport._faster` for one problem."""
    plain = tl.minimum((rate + factor - 1) * (rate + factor - 1) / (rate * factor * factor), 1 - 1e-4)
    best = tl.where(rate <= factor - 1, factor, 2 / (1 + tl.sqrt(1 - plain)))
    return tl.minimum(tl.maximum(tl.where(rate < 1, best, 1 + 0.7 * (factor - 1)), 1.0), 1.95)


@triton.jit
def _scaled(scale, ratio, factor, LEAST: tl.constexpr):
    return scale * tl.where(factor > 1, tl.maximum(1 + factor * (ratio - 1), LEAST), ratio)


@triton.jit
def _plain(x, a, share, columns, max_iter, tolerance, LOOK: tl.constexpr, LEAST: tl.constexpr):
    """Scalings u (N,) and v (M,) of k, and k (N, M), for logits x (N, M) that are `NOTHING` outside the problem."""
    k = tl.exp(x - tl.where(columns, tl.max(x, 0), 0.0)[None, :])
    u = tl.where(a > 0, 1.0, 0.0)
    v = tl.where(columns, share / tl.where(columns, tl.sum(k * u[:, None], 0), 1.0), 0.0)
    r = tl.sum(k * v[None, :], 1)
    error = tolerance + 1.0
    before = error * 0
    factor = before + 1.0
    iteration = max_iter * 0
    passed = iteration
    look = iteration + LOOK
    while (iteration < max_iter) & (error >= tolerance):
        u = _scaled(u, a / tl.where(a > 0, u * r, 1.0), factor, LEAST)
        s = tl.sum(k * u[:, None], 0)
        v = _scaled(v, share / tl.where(columns, v * s, 1.0), factor, LEAST)
        r = tl.sum(k * v[None, :], 1)
        error = tl.sum(tl.abs(u * r - a), 0) + tl.sum(tl.where(columns, tl.abs(v * s - share), 0.0), 0)
        iteration += 1
        if iteration == look:
            if before > 0:
                factor = _faster(factor, tl.exp(tl.log(error / before) / (iteration - passed)))
            before = error
            passed = iteration
            look += tl.maximum(LOOK, iteration // 4)
    v = tl.where(columns, share / tl.where(columns, tl.sum(k * u[:, None], 0), 1.0), 0.0)
    return u, v, k


@triton.jit
def _block(logit, corner, step, rows, first, end, M: tl.constexpr):
    """Logits of M columns from `first` on, `NOTHING` outside of the problem; where they stand, which are columns."""
    m = first + tl.arange(0, M)
    place = corner[:, None] + m[None, :].to(tl.int64) * step
    return tl.load(logit + place, mask=rows[:, None] & (m < end)[None, :], other=NOTHING), place, m < end


@triton.jit
def _log_v(x, log_u, log_share, columns):
    """The columns' scalings that belong to rows' log_u, as logarithms."""
    y = x + log_u[:, None]
    top = tl.max(y, 0)
    return tl.where(columns, log_share - top - tl.log(tl.sum(tl.exp(y - top[None, :]), 0)), NOTHING)


@triton.jit
def _log_domain(logit, corner, step, rows, top, first, end, a, share, max_iter, tolerance, M: tl.constexpr):
    """The logarithm of u (N,); the logits are reckoned from `top`, the largest of them."""
    log_u = tl.where(rows, 0.0, NOTHING)
    log_a = tl.log(tl.where(rows, a, 1.0))
    iteration = max_iter * 0 - 1
    error = tolerance + 1.0
    while (iteration < max_iter) & (error >= tolerance):
        best = tl.where(rows, NOTHING, 0.0)
        total = best * 0
        for j in range(first, end, M):
            x, _, columns = _block(logit, corner, step, rows, j, end, M)
            x -= top
            z = x + _log_v(x, log_u, tl.log(share), columns)[None, :]
            higher = tl.maximum(best, tl.max(z, 1))
            total = total * tl.exp(best - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)
            best = higher
        log_r = best + tl.log(tl.where(rows, total, 1.0))
        iteration += 1
        wrong = tl.sum(tl.where(rows, tl.abs(tl.exp(log_u + log_r) - a), 0.0), 0)
        error = tl.where(iteration > 0, wrong, error)
        more = (iteration < max_iter) & (error >= tolerance)
        log_u = tl.where(rows & more, log_a - log_r, log_u)
    return log_u


@triton.jit(do_not_specialize=["classes", "images", "size", "max_iter"])
def _solve(
    logit, row, start, out, classes, images, size, max_iter, tolerance, SAFE,
    PLANS: tl.constexpr, LOOK: tl.constexpr, LEAST: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """One problem: logit (L, B, N) and row (B, N) give out (C, B), or (L, B, N) with PLANS."""
    b, c = tl.program_id(0) // classes, tl.program_id(0) % classes
    first, end = tl.load(start + c).to(tl.int32), tl.load(start + c + 1).to(tl.int32)
    step = tl.cast(images, tl.int64) * size
    n = tl.arange(0, N)
    corner = b.to(tl.int64) * size + n
    a = tl.load(row + corner, mask=n < size, other=0.0)
    rows, share = a > 0, 1.0 / (end - first).to(tl.float32)
    x, place, columns = _block(logit, corner, step, rows, first, end, M)
    top, least = tl.max(x, 0), tl.min(tl.where(rows[:, None], x, 1e30), 0)
    plain = (end - first <= M) & (tl.max(tl.where(columns, top - least, 0.0), 0) <= SAFE)
    inside = (n < size)[:, None] & columns[None, :]
    if plain:
        u, v, k = _plain(x, a, share, columns, max_iter, tolerance, LOOK, LEAST)
        plan = u[:, None] * k * v[None, :]
        if PLANS:
            tl.store(out + place, plan, mask=inside)
        else:
            tl.store(out + c.to(tl.int64) * images + b, tl.sum(tl.sum(tl.where(plan > 0, plan * x, 0.0), 1), 0))
    else:
        highest = tl.max(top, 0)
        for j in range(first + M, end, M):
            x, place, columns = _block(logit, corner, step, rows, j, end, M)
            highest = tl.maximum(highest, tl.max(tl.max(x, 0), 0))
        log_u = _log_domain(logit, corner, step, rows, highest, first, end, a, share, max_iter, tolerance, M)
        value = share * 0
        for j in range(first, end, M):
            x, place, columns = _block(logit, corner, step, rows, j, end, M)
            y = x - highest
            plan = tl.exp(y + log_u[:, None] + _log_v(y, log_u, tl.log(share), columns)[None, :])
            if PLANS:
                tl.store(out + place, plan, mask=(n < size)[:, None] & columns[None, :])
            value += tl.sum(tl.sum(tl.where(plan > 0, plan * x, 0.0), 1), 0)
        if not PLANS:
            tl.store(out + c.to(tl.int64) * images + b, value)


def tile(rows: int, columns: int, classes: int) -> tuple[int, int]:
    """Sides of a tile that holds a problem with all rows and half more columns than a class has on average."""
    n = triton.next_power_of_2(rows)
    return n, max(1, min(triton.next_power_of_2(-(-3 * columns // (2 * classes))), ENTRIES // n))


@torch.library.custom_op("upclose::transport", mutates_args=())
def solve(
    logit: Tensor,
    row: Tensor,
    start: Tensor,
    max_iter: int,
    tolerance: float,
    plans: bool,
    safe: float,
    look: int,
    least: float,
) -> Tensor:
    """Entropic plans between the rows of B images and the columns of C classes, or what they move.

    Args:
        logit: (L, B, N) float32, -C / epsilon, N at most `ENTRIES`
        row: (B, N) float32 marginals; rows of no mass are padding
        start: (C + 1,) int64, where the columns of each class begin, and L
        max_iter: most rounds
        tolerance: L1 error of both marginals at which a problem is done
        plans: give the plans (L, B, N), else <plan, logit> (C, B)
        safe: the largest difference within a column of logits that the plain kernel takes
        look: rounds before scalings may be overdone
        least: of what an overdone scaling multiplies with
    """
    classes, (columns, images, rows) = len(start) - 1, logit.shape
    logit, row = logit.contiguous(), row.contiguous()
    out = torch.empty_like(logit) if plans else logit.new_empty(classes, images)
    n, m = tile(rows, columns, classes)
    if classes * images:
        sizes = dict(PLANS=plans, LOOK=look, LEAST=least, N=n, M=m, num_warps=min(8, max(1, n * m // 512)))
        _solve[(classes * images,)](logit, row, start, out, classes, images, rows, max_iter, tolerance, safe, **sizes)
    return out


@solve.register_fake
def _(logit, row, start, max_iter, tolerance, plans, safe, look, least):
    return torch.empty_like(logit) if plans else logit.new_empty(len(start) - 1, logit.shape[1])
