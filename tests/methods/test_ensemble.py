import pytest
import torch
import torch.nn.functional as F

from upclose.methods import ensemble
from upclose.seeds import generator


def test_affine_and_its_gradients():
    x, weight, bias = (
        torch.randn(shape, generator=generator(0), dtype=torch.float64, requires_grad=True)
        for shape in ((3, 4, 5), (3, 5, 2), (3, 1, 2))
    )
    torch.testing.assert_close(ensemble.affine(x, weight, bias), torch.baddbmm(bias, x, weight))
    assert torch.autograd.gradcheck(ensemble.affine, (x, weight, bias))
    assert torch.autograd.gradcheck(ensemble.affine, (x[:1].detach().expand(3, -1, -1), weight, bias))


def test_cosines_and_their_gradients():
    pair = torch.randn(2, 3, 2, 5, generator=generator(0, "pair"), dtype=torch.float64, requires_grad=True)
    label = F.normalize(torch.randn(4, 5, generator=generator(0, "label"), dtype=torch.float64), dim=-1)
    between, with_labels = ensemble.cosines(pair, label)
    torch.testing.assert_close(between, F.cosine_similarity(*pair.unbind(2), dim=-1))
    torch.testing.assert_close(with_labels, F.normalize(pair, dim=-1) @ label.T)
    assert torch.autograd.gradcheck(ensemble.cosines, (pair, label))


def test_layers_start_uniform_and_apart():
    part = 20 * torch.cat(ensemble.linear([0], 400, 300, "key", like=torch.empty(0)), 1)
    assert part.abs().max() <= 1
    assert abs(part.mean()) < 0.01
    assert abs(part.var() - 1 / 3) < 0.005
    square = ensemble.network([0], 8, 8, 8, "key", like=torch.empty(0))
    assert not torch.equal(square.weight_in, square.weight_out)


def test_every_seed_sees_every_row_once_an_epoch_in_an_order_of_its_own():
    weight, seen = torch.zeros(2, 1, requires_grad=True), []

    def loss(index):
        seen.append(index)
        return weight.sum()

    assert list(ensemble.train([weight], loss, 7, [3, 4], 2, 3, 0.1, 0.0)) == [0, 1]
    assert [index.shape[1] for index in seen] == [3, 3, 1] * 2
    first, second = torch.cat(seen[:3], 1), torch.cat(seen[3:], 1)
    assert (first.sort().values == torch.arange(7)).all()
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)


def test_a_shape_that_is_not_asked_for_is_an_error():
    with pytest.raises(ValueError, match=r"y is \(3, 2\): give \(N, D\) with D = 4"):
        ensemble.check_shape(torch.empty(3, 2), "y", N=None, D=4)
