"""The transport kernel against the torch solver, by Triton's interpreter on small problems, and compiled for a GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize

from test_transport import pot, ragged
from upclose import seeds, transport
from upclose.features import Text, Views
from upclose.methods import dnd, lazsl

triton = pytest.importorskip("triton", reason="kernels are written in Triton, which comes with torch on Linux")
with pytest.MonkeyPatch.context() as patch:  # read once, when the kernels are defined
    if not torch.cuda.is_available():  # where there is a GPU they are compiled, for tests/test_gpu.py
        patch.setenv("TRITON_INTERPRET", "1")
    from triton.runtime.interpreter import InterpretedFunction

    from upclose import kernels_transport


@pytest.fixture
def interpreted(monkeypatch):
    """Ragged problems on the CPU are solved by the kernel too, and Triton's own functions are interpreted."""
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled here: tests/test_gpu.py runs them")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in ("sum", "max", "min"):
        own = getattr(triton.language, name)
        monkeypatch.setattr(triton.language, name, InterpretedFunction(own.fn))
    return monkeypatch


def problem(widths=(3, 2), n=4):
    cost, row, owner, classes = ragged(2, n, widths, torch.float32)
    return cost, row, transport.Ragged(owner, classes)


@pytest.mark.parametrize(("epsilon", "offset"), [(0.6, 0.0), (1e18, 0.0), (0.6, 60.0)])
@pytest.mark.parametrize("width", [None, 2])
def test_plans_and_what_they_move_equal_the_torch_solver_s(interpreted, epsilon, offset, width):
    """Plain, flat, and too far apart for the plain kernel; with a tile as wide as the widest class, and narrower."""
    cost, row, columns = problem()
    logit = -cost / epsilon + offset * torch.linspace(0, 1, 4)
    if width:
        interpreted.setattr(kernels_transport, "tile", lambda rows, *_: (triton.next_power_of_2(rows), width))
    plan, _ = transport.sinkhorn_ragged(logit, row, columns)
    moved = transport.moved_ragged(logit, row, columns)
    interpreted.delenv("TRITON_INTERPRET")
    expected, _ = transport.sinkhorn_ragged(logit.double(), row.double(), columns)
    torch.testing.assert_close(plan.double(), expected, atol=1e-5, rtol=0)
    assert not plan[:, 0, 2].any()  # the massless row
    torch.testing.assert_close(moved, columns.sum((plan * logit).sum(-1)), atol=1e-5, rtol=1e-5)


def test_a_plan_equals_pot_s(interpreted):
    cost, row, columns = problem((3,))
    plan, _ = transport.sinkhorn_ragged(-cost / 0.5, row, columns)
    for b in range(2):
        expected = pot(cost[:, b].T, row[b], torch.full((3,), 1 / 3), 0.5)
        torch.testing.assert_close(plan[:, b].T.double(), expected, atol=1e-5, rtol=0)


def test_rounds_end_when_a_problem_is_done_or_they_are_used_up(interpreted):
    cost, row, columns = problem((2,), 3)
    ours, _ = transport.sinkhorn_ragged(-cost / 0.05, row, columns, 2)
    loose, _ = transport.sinkhorn_ragged(-cost / 0.05, row, columns, 50, tolerance=3.0)
    interpreted.delenv("TRITON_INTERPRET")
    for plan, rounds in ((ours, 2), (loose, 1)):
        expected, _ = transport.sinkhorn_ragged(-cost / 0.05, row, columns, rounds, 1e-9)
        torch.testing.assert_close(plan[:, 1], expected[:, 1], atol=1e-6, rtol=0)  # without a massless row


def unit(draw, *shape):
    common = torch.ones(shape[-1])
    return normalize(common + 0.5 * torch.randn(*shape, generator=draw), dim=-1)


def test_lazsl_and_dnd_score_alike_with_the_kernel(interpreted):
    draw = seeds.generator(0, "kernels")
    text = Text.from_lists(unit(draw, 2, 16), [unit(draw, m, 16) for m in (2, 3)])
    views = Views(unit(draw, 2, 16), unit(draw, 2, 3, 16))
    ours = [lazsl.scores(views, text), dnd.scores(views, text, epsilon=0.1), dnd.max_scores(views, text)]
    interpreted.delenv("TRITON_INTERPRET")
    expected = [lazsl.scores(views, text), dnd.scores(views, text, epsilon=0.1), dnd.max_scores(views, text)]
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_problems_that_the_kernel_does_not_take(interpreted):
    cost, row, columns = problem()
    for logit in (-cost.double(), -cost.requires_grad_()):
        plan, rounds = transport.sinkhorn_ragged(logit, row, columns, 300)
        assert rounds < 300  # the torch solver counts its rounds
        assert plan.dtype == logit.dtype
    with pytest.raises(ValueError, match="max_iter is 0"):
        transport.moved_ragged(-cost.detach(), row, columns, 0)
    with pytest.raises(ValueError, match="but there are 5 columns"):
        transport.moved_ragged(-cost.detach()[1:], row, columns)


def test_a_tile_holds_most_classes_and_fits_the_chip():
    assert kernels_transport.tile(90, 1200, 200) == (128, 16)
    assert kernels_transport.tile(9, 9000, 1000) == (16, 16)
    for rows, columns, classes in ((transport.ROWS, 9, 1), (1, 10**6, 2), (60, 5000, 100)):
        n, m = kernels_transport.tile(rows, columns, classes)
        assert n >= rows
        assert n * m <= kernels_transport.ENTRIES
    assert transport.ROWS <= kernels_transport.ENTRIES


def test_no_device_is_waited_for():
    with FakeTensorMode(), torch.device("cuda"):
        logit, row = torch.rand(12, 3, 6), torch.rand(3, 6)
        columns = transport.Ragged(torch.zeros(12, dtype=torch.int64), 3)
        moved = transport.moved_ragged(logit, row, columns)
        plan, _ = transport.sinkhorn_ragged(logit, row, columns)
        assert (moved.device.type, moved.shape, plan.shape) == ("cuda", (3, 3), (12, 3, 6))


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m", "warps"), [(16, 16, 1), (128, 16, 4), (128, 64, 8)])
def test_the_kernel_compiles_for_hopper(n, m, warps):
    """In a process that does not interpret: Triton's compiler needs no GPU."""
    import subprocess
    import sys

    program = f"""
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from upclose.kernels_transport import _solve
kinds = dict(logit="*fp32", row="*fp32", start="*i64", out="*fp32", classes="i32", images="i32", size="i32")
kinds |= dict(max_iter="i32", tolerance="fp32", SAFE="fp32")
sizes = dict(PLANS=False, LOOK=5, LEAST=0.05, N={n}, M={m})
source = ASTSource(_solve, kinds | dict.fromkeys(sizes, "constexpr"), constexprs=sizes)
print(len(compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps={warps})).asm["ptx"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1000
