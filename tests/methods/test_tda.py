from math import log2

import pytest
import torch
from torch.nn.functional import normalize

from upclose import seeds
from upclose.methods import tda


def world(n=60, classes=4, dim=8, spread=0.7):
    draw = seeds.generator(0, "tda", n, classes)
    label = normalize(torch.randn(classes, dim, generator=draw, dtype=torch.float64), dim=-1)
    own = torch.randint(classes, (n,), generator=draw)
    return normalize(label[own] + spread * torch.randn(n, dim, generator=draw, dtype=torch.float64), dim=-1), label


def naive(images, t, alpha=2.0, beta=5.0, capacity=3, negative=True, scale=100.0):
    """An image at a time, with two caches in lists."""
    good, bad, out = {}, {}, []

    def admit(cache, c, item, room):
        row = cache.setdefault(c, [])
        if len(row) < room:
            row.append(item)
        elif room and item[0] < row[-1][0]:
            row[-1] = item
        row.sort(key=lambda x: x[0])

    for f in images:
        l = scale * t @ f
        p = l.softmax(0)
        h = -(p * l.log_softmax(0)).sum().item()
        c = int(l.argmax())
        admit(good, c, (h, f, p), capacity)
        if negative and 0.2 < h / log2(len(t)) < 0.5:
            admit(bad, c, (h, f, p), min(2, capacity))
        l = l.clone()
        for y, row in good.items():
            for _, k, _ in row:
                l[y] += alpha * torch.exp(-(beta - beta * (f @ k)))
        for row in bad.values():
            for _, k, q in row:
                l -= 0.117 * torch.exp(-(1 - f @ k)) * ((q > 0.03) & (q < 1))
        out.append(l)
    return torch.stack(out)


@pytest.mark.parametrize(
    "setting", [{}, {"negative": False}, {"capacity": 1, "alpha": 1.0, "beta": 8.0}, {"logit_scale": 5.0}]
)
def test_the_stream_equals_a_loop_with_two_lists(setting):
    f, t = world()
    expected = naive(f, t, **{"scale" if k == "logit_scale" else k: v for k, v in setting.items()})
    assert torch.allclose(tda.stream(f, t, **setting), expected, atol=1e-9)
    assert torch.allclose(tda.stream(f.float(), t.float(), **setting).double(), expected, atol=1e-4)


@pytest.mark.parametrize("n", [1, 5])
def test_few_images_and_copies_that_tie_equal_the_loop(n):
    f, t = world(n)
    f = f.repeat(4, 1)
    assert torch.allclose(tda.stream(f, t), naive(f, t), atol=1e-9)


def test_a_class_that_nobody_is_given_gets_no_vote_for_it():
    f, t = world()
    far = -normalize(f.mean(0, keepdim=True), dim=-1)
    f, t = f[(f @ far.T).squeeze() < 0], torch.cat([t, far])
    gain = tda.stream(f, t) - 100 * f @ t.T
    assert (100 * f @ t.T).argmax(1).max() < len(t) - 1
    assert gain[:, -1].abs().max() < 1e-9


def test_both_caches_are_at_work_in_this_test():
    f, t = world()
    plain = tda.stream(f, t, capacity=0)
    assert not torch.equal(tda.stream(f, t, alpha=0.0), plain)
    assert not torch.equal(tda.stream(f, t, negative=False), plain)


def test_no_capacity_is_clip():
    f, t = world()
    assert torch.equal(tda.stream(f, t, capacity=0), 100 * f @ t.T)


def test_later_images_and_blocks_change_nothing(monkeypatch):
    f, t = world()
    whole = tda.stream(f, t)
    assert torch.allclose(tda.stream(f[:17], t), whole[:17], atol=1e-4)
    monkeypatch.setattr(tda, "BLOCK", 7)
    assert torch.allclose(tda.stream(f, t), whole, atol=1e-4)


def test_the_order_matters_and_the_same_order_gives_the_same():
    f, t = world()
    assert torch.equal(tda.stream(f, t), tda.stream(f, t))
    back = tda.stream(f.flip(0), t).flip(0)
    assert not torch.allclose(back, tda.stream(f, t), atol=1e-3)


def test_copies_of_one_image_fill_a_cache_once():
    f, t = world(1)
    many = tda.stream(f.expand(10, -1), t, negative=False)
    assert torch.allclose(many[2:], many[2:3].expand(8, -1))
    assert torch.allclose(many.max(1).values[:3].diff(), torch.full((2,), 2.0, dtype=f.dtype), atol=1e-4)


def test_one_class_and_no_image():
    f, t = world(3, classes=1)
    assert tda.stream(f, t).shape == (3, 1)
    assert tda.stream(f[:0], t).shape == (0, 1)


def test_what_is_refused():
    f, t = world(5)
    with pytest.raises(ValueError, match="norm nan"):
        tda.stream(f * torch.nan, t)
    with pytest.raises(ValueError, match="capacity of -1"):
        tda.stream(f, t, capacity=-1)
