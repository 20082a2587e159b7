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


def pot(cost, row, column, epsilon, rounds=20_000):
    """POT's plan of one problem in float64, without the rows and columns of no mass, which POT cannot take."""
    cost, row, column = (value.double().numpy() for value in (cost, row, column))
    i, j = row > 0, column > 0
    plan = np.zeros_like(cost)
    solve = {"method": "sinkhorn_log", "numItermax": rounds, "stopThr": 1e-10}
    plan[np.ix_(i, j)] = ot.sinkhorn(row[i] / row.sum(), column[j] / column.sum(), cost[np.ix_(i, j)], epsilon, **solve)
    return torch.from_numpy(plan)


def massless(cost, row, column):
    """The same problems with one row and one column emptied in all of them, and another in the first."""
    row, column = row.clone(), column.clone()
    row[:, 2], row[0, 5], column[:, 1], column[0, 3] = 0, 0, 0, 0
    return cost, row / row.sum(-1, keepdim=True), column / column.sum(-1, keepdim=True)


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.02])
def test_equals_pot(epsilon):
    cost, row, column = problems()
    plan, iterations = transport.sinkhorn(cost, row, column, epsilon, max_iter=5_000, tolerance=1e-10)
    assert 0 < iterations < 5_000
    batch = ot.batch.solve_batch(cost, epsilon, row, column, max_iter=5_000, tol=1e-10, method="log_sinkhorn").plan
    torch.testing.assert_close(plan, batch, atol=1e-6, rtol=0)
    for k, problem in enumerate(zip(cost, row, column)):
        torch.testing.assert_close(plan[k], pot(*problem, epsilon), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [0.1, 1e-3])
def test_equals_pot_without_mass_in_some_rows_and_columns(dtype, epsilon):
    cost, row, column = massless(*problems(dtype=dtype))
    plan, rounds = transport.sinkhorn(cost, row, column, epsilon, max_iter=20_000)
    assert plan.dtype == dtype
    assert rounds < 20_000
    atol = 5e-5 if dtype == torch.float32 else 1e-7
    for k, problem in enumerate(zip(cost, row, column)):
        torch.testing.assert_close(plan[k].double(), pot(*problem, epsilon), atol=atol, rtol=0)


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


def log_domain_only(monkeypatch):
    """Take the log domain from here on, whatever epsilon is."""
    for dtype in transport.SAFE:
        monkeypatch.setitem(transport.SAFE, dtype, 0.0)


def test_kernel_and_log_domain_agree(monkeypatch):
    problem = massless(*problems())
    fast, rounds = transport.sinkhorn(*problem, 0.1, tolerance=1e-11)
    log_domain_only(monkeypatch)
    slow, same = transport.sinkhorn(*problem, 0.1, tolerance=1e-11)
    torch.testing.assert_close(fast, slow, atol=1e-10, rtol=0)
    assert not torch.equal(fast, slow)  # two ways of reckoning
    assert abs(rounds - same) <= 3  # they start from different columns


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 500.0])
def test_log_domain_where_the_kernel_would_underflow(dtype, offset):
    epsilon = 1e-3 if dtype == torch.float64 or not offset else 0.02  # an offset of 500 leaves float32 steps of 3e-5
    cost, row, column = problems(dtype=dtype)
    assert (-(cost + offset) / epsilon).exp().amin() == 0
    plan, _ = transport.sinkhorn(cost + offset, row, column, epsilon, max_iter=20_000, tolerance=1e-6)
    assert plan.dtype == dtype
    close = dict(atol=1e-2 if dtype == torch.float32 and offset else 1e-4, rtol=0)
    for k, problem in enumerate(zip(cost, row, column)):
        torch.testing.assert_close(plan[k].double(), pot(*problem, epsilon), **close)


def test_tiny_epsilon_in_float32():
    cost, row, column = problems(dtype=torch.float32)
    plan, _ = transport.sinkhorn(cost, row, column, 1e-3, max_iter=20_000)
    torch.testing.assert_close(plan.sum(-1), row, atol=2e-5, rtol=0)
    torch.testing.assert_close(plan.sum(-2), column, atol=2e-5, rtol=0)
    exact, _ = transport.sinkhorn(cost.double(), row.double(), column.double(), 1e-3, max_iter=20_000)
    torch.testing.assert_close(plan.double(), exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [0.1, 1e-3])
@pytest.mark.parametrize(("value", "bound"), [(0.3, None), (0.3, 1.0), (1e4, None), (1e4, 1.0)])
def test_massless_rows_and_columns_are_padding(dtype, epsilon, value, bound):
    pad = torch.nn.functional.pad
    cost, row, column = problems(dtype=dtype)
    wide_cost = pad(cost, (0, 3, 0, 2), value=value).requires_grad_()
    wide, _ = transport.sinkhorn(wide_cost, pad(row, (0, 2)), pad(column, (0, 3)), epsilon, 5_000, bound=bound)
    plan, _ = transport.sinkhorn(cost, row, column, epsilon, 5_000)
    atol = 1e-8 if dtype == torch.float64 else 5e-5
    torch.testing.assert_close(wide[:, :7, :5], plan, atol=atol, rtol=0)
    assert not wide[:, 7:].any()
    assert not wide[:, :, 5:].any()
    (gradient,) = torch.autograd.grad((wide**2).sum(), wide_cost)
    assert gradient.isfinite().all()
    assert not gradient[:, 7:].any()
    assert not gradient[:, :, 5:].any()


@pytest.mark.parametrize("epsilon", [0.02, 2e-3])
def test_a_problem_does_not_depend_on_its_neighbours(epsilon):
    easy, hard = problems(1, seed=1), problems(1, seed=2)
    easy = (easy[0] * 0.05, *easy[1:])
    together = [torch.cat(pair) for pair in zip(easy, hard)]
    bound = 1.0  # the same domain for both
    plan, rounds = transport.sinkhorn(*together, epsilon, tolerance=1e-3, bound=bound)
    alone, fewer = transport.sinkhorn(*easy, epsilon, tolerance=1e-3, bound=bound)
    assert fewer < rounds
    torch.testing.assert_close(plan[:1], alone, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_costly_neighbour_takes_a_problem_to_the_log_domain_and_changes_nothing(dtype):
    own, costly = problems(1, seed=1, dtype=dtype), problems(1, seed=2, dtype=dtype)
    together = [torch.cat(pair) for pair in zip(own, (costly[0] * 1e3, *costly[1:]))]
    plan, _ = transport.sinkhorn(*together, 0.1, max_iter=200)
    alone, _ = transport.sinkhorn(*own, 0.1, max_iter=200)
    atol = transport.TOLERANCE[dtype]
    torch.testing.assert_close(plan[:1], alone, atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_marginals_that_sum_to_one_only_nearly_converge_as_fast(dtype):
    cost, row, column = problems(dtype=dtype)
    plan, rounds = transport.sinkhorn(cost, row, column, 0.1)
    for a, b in ((1 + 5e-5, 1), (1, 1 - 5e-5), (1 - 5e-5, 1 + 5e-5)):
        near, count = transport.sinkhorn(cost, row * a, column * b, 0.1)
        assert abs(count - rounds) <= 1 < count
        torch.testing.assert_close(near, plan, atol=1e-4, rtol=0)


@pytest.mark.parametrize("epsilon", [math.inf, 0.1, 1e-3])
def test_what_is_given_is_left_as_it_was(epsilon):
    given = problems(dtype=torch.float32)
    kept = [value.clone() for value in given]
    transport.sinkhorn(*given, epsilon, 50)
    transport.exact(*given)
    for value, before in zip(given, kept):
        assert torch.equal(value, before)


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


def test_transposition():
    cost, row, column = problems(3, 6, 20)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_asking_for_gradients_changes_no_plan(dtype):
    cost, row, column = massless(*problems(dtype=dtype))
    plan, rounds = transport.sinkhorn(cost, row, column, 0.1)
    asked, same = transport.sinkhorn(cost.clone().requires_grad_(), row, column, 0.1)
    torch.testing.assert_close(asked.detach(), plan, atol=1e-6 if dtype == torch.float32 else 1e-14, rtol=0)
    assert rounds == same


@pytest.mark.parametrize("epsilon", [0.2, 2e-3])
def test_gradients_reach_the_marginals(epsilon):
    cost, row, column = problems(2, 4, 3)

    def plan(a, b):
        return transport.sinkhorn(cost, a.softmax(-1), b.softmax(-1), epsilon, 40, 1e-15)[0]

    free = row.log().requires_grad_(), column.log().requires_grad_()
    assert torch.autograd.gradcheck(plan, free)
    # at the end of the rounds the rows sum to `row`, so that raising a row's mass raises its plan by as much
    value = transport.sinkhorn(cost, free[0].softmax(-1), column, epsilon, 5_000, 1e-12)[0][:, 0].sum()
    (gradient,) = torch.autograd.grad(value, free[0])
    share = free[0].softmax(-1).detach()
    expected = share[:, :1] * (torch.eye(4).double()[0] - share)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=0)


def stacked(k=12, n=6, m=5, dtype=torch.float64):
    """Costs (N, M, K), columns of which some have no mass (M, K), and the same problems as `sinkhorn` takes them."""
    cost, _, column = problems(k, n, m, dtype=dtype)
    cost *= torch.linspace(0.1, 1, k)[:, None, None]  # from quick to slow
    column[::3, 1] = 0
    column /= column.sum(-1, keepdim=True)
    row = cost.new_full((n,), 1 / n)
    return cost.permute(1, 2, 0).contiguous(), column.T.contiguous(), (cost, row, column)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [math.inf, 0.1, 0.03])
@pytest.mark.parametrize("rounds", [1, 7, 5_000])
def test_stacked_problems_equal_single_ones(epsilon, rounds, dtype):
    cost, column, single = stacked(dtype=dtype)
    logit = cost * (-1 / epsilon)
    kept = logit.clone()
    assert transport.fits(logit)
    plan = transport.sinkhorn_stacked(logit, column, rounds)
    assert torch.equal(logit, kept)
    expected, _ = transport.sinkhorn(*single, epsilon, rounds, bound=1.0)
    atol = (1e-8 if dtype == torch.float64 else 5e-5) if rounds > 7 else 1e-6
    torch.testing.assert_close(plan.permute(2, 0, 1), expected, atol=atol, rtol=0)
    for k in (0, 3, 11):
        alone = transport.sinkhorn_stacked(logit[..., k : k + 1].contiguous(), column[:, k : k + 1], rounds)
        torch.testing.assert_close(alone[..., 0], plan[..., k], atol=1e-6 if dtype == torch.float32 else 1e-14, rtol=0)


@pytest.mark.parametrize("epsilon", [0.1, 0.03])
@pytest.mark.parametrize("rounds", [1, 7, 5_000])
def test_stacked_values_are_those_of_the_plans(epsilon, rounds):
    cost, column, _ = stacked()
    logit = cost * (-1 / epsilon)
    plan = transport.sinkhorn_stacked(logit, column, rounds)
    value = transport.sinkhorn_stacked(logit, column, rounds, plans=False)
    torch.testing.assert_close(value, (plan * logit).sum((0, 1)), atol=1e-12, rtol=0)
    torch.testing.assert_close(plan.sum(0), column, atol=1e-14, rtol=0)


def test_stacked_problems_that_are_slow_need_fewer_rounds_than_plain_scalings():
    cost, column, single = stacked(40, 9, 9)
    logit = cost * (-1 / 0.02)
    best = transport.sinkhorn_stacked(logit, column, 20_000)
    ours = transport.sinkhorn_stacked(logit, column, 300)
    plain, _ = transport.sinkhorn(*single, 0.02, 300, 1e-9)
    worst = [((plan - best).abs().sum((0, 1))).max().item() for plan in (ours, plain.permute(1, 2, 0))]
    assert worst[0] < worst[1] / 100


def test_stacked_problems_that_would_underflow_do_not_fit():
    logit = torch.zeros(3, 2, 4)
    assert transport.fits(logit)
    assert transport.fits(logit + torch.tensor([0.0, 500.0])[:, None])  # columns may differ
    logit[1, 0, 2] = -41
    assert not transport.fits(logit)
    assert transport.fits(logit.double())
    assert transport.fits(logit[..., :0])
    assert transport.sinkhorn_stacked(logit[..., :0], logit[0, :, :0]).shape == (3, 2, 0)
    with pytest.raises(ValueError, match="max_iter is 0"):
        transport.sinkhorn_stacked(logit, logit[0], 0)


def ragged(images=3, n=6, widths=(4, 1, 7), dtype=torch.float64, seed=0):
    """Costs (L, B, N) of images with classes of several widths, rows with a massless one, owners, classes."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(sum(widths), images, n, generator=generator, dtype=dtype)
    row = torch.rand(images, n, generator=generator, dtype=dtype) + 0.1
    row[0, 2] = 0
    owner = torch.arange(len(widths)).repeat_interleave(torch.tensor(widths))
    return cost, row / row.sum(-1, keepdim=True), owner, len(widths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [math.inf, 0.1, 2e-3])
def test_ragged_problems_equal_single_ones(epsilon, dtype):
    cost, row, owner, classes = ragged(dtype=dtype)
    plan, rounds = transport.sinkhorn_ragged(-cost / epsilon, row, transport.Ragged(owner, classes), 5_000)
    assert plan.shape == cost.shape
    most = 0
    for b in range(len(row)):
        for c in range(classes):
            own = cost[owner == c, b].T
            column = own.new_full(own.shape[1:], 1 / own.shape[1])
            single, count = transport.sinkhorn(own, row[b], column, epsilon, 5_000, bound=1.0)
            most = max(most, count)
            atol = 1e-12 if dtype == torch.float64 else 5e-6
            torch.testing.assert_close(plan[owner == c, b].T, single, atol=atol, rtol=0)
    assert rounds == most if dtype == torch.float64 else abs(rounds - most) <= most / 2


@pytest.mark.parametrize("epsilon", [0.2, 2e-3])
def test_gradients_of_ragged_plans(epsilon):
    cost, row, *columns = ragged(2, 3, (2, 1, 3))
    columns = transport.Ragged(*columns)
    cost.requires_grad_()

    def plan(cost, free):
        return transport.sinkhorn_ragged(-cost / epsilon, free.softmax(-1), columns, 40, 1e-15)[0]

    assert torch.autograd.gradcheck(plan, (cost, row.clamp_min(0.05).log().requires_grad_()))


def test_ragged_errors_and_no_images():
    logit, row, owner, classes = ragged()
    columns = transport.Ragged(owner, classes)
    with pytest.raises(ValueError, match=r"row has shape \(3, 5\).*\(3, 6\)"):
        transport.sinkhorn_ragged(logit, row[:, 1:], columns)
    with pytest.raises(ValueError, match=r"row of shape \(3, 6\) sums to 2"):
        transport.sinkhorn_ragged(logit, row * 2, columns)
    with pytest.raises(ValueError, match=r"logit of shape .* holds nan"):
        transport.sinkhorn_ragged(logit * math.nan, row, columns)
    with pytest.raises(ValueError, match=r"logit has shape \(12, 3, 0\)"):
        transport.sinkhorn_ragged(logit[..., :0], row[:, :0], columns)
    with pytest.raises(ValueError, match=r"logit has shape \(11, 3, 6\), but there are 12 columns"):
        transport.sinkhorn_ragged(logit[1:], row, columns)
    with pytest.raises(ValueError, match=r"classes \[3\] have no description"):
        transport.Ragged(owner, 4)
    for wrong, message in ((owner[[0, 4, 1, *range(3, 12)]], "to 2"), (owner - 1, "to 2"), (owner + 1, "to 2")):
        with pytest.raises(ValueError, match=f"non-decreasing from 0 {message}"):
            transport.Ragged(wrong, classes)
    plan, rounds = transport.sinkhorn_ragged(logit[:, :0], row[:0], columns)
    assert plan.shape == (12, 0, 6)
    assert rounds == 0


def test_ragged_sum_mean_amax_and_spread():
    cost, _, owner, classes = ragged()
    columns = transport.Ragged(owner, classes)
    sums, means, largest = columns.sum(cost), columns.mean(cost), columns.amax(cost)
    for c in range(classes):
        torch.testing.assert_close(sums[c], cost[owner == c].sum(0))
        torch.testing.assert_close(means[c], cost[owner == c].mean(0))
        assert torch.equal(largest[c], cost[owner == c].amax(0))
    assert torch.equal(columns.spread(columns.count), torch.tensor([4] * 4 + [1] + [7] * 7))


def test_no_device_is_waited_for():
    with FakeTensorMode():
        cost, row, column = (torch.rand(*shape, device="cuda") for shape in ((4, 7, 5), (4, 7), (5,)))
        for epsilon, bound in ((0.1, 2.0), (0.1, None), (math.inf, None)):
            plan, iterations = transport.sinkhorn(cost, row, column, epsilon, max_iter=3, bound=bound)
            assert plan.shape == cost.shape
            assert plan.device.type == "cuda"
            assert iterations == 3
        logit, row = torch.rand(12, 3, 6, device="cuda"), torch.rand(3, 6, device="cuda")
        columns = transport.Ragged(torch.zeros(12, dtype=torch.int64, device="cuda"), 3)
        for bound in (2.0, None):
            plan, iterations = transport.sinkhorn_ragged(logit, row, columns, max_iter=3, bound=bound)
            assert plan.shape == logit.shape
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
