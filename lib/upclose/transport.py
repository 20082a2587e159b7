"""Optimal transport between small discrete sets, many problems at a time.

Notation: C cost, a row and b column marginals, K = exp(-C / epsilon) the kernel, u and v the scalings, so that the
plan is T = diag(u) K diag(v). A round is u = a / (K v), then v = b / (K' u); the plain solver scales T itself by the
change of u and of v.

Source: Cuturi, "Sinkhorn Distances", NeurIPS 2013; Peyré and Cuturi, "Computational Optimal Transport", 2019, ch. 4.
"""

from __future__ import annotations

import math

import numpy as np
import ot
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from upclose.devices import has_kernels
from upclose.features import check_owner

# Kernel entries stay above exp(-SAFE), so that products of two of them and of their inverses are ordinary numbers.
SAFE = {torch.float32: 40.0, torch.float64: 300.0}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
LOOK = 5  # rounds of stacked problems before the first look at who is done
LEAST = 0.05  # of what overrelaxation multiplies a row or a column with
ROWS = 2**13  # the most that a problem on a chip may have
NOTHING = -1e30  # the logarithm of no mass: finite, so that gradients stay finite


def sinkhorn(
    cost: Tensor,
    row: Tensor,
    column: Tensor,
    epsilon: float,
    max_iter: int = 1000,
    tolerance: float | None = None,
    bound: float | None = None,
) -> tuple[Tensor, int]:
    """Entropic optimal transport plans of a batch of problems: argmin_T <T, C> + epsilon sum T (log T - 1).

    Rows and columns of zero mass are padding: they get zeros and change nothing else. A problem whose marginal error
    has fallen below `tolerance` is frozen, so that its plan does not depend on the problems beside it. Gradients
    reach cost and marginals through the rounds. On the CPU the loop ends when every problem is done; elsewhere all
    `max_iter` rounds run and values are not validated, because looking at either would stall the device.

    Args:
        cost: (..., N, M) float32 or float64, at least 0; entries of padding are ignored but must be finite
        row: (..., N) marginals, at least 0 with sum 1, broadcast over the batch
        column: (..., M) the same for columns
        epsilon: weight of the entropy, in units of cost; infinity gives the product of the marginals
        max_iter: most rounds
        tolerance: the L1 distance of a plan's marginals from `row` and `column` at which it is done;
            None is 1e-5 in float32 and 1e-9 in float64
        bound: the largest cost that can occur, padding included, where the caller knows it (cosine distances: 2);
            the costs are then not looked at. The plain kernel is used when bound / epsilon <= 40 (float32) or 300
            (float64), otherwise the slower log domain. None: the largest cost on the CPU, infinite elsewhere.

    Returns:
        plan: (..., N, M)
        iterations: rounds run, the most that any problem of the batch needed

    Raises:
        ValueError: shapes that do not fit, values that are not finite or negative, marginals that do not sum to one

    Example:
        >>> half = torch.tensor([0.5, 0.5])
        >>> plan, rounds = sinkhorn(1 - torch.eye(2), half, half, epsilon=0.01)
        >>> plan.round(decimals=2).tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """
    row, column = _marginals(cost, row, column)
    if not epsilon > 0:
        raise ValueError(f"epsilon is {epsilon}: give a positive number; `exact` solves the problem without entropy")
    if not cost.numel():
        return torch.zeros_like(cost), 0
    bound = 0.0 if math.isinf(epsilon) else (_largest(cost) if bound is None else bound) / epsilon
    row, column = row[..., None], column[..., None, :]
    return _solve(_Rectangles(), cost * (-1 / epsilon), row, column, bound, max_iter, tolerance)


class Ragged:
    """L columns that belong to C classes, class after class: problems of different widths without padding.

    Tensors hold the columns first and whatever else last, so that a class is a block of memory.

    Args:
        owner: (L,) int64, non-decreasing, the class of each column
        classes: C; each of them has at least one column

    Raises:
        ValueError: on the CPU, an owner that is not as described, or a class without a column
    """

    rows = -1

    def __init__(self, owner: Tensor, classes: int) -> None:
        check_owner(owner, classes)
        self.owner, self._column = owner, torch.arange(len(owner), device=owner.device)
        bounds = torch.searchsorted(owner, torch.arange(classes + 1, device=owner.device))
        self.bounds, self._start, self.count = bounds, bounds[:-1], bounds.diff()  # (C + 1,), (C,), (C,)

    @property
    def share(self) -> Tensor:
        """(L,) float64, each column's part of its class."""
        return 1 / self.spread(self.count).double()

    def sum(self, x: Tensor) -> Tensor:
        """Sums over each class: (L, ...) -> (C, ...)."""
        return self._bags(x, "sum")

    def mean(self, x: Tensor) -> Tensor:
        """Means over each class: (L, ...) -> (C, ...)."""
        return self._bags(x, "mean")

    def amax(self, x: Tensor) -> Tensor:
        """The largest of each class: (L, ...) -> (C, ...), without gradients."""
        return self._bags(x.detach(), "max")

    def spread(self, x: Tensor) -> Tensor:
        """What each class has, for every column of it: (C, ...) -> (L, ...)."""
        return x.index_select(0, self.owner)

    def _bags(self, x: Tensor, mode: str) -> Tensor:
        return embedding_bag(self._column, x.reshape(len(x), -1), self._start, mode=mode).view(-1, *x.shape[1:])


def sinkhorn_ragged(
    logit: Tensor,
    row: Tensor,
    columns: Ragged,
    max_iter: int = 1000,
    tolerance: float | None = None,
    bound: float | None = None,
) -> tuple[Tensor, int]:
    """`sinkhorn` between the rows of B images and the columns of C classes, B x C problems in one batch.

    Problem (b, c) has the rows of image b and the columns of class c, which share the mass of 1 evenly. What is added
    to all logits of a row or of a column changes no plan, so that any multiple of the similarities will do.

    Args:
        logit: (L, B, N) float32 or float64, the kernel's logarithm -C / epsilon
        row: (B, N) marginals, at least 0 with sum 1
        columns: L columns of C classes
        max_iter: as in `sinkhorn`
        tolerance: as in `sinkhorn`
        bound: the largest difference between logits that can occur, padding included, where the caller knows it; the
            logits are then not looked at. The plain kernel is used up to 40 (float32) or 300 (float64), otherwise the
            log domain. None: the largest difference on the CPU, infinite elsewhere. On a GPU with Triton each problem
            of float32 without gradients is solved by `kernels_transport`, which looks at its own logits

    Returns:
        plan: (L, B, N); problem (b, c) has plan[columns.owner == c, b].T
        iterations: rounds run, the most that any problem of the batch needed

    Raises:
        ValueError: as `sinkhorn`
    """
    row = _ragged_row(logit, row, columns)
    if not logit.numel():
        return torch.zeros_like(logit), 0
    if _on_chip(logit, row):
        return _solve_on_chip(logit, row, columns, max_iter, tolerance, plans=True), max_iter
    if bound is None:
        low, high = _range("logit", logit)
        bound = high - low
    return _solve(columns, logit, row, columns.share.to(logit)[:, None, None], bound, max_iter, tolerance)


def moved_ragged(
    logit: Tensor,
    row: Tensor,
    columns: Ragged,
    max_iter: int = 1000,
    tolerance: float | None = None,
    bound: float | None = None,
) -> Tensor:
    """<plan, logit> of the plans of `sinkhorn_ragged`, whose arguments and errors these are.

    Returns:
        (C, B); on a GPU with Triton no plan is ever in memory
    """
    if logit.numel() and _on_chip(logit, row):
        return _solve_on_chip(logit, _ragged_row(logit, row, columns), columns, max_iter, tolerance, plans=False)
    plan, _ = sinkhorn_ragged(logit, row, columns, max_iter, tolerance, bound)
    return columns.sum((plan * logit).sum(-1))


def sinkhorn_stacked(
    logit: Tensor, column: Tensor, max_iter: int = 1000, tolerance: float | None = None, plans: bool = True
) -> Tensor:
    """`sinkhorn` for K problems whose rows share the mass of 1 evenly, problem beside problem in memory.

    Sums run over whole rows of memory. Scalings are overdone by a factor of each problem's own, which is learned from
    how fast its error falls; hard problems need less than half of the rounds. Once half of the problems are done the
    others go on alone. A result does not depend on the problems beside it. There are no gradients.

    Args:
        logit: (N, M, K) float32 or float64, the kernel's logarithm -C / epsilon; within a column the values must not
            differ by more than 40 (float32) or 300 (float64), see `fits`
        column: (M, K) marginals, at least 0 with sum 1 over M; columns of no mass are padding
        max_iter: most rounds
        tolerance: as in `sinkhorn`
        plans: False gives <plan, logit> alone

    Returns:
        (N, M, K), or (K,) without plans

    Raises:
        ValueError: max_iter < 1

    Source:
        Thibault et al., "Overrelaxed Sinkhorn-Knopp algorithm for regularized optimal transport", 2021; Young,
        "Iterative Solution of Large Linear Systems", 1971, ch. 6, for the factor.
    """
    if max_iter < 1:
        raise ValueError(f"max_iter is {max_iter}: give at least 1")
    tolerance = TOLERANCE[logit.dtype] if tolerance is None else tolerance
    logit, row, tiny = logit.detach(), torch.full_like(column[0], 1 / len(logit)), torch.finfo(column.dtype).tiny
    plan = (logit - logit.amax(0)).exp_()
    by_column, by_row = plan.sum(0), plan.sum(1)
    plan *= torch.div(column, by_column, out=by_column)
    index, waiting, scratch = torch.arange(len(row), device=row.device), row > 0, torch.empty_like(plan)
    factor = before = result = None
    passed, look = 0, min(LOOK, max_iter)
    for iteration in range(1, max_iter + 1):
        torch.sum(plan, 1, out=by_row)
        plan *= _scaling(row, by_row, factor)[:, None]
        torch.sum(plan, 0, out=by_column)
        plan *= _scaling(column, by_column.clamp_min_(tiny), factor)
        if iteration < look:
            continue
        torch.sum(plan, 0, out=by_column)
        error = (by_column - column).abs_().sum(0).add_((plan.sum(1) - row).abs_().sum(0))
        done = waiting & (error < tolerance) if iteration < max_iter else waiting
        waiting = waiting & ~done
        left = int(waiting.sum())
        if left < len(waiting) or not left:
            right = _over(column, by_column)
            found = plan * right if plans else torch.mul(plan, logit, out=scratch).sum(0).mul_(right).sum(0)
            if result is None:
                result = found
            else:
                at = done.nonzero().flatten()
                result.index_copy_(-1, index[at], found.index_select(-1, at))
            if not left:
                break
        if 2 * left <= len(waiting):
            at = waiting.nonzero().flatten()
            plan, logit, row, column = (x.index_select(-1, at) for x in (plan, logit, row, column))
            index, waiting, error = index[at], waiting[at], error[at]
            before, factor = (x if x is None else x[at] for x in (before, factor))
            scratch, by_row, by_column = torch.empty_like(plan), plan.sum(1), torch.empty_like(column)
        if before is not None:
            factor = _faster(1.0 if factor is None else factor, (error / before).log_().div_(iteration - passed).exp_())
        before, passed, look = error, iteration, min(max_iter, iteration + max(LOOK, iteration // 4))
    return result


def _scaling(mass: Tensor, found: Tensor, factor: Tensor | None) -> Tensor:
    """1 + factor (mass / found - 1) in found's memory, never near 0, whence no plan would return; None is 1."""
    ratio = torch.div(mass, found, out=found)
    return ratio if factor is None else ratio.sub_(1).mul_(factor).add_(1).clamp_min_(LEAST)


def _faster(factor: Tensor | float, rate: Tensor) -> Tensor:
    """The best factor of an overrelaxation whose error falls by `rate` a round with `factor`."""
    plain = ((rate + factor - 1).square_() / (rate * factor * factor)).clamp_(0, 1 - 1e-4)
    best = torch.where(rate <= factor - 1, factor, 2 / (1 + (1 - plain).sqrt_()))
    return torch.where(rate < 1, best, 1 + 0.7 * (factor - 1)).clamp_(1, 1.95)


def fits(logit: Tensor) -> bool:
    """Whether `sinkhorn_stacked` can solve logits (N, M, K): no column's values lie further apart than is safe."""
    return not logit.numel() or bool((logit.amax(0) - logit.amin(0)).amax() <= SAFE[logit.dtype])


def _on_chip(logit: Tensor, row: Tensor) -> bool:
    return (
        has_kernels(logit.device)
        and logit.dtype == torch.float32
        and logit.shape[2] <= ROWS
        and not (logit.requires_grad or row.requires_grad)
    )


def _solve_on_chip(
    logit: Tensor, row: Tensor, columns: Ragged, max_iter: int, tolerance: float | None, plans: bool
) -> Tensor:
    from upclose import kernels_transport

    if max_iter < 1:
        raise ValueError(f"max_iter is {max_iter}: give at least 1")
    tolerance, safe = TOLERANCE[logit.dtype] if tolerance is None else tolerance, SAFE[logit.dtype]
    row = row.expand(logit.shape[1:])
    return kernels_transport.solve(logit, row, columns.bounds, max_iter, tolerance, plans, safe, LOOK, LEAST)


def exact(cost: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Optimal transport plans without entropy: POT's network simplex, one problem after the other on the CPU.

    Args:
        cost: (..., N, M) at least 0
        row: (..., N) marginals, at least 0 with sum 1, broadcast over the batch
        column: (..., M) the same for columns

    Returns:
        (..., N, M) of cost's dtype and device, without gradients

    Raises:
        ValueError: as `sinkhorn`
    """
    problem = cost.detach().cpu()
    row, column = (x.double() for x in _marginals(problem, row.detach().cpu(), column.detach().cpu()))
    if not cost.numel():
        return torch.zeros_like(cost)
    _largest(problem)
    n, m = cost.shape[-2:]
    rows, columns = row.expand(cost.shape[:-1]).reshape(-1, n), column.expand(*cost.shape[:-2], m).reshape(-1, m)
    problems = zip(rows, columns, problem.double().reshape(-1, n, m))
    plan = [ot.emd(a.numpy(), b.numpy(), c.numpy()) for a, b, c in problems]
    return torch.from_numpy(np.stack(plan)).reshape(cost.shape).to(cost)


class _Rectangles:
    """Problems (..., N, M), in the terms of `Ragged`: columns last, row sums (..., N, 1)."""

    rows = -2

    def sum(self, x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True)

    def amax(self, x: Tensor) -> Tensor:
        return x.detach().amax(-1, keepdim=True)

    def spread(self, x: Tensor) -> Tensor:
        return x


def _solve(
    layout: _Rectangles | Ragged,
    logit: Tensor,
    row: Tensor,
    column: Tensor,
    bound: float,
    max_iter: int,
    tolerance: float | None,
) -> tuple[Tensor, int]:
    """The plans, in the domain that fits logits that differ by at most `bound`."""
    if max_iter < 1:
        raise ValueError(f"max_iter is {max_iter}: give at least 1")
    tolerance = TOLERANCE[logit.dtype] if tolerance is None else tolerance
    solve = _solve_plain if bound <= SAFE[logit.dtype] else _solve_log
    return solve(layout, logit, row, column, max_iter, tolerance)


def _solve_plain(
    layout: _Rectangles | Ragged, logit: Tensor, row: Tensor, column: Tensor, max_iter: int, tolerance: float
) -> tuple[Tensor, int]:
    """Rounds on the plan itself, with its columns right from the start: scale rows to their mass, then columns."""
    plan, active = _scaled(_columns_of_one(logit, layout.rows), column), None
    for iteration in range(1, max_iter + 1):
        u = _over(row, layout.sum(plan))
        plan = _scaled(plan, layout.spread(u if active is None else torch.where(active, u, 1)))
        mass = plan.sum(layout.rows, keepdim=True)
        v = _over(column, mass)
        plan = _scaled(plan, v if active is None else torch.where(layout.spread(active), v, 1))
        # Between the scalings the columns have all of the error, and no more of it is left in the rows after them.
        wrong = layout.sum((mass - column).detach().abs_()) >= tolerance
        active = wrong if active is None else wrong & active
        if logit.device.type == "cpu":
            left = int(active.sum())
            if left == 0:
                return plan, iteration
            active = None if left == active.numel() else active
    return plan, max_iter


def _columns_of_one(logit: Tensor, rows: int) -> Tensor:
    """The kernel with columns that sum to one. Where rounds start is arbitrary, so that gradients see constants."""
    if logit.requires_grad:
        return (logit - logit.detach().logsumexp(rows, keepdim=True)).exp()
    return logit.softmax(rows)


def _scaled(plan: Tensor, factor: Tensor) -> Tensor:
    """The product, in the plan's own memory unless gradients need what stands there."""
    return plan * factor if plan.requires_grad or factor.requires_grad else plan.mul_(factor)


def _over(mass: Tensor, found: Tensor) -> Tensor:
    """Mass / found, 0 where there is neither."""
    return mass / found.clamp_min(torch.finfo(found.dtype).tiny)


def _solve_log(
    layout: _Rectangles | Ragged,
    logit: Tensor,
    row: Tensor,
    column: Tensor,
    max_iter: int,
    tolerance: float,
) -> tuple[Tensor, int]:
    """The same rounds on logarithms, the cheapest pair of each problem at 0, where floating point is finest."""
    cheapest = layout.amax(logit).amax(layout.rows, keepdim=True)
    logit = logit - layout.spread(cheapest)
    log_row, log_column = _log(row), _log(column)
    log_u, log_v, active, iteration = log_row, log_column, torch.ones_like(cheapest, dtype=torch.bool), 0
    while iteration < max_iter and (logit.device.type != "cpu" or active.any()):
        iteration += 1
        log_u = torch.where(active, log_row - _logsumexp(layout, logit + log_v), log_u)
        log_mass = (logit + layout.spread(log_u)).logsumexp(layout.rows, keepdim=True)
        error = layout.sum(((log_v + log_mass).exp() - column).detach().abs())
        log_v = torch.where(layout.spread(active), log_column - log_mass, log_v)
        active = active & (error >= tolerance)
    return (layout.spread(log_u) + logit + log_v).exp(), iteration


def _logsumexp(layout: _Rectangles | Ragged, x: Tensor) -> Tensor:
    """Over the columns of every problem."""
    top = layout.amax(x)
    return top + layout.sum((x - layout.spread(top)).exp()).log()


def _log(mass: Tensor) -> Tensor:
    """The logarithm of marginals, `NOTHING` where there is no mass."""
    return torch.where(mass > 0, torch.where(mass > 0, mass, 1).log(), NOTHING)


def _marginals(cost: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Both marginals of problems (..., N, M)."""
    _check_problems("cost", cost, -2, -1)
    columns = (*cost.shape[:-2], cost.shape[-1])
    return _marginal("row", row, cost, cost.shape[:-1]), _marginal("column", column, cost, columns)


def _ragged_row(logit: Tensor, row: Tensor, columns: Ragged) -> Tensor:
    """The marginal (B, N) of ragged problems (L, B, N)."""
    _check_problems("logit", logit, 0, 2)
    if len(logit) != len(columns.owner):
        raise ValueError(f"logit has shape {tuple(logit.shape)}, but there are {len(columns.owner)} columns")
    return _marginal("row", row, logit, logit.shape[1:])


def _check_problems(name: str, x: Tensor, *axes: int) -> None:
    """Refuse a dtype that has no solver, and problems without rows or columns, which lie along `axes`."""
    if x.dtype not in SAFE:
        raise ValueError(f"{name} is {x.dtype}: give float32 or float64")
    if x.ndim < 2 or 0 in (x.shape[axis] for axis in axes):
        raise ValueError(f"{name} has shape {tuple(x.shape)}: give every problem at least one row and one column")


def _marginal(name: str, mass: Tensor, cost: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A marginal of cost's dtype that sums to one as nearly as it can say; what has no plan is refused.

    Values are looked at on the CPU only.
    """
    try:
        mass.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name} has shape {tuple(mass.shape)}, but cost {tuple(cost.shape)} needs {tuple(shape)}"
        ) from None
    mass = mass.to(cost)
    total = mass.sum(-1, keepdim=True)
    if cost.device.type == "cpu" and mass.numel():
        _range(name, mass, least=0.0)
        worst = max((sum.item() for sum in total.detach().aminmax()), key=lambda sum: abs(sum - 1))
        if abs(worst - 1) > 1e-4:
            raise ValueError(f"{name} of shape {tuple(mass.shape)} sums to {worst:g}: marginals must sum to 1")
    return mass / total


def _largest(cost: Tensor) -> float:
    """The largest cost, once all are known to be costs."""
    return _range("cost", cost, least=-1e-5)[1]


def _range(name: str, value: Tensor, least: float = -math.inf) -> tuple[float, float]:
    """The smallest and the largest value, once all are known to be finite and not below `least`.

    Infinite where looking at them would stall a device.
    """
    if value.device.type != "cpu":
        return -math.inf, math.inf
    low, high = (extreme.item() for extreme in value.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(
            f"{name} of shape {tuple(value.shape)} holds {low if math.isfinite(high) else high}: give finite values"
        )
    if low < least:
        raise ValueError(f"{name} of shape {tuple(value.shape)} holds {low:g}: no value may be negative")
    return low, high
