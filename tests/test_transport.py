import math

import numpy as np
import ot
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from upclose import transport


def problems(batch=4, n=7, m=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(batch, n, m, generator=generator, dtype=dtype)
    row, column = (torch.rand(batch, k, generator=generator, dtype=dtype) + 0.1 for k in (n, m))
    return cost, row / row.sum(-1, keepdim=True), column / column.sum(-1, keepdim=True)


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.02])
def test_equals_pot(epsilon):
    cost, row, column = problems()
    plan, iterations = transport.sinkhorn(cost, row, column, epsilon, max_iter=5_000, tolerance=1e-10)
    assert 0 < iterations < 5_000
    batch = ot.batch.solve_batch(cost, epsilon, row, column, max_iter=5_000, tol=1e-10, method="log_sinkhorn").plan
    torch.testing.assert_close(plan, batch, atol=1e-6, rtol=0)
    for k in range(len(cost)):
        single = ot.sinkhorn(
            row[k].numpy(),
            column[k].numpy(),
            cost[k].numpy(),
            epsilon,
            method="sinkhorn_log",
            numItermax=5_000,
            stopThr=1e-10,
        )
        np.testing.assert_allclose(plan[k].numpy(), single, atol=1e-6)


def test_small_epsilon_approaches_the_exact_plan():
    cost, row, column = problems()
    best = transport.exact(cost, row, column)
    for k in range(len(cost)):
        np.testing.assert_allclose(
            best[k].numpy(), ot.emd(row[k].numpy(), column[k].numpy(), cost[k].numpy()), atol=1e-10
        )
    gaps = []
    for epsilon in (0.1, 0.01, 1e-3):
        plan, _ = transport.sinkhorn(cost, row, column, epsilon, max_iter=5_000)
        gaps.append(((plan - best) * cost).sum((-2, -1)).max().item())
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-3


def test_kernel_and_log_domain_agree():
    cost, row, column = problems()
    fast, rounds = transport.sinkhorn(cost, row, column, 0.1, tolerance=1e-8)
    slow, same = transport._solve_log(-cost / 0.1, row, column, 1000, 1e-8)
    torch.testing.assert_close(fast, slow, atol=1e-10, rtol=0)
    assert rounds == same


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 500.0])
def test_log_domain_where_the_kernel_would_underflow(dtype, offset):
    cost, row, column = problems(dtype=dtype)
    plan, _ = transport.sinkhorn(cost + offset, row, column, 0.02, max_iter=5_000, tolerance=1e-4)
    reference, _ = transport.sinkhorn(cost.double(), row.double(), column.double(), 0.02, max_iter=5_000)
    assert plan.dtype == dtype
    torch.testing.assert_close(plan.double(), reference, atol=1e-2 if offset else 1e-3, rtol=0)
    torch.testing.assert_close(plan.sum(-1), row, atol=2e-4, rtol=0)


def test_tiny_epsilon_is_finite_in_float32():
    cost, row, column = problems(dtype=torch.float32)
    plan, _ = transport.sinkhorn(cost, row, column, 1e-3, max_iter=5000)
    assert plan.isfinite().all()
    torch.testing.assert_close(plan.sum((-2, -1)), torch.ones(4), atol=1e-3, rtol=0)


@pytest.mark.parametrize("epsilon", [0.1, 1e-3])
def test_massless_rows_and_columns_are_padding(epsilon):
    cost, row, column = problems()
    padded = torch.nn.functional.pad(cost, (0, 3, 0, 2), value=0.3)
    wide = transport.sinkhorn(
        padded, torch.nn.functional.pad(row, (0, 2)), torch.nn.functional.pad(column, (0, 3)), epsilon, 5_000
    )[0]
    plan = transport.sinkhorn(cost, row, column, epsilon, 5_000)[0]
    torch.testing.assert_close(wide[:, :7, :5], plan, atol=1e-10, rtol=0)
    assert not wide[:, 7:].any()
    assert not wide[:, :, 5:].any()


def test_a_problem_does_not_depend_on_its_neighbours():
    easy, hard = problems(1, seed=1), problems(1, seed=2)
    easy = (easy[0] * 0.05, *easy[1:])
    together = [torch.cat(pair) for pair in zip(easy, hard)]
    plan, rounds = transport.sinkhorn(*together, 0.02, tolerance=1e-3)
    alone, fewer = transport.sinkhorn(*easy, 0.02, tolerance=1e-3)
    assert fewer < rounds
    torch.testing.assert_close(plan[:1], alone, atol=1e-14, rtol=0)


def test_early_stop_keeps_its_promise():
    cost, row, column = problems(16)
    for tolerance in (1e-2, 1e-5):
        plan, rounds = transport.sinkhorn(cost, row, column, 0.05, tolerance=tolerance)
        error = (plan.sum(-1) - row).abs().sum(-1) + (plan.sum(-2) - column).abs().sum(-1)
        assert error.max() < tolerance
        assert rounds < 1000
    assert transport.sinkhorn(cost, row, column, 0.05, max_iter=3)[1] == 3


def test_permutation():
    cost, row, column = problems()
    i, j = torch.tensor([3, 1, 6, 0, 5, 2, 4]), torch.tensor([4, 2, 0, 1, 3])
    plan, _ = transport.sinkhorn(cost, row, column, 0.1)
    moved, _ = transport.sinkhorn(cost[:, i][:, :, j], row[:, i], column[:, j], 0.1)
    torch.testing.assert_close(moved, plan[:, i][:, :, j])


def test_many_columns_take_the_matrix_product():
    cost, row, column = problems(3, 6, transport.FEW + 4)
    plan, _ = transport.sinkhorn(cost, row, column, 0.1)
    flipped, _ = transport.sinkhorn(cost.mT, column, row, 0.1)
    torch.testing.assert_close(plan, flipped.mT, atol=1e-7, rtol=0)


def test_shapes_of_one_and_extra_batch_dimensions():
    for n, m in ((1, 5), (7, 1), (1, 1)):
        cost, row, column = problems(4, n, m)
        plan, _ = transport.sinkhorn(cost, row, column, 0.1)
        torch.testing.assert_close(plan, row[:, :, None] * column[:, None, :])
    cost, row, column = problems(6)
    plan, _ = transport.sinkhorn(cost, row, column, 0.1)
    nested, _ = transport.sinkhorn(cost.view(2, 3, 7, 5), row.view(2, 3, 7), column.view(2, 3, 5), 0.1)
    torch.testing.assert_close(nested.flatten(0, 1), plan)
    single, _ = transport.sinkhorn(cost[0], row[0], column[0], 0.1)
    torch.testing.assert_close(single, plan[0])
    assert transport.exact(cost.view(2, 3, 7, 5), row[0], column[0]).shape == (2, 3, 7, 5)
    assert transport.sinkhorn(cost[:0], row[:0], column[:0], 0.1)[0].shape == (0, 7, 5)


def test_infinite_epsilon_is_the_product_of_the_marginals():
    cost, row, column = problems()
    plan, iterations = transport.sinkhorn(cost, row, column, math.inf)
    torch.testing.assert_close(plan, row[:, :, None] * column[:, None, :])
    assert iterations == 1


@pytest.mark.parametrize("epsilon", [0.2, 2e-3])
def test_gradient_of_the_value_is_the_plan(epsilon):
    cost, row, column = problems(2, 4, 3)
    cost.requires_grad_()
    plan, _ = transport.sinkhorn(cost, row, column, epsilon, max_iter=5_000, tolerance=1e-11)
    mass = plan.clamp_min(1e-300)
    value = (plan * cost).sum() + epsilon * (plan * (mass.log() - 1)).sum()
    (gradient,) = torch.autograd.grad(value, cost)
    torch.testing.assert_close(gradient, plan.detach(), atol=1e-6, rtol=0)


def test_gradients_of_the_plan():
    cost, row, column = problems(2, 4, 3)
    row = torch.cat([row, torch.zeros(2, 1).double()], 1)
    cost = torch.cat([cost, torch.ones(2, 1, 3).double()], 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: transport.sinkhorn(c, row, column, 0.2, 50, 1e-15)[0], cost)
    loss = (transport.sinkhorn(cost, row, column, 2e-3)[0] ** 2).sum()  # the log domain, with a massless row
    assert torch.autograd.grad(loss, cost)[0].isfinite().all()


def test_no_device_is_waited_for():
    with FakeTensorMode():
        cost, row, column = (torch.rand(*shape, device="cuda") for shape in ((4, 7, 5), (4, 7), (5,)))
        for epsilon, bound in ((0.1, 2.0), (0.1, None), (math.inf, None)):
            plan, iterations = transport.sinkhorn(cost, row, column, epsilon, max_iter=3, bound=bound)
            assert plan.shape == cost.shape
            assert plan.device.type == "cuda"
            assert iterations == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, a, b: (c.index_fill(1, torch.tensor([2]), math.nan), a, b), r"cost of shape \(4, 7, 5\) holds nan"),
        (lambda c, a, b: (c.index_fill(1, torch.tensor([2]), math.inf), a, b), r"cost of shape \(4, 7, 5\) holds inf"),
        (lambda c, a, b: (c - 2.5, a, b), r"cost of shape \(4, 7, 5\) holds -2.\d+"),
        (lambda c, a, b: (c, a * 1.5, b), r"row of shape \(4, 7\) sums to 1.5"),
        (lambda c, a, b: (c, a, b * math.nan), r"column of shape \(4, 5\) holds nan"),
        (lambda c, a, b: (c, a - 0.5, b), r"row of shape \(4, 7\) holds -0\.\d+"),
        (lambda c, a, b: (c, b, a), r"row has shape \(4, 5\).*\(4, 7\)"),
        (lambda c, a, b: (c[0, 0], a, b), r"cost has shape \(5,\)"),
        (lambda c, a, b: (c[:, :0], a[:, :0], b), r"cost has shape \(4, 0, 5\)"),
        (lambda c, a, b: (c.half(), a, b), "cost is torch.float16"),
    ],
)
def test_errors_quote_shape_and_value(change, message):
    for solve in (lambda *args: transport.sinkhorn(*args, 0.1), transport.exact):
        with pytest.raises(ValueError, match=message):
            solve(*change(*problems()))


@pytest.mark.parametrize(("epsilon", "max_iter"), [(0.0, 10), (-1.0, 10), (math.nan, 10), (0.1, 0)])
def test_parameters_out_of_range(epsilon, max_iter):
    with pytest.raises(ValueError, match=r"epsilon is|max_iter is"):
        transport.sinkhorn(*problems(), epsilon, max_iter)
