"""Optimal transport between small discrete sets, many problems at a time.

Notation: C cost, a row and b column marginals, K = exp(-C / epsilon) the kernel, u and v the scalings, so that the
plan is T = diag(u) K diag(v). A round is u = a / (K v), then v = b / (K' u); the plain solver scales T itself by the
change of u and of v, which needs no other memory than T's.

Source: Cuturi, "Sinkhorn Distances", NeurIPS 2013; Peyré and Cuturi, "Computational Optimal Transport", 2019, ch. 4.
"""

from __future__ import annotations

import math

import numpy as np
import ot
import torch
from torch import Tensor

# Kernel entries stay above exp(-SAFE), so that products of two of them and of their inverses are ordinary numbers.
SAFE = {torch.float32: 40.0, torch.float64: 300.0}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
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
    """
    row, column = _marginals(cost, row, column, epsilon, max_iter)
    if not cost.numel():
        return torch.zeros_like(cost), 0
    tolerance = TOLERANCE[cost.dtype] if tolerance is None else tolerance
    bound = _largest(cost) if bound is None else bound
    plain = math.isinf(epsilon) or bound / epsilon <= SAFE[cost.dtype]
    solve = _solve_plain if plain else _solve_log
    return solve(cost * (-1 / epsilon), row, column, max_iter, tolerance)


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
    row, column = (x.double() for x in _marginals(problem, row.detach().cpu(), column.detach().cpu(), 1.0, 1))
    if not cost.numel():
        return torch.zeros_like(cost)
    _largest(problem)
    n, m = cost.shape[-2:]
    rows, columns = row.expand(cost.shape[:-1]).reshape(-1, n), column.expand(*cost.shape[:-2], m).reshape(-1, m)
    problems = zip(rows, columns, problem.double().reshape(-1, n, m))
    plan = [ot.emd(a.numpy(), b.numpy(), c.numpy()) for a, b, c in problems]
    return torch.from_numpy(np.stack(plan)).reshape(cost.shape).to(cost)


def _solve_plain(logit: Tensor, row: Tensor, column: Tensor, max_iter: int, tolerance: float) -> tuple[Tensor, int]:
    """Rounds on the plan itself, which starts as the kernel: scale its rows to their mass, then its columns."""
    row, column = row[..., None], column[..., None, :]
    plan, active = _scaled(logit.exp_(), column), _everyone(logit)
    for iteration in range(max_iter):
        mass = plan.sum(-1, keepdim=True)  # (..., N, 1)
        if iteration:  # the columns are right after a round, so that the rows have all of the error
            active = active & ((mass - row).detach().abs().sum(-2, keepdim=True) >= tolerance)
        if not _running(active):
            return plan, iteration
        plan = _scaled(plan, torch.where(active, _over(row, mass), 1))  # u
        plan = _scaled(plan, torch.where(active, _over(column, plan.sum(-2, keepdim=True)), 1))  # v
    return plan, max_iter


def _scaled(plan: Tensor, factor: Tensor) -> Tensor:
    """The product, in the plan's own memory unless gradients need what stands there."""
    return plan * factor if plan.requires_grad or factor.requires_grad else plan.mul_(factor)


def _over(mass: Tensor, found: Tensor) -> Tensor:
    """Mass / found, 0 where there is neither."""
    return mass / found.clamp_min(torch.finfo(found.dtype).tiny)


def _solve_log(logit: Tensor, row: Tensor, column: Tensor, max_iter: int, tolerance: float) -> tuple[Tensor, int]:
    """The same rounds on logarithms, the cheapest pair of each problem at 0, where floating point is finest."""
    logit = logit - logit.detach().amax((-2, -1), keepdim=True)
    row, column = row[..., None], column[..., None, :]
    log_row, log_column = _log(row), _log(column)
    log_u, log_v, active, iteration = log_row, log_column, _everyone(logit), 0
    while iteration < max_iter and _running(active):
        iteration += 1
        log_u = torch.where(active, log_row - (logit + log_v).logsumexp(-1, keepdim=True), log_u)  # (..., N, 1)
        log_mass = (logit + log_u).logsumexp(-2, keepdim=True)  # (..., 1, M)
        error = ((log_v + log_mass).exp() - column).detach().abs().sum(-1, keepdim=True)
        log_v, active = torch.where(active, log_column - log_mass, log_v), active & (error >= tolerance)
    return (log_u + logit + log_v).exp(), iteration


def _everyone(logit: Tensor) -> Tensor:
    """(..., 1, 1) bool: no problem is done yet."""
    return torch.ones(*logit.shape[:-2], 1, 1, dtype=torch.bool, device=logit.device)


def _running(active: Tensor) -> bool:
    """Whether another round is needed: known on the CPU, assumed elsewhere."""
    return active.device.type != "cpu" or bool(active.any())


def _log(mass: Tensor) -> Tensor:
    """The logarithm of marginals, `NOTHING` where there is no mass."""
    return torch.where(mass > 0, torch.where(mass > 0, mass, 1).log(), NOTHING)


def _marginals(cost: Tensor, row: Tensor, column: Tensor, epsilon: float, max_iter: int) -> tuple[Tensor, Tensor]:
    """Marginals of cost's dtype that sum to one as nearly as it can say; what has no plan is refused.

    Values are looked at on the CPU only.
    """
    if cost.dtype not in SAFE:
        raise ValueError(f"cost is {cost.dtype}: give float32 or float64")
    if cost.ndim < 2 or 0 in cost.shape[-2:]:
        raise ValueError(f"cost has shape {tuple(cost.shape)}: give (..., N, M) with N and M at least 1")
    if not epsilon > 0:
        raise ValueError(f"epsilon is {epsilon}: give a positive number; `exact` solves the problem without entropy")
    if max_iter < 1:
        raise ValueError(f"max_iter is {max_iter}: give at least 1")
    for name, mass, shape in (("row", row, cost.shape[:-1]), ("column", column, (*cost.shape[:-2], cost.shape[-1]))):
        try:
            mass.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"{name} has shape {tuple(mass.shape)}, but cost {tuple(cost.shape)} needs {tuple(shape)}"
            ) from None
        if cost.device.type == "cpu" and mass.numel():
            _range(name, mass, least=0.0)
            total = mass.detach().sum(-1).flatten()
            worst = total[(total - 1).abs().argmax()].item()
            if abs(worst - 1) > 1e-4:
                raise ValueError(f"{name} of shape {tuple(mass.shape)} sums to {worst:g}: marginals must sum to 1")
    return tuple(mass.to(cost) / mass.to(cost).sum(-1, keepdim=True) for mass in (row, column))


def _largest(cost: Tensor) -> float:
    """The largest cost, once all are known to be costs; infinite where looking at them would stall a device."""
    return _range("cost", cost, least=-1e-5) if cost.device.type == "cpu" else math.inf


def _range(name: str, value: Tensor, least: float) -> float:
    """The largest value, once all are known to be finite and not below `least`."""
    low, high = value.detach().amin().item(), value.detach().amax().item()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(
            f"{name} of shape {tuple(value.shape)} holds {low if math.isfinite(high) else high}: give finite values"
        )
    if low < least:
        raise ValueError(f"{name} of shape {tuple(value.shape)} holds {low:g}: no value may be negative")
    return high
