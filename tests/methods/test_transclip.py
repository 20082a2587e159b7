import pytest
import torch
from torch.nn.functional import normalize

from upclose import measure, seeds
from upclose.features import Text, Views
from upclose.methods import clip, transclip


def world(n=30, classes=5, dim=16, dtype=torch.float64):
    draw = seeds.generator(0, "transclip", n, classes)
    label = normalize(torch.randn(classes, dim, generator=draw, dtype=torch.float64), dim=-1)
    own = torch.randint(classes, (n,), generator=draw)
    image = normalize(label[own] + 0.4 * torch.randn(n, dim, generator=draw, dtype=torch.float64), dim=-1)
    return image.to(dtype), label.to(dtype), own


def naive(f, t, scale=100.0, k=3, iterations=10):
    """The formulas, image by image and class by class."""
    count, classes, dim = len(f), len(t), f.shape[1]
    y = (scale * f @ t.T).softmax(1)
    z = y.clone()
    w = torch.zeros(count, count, dtype=f.dtype)
    for i in range(count):
        cosine = f @ f[i]
        cosine[i] = -9
        for j in cosine.argsort(descending=True)[: min(k, count - 1)]:
            w[i, j] = cosine[j]
    mu = []
    for c in range(classes):
        top = z[:, c].argsort(descending=True)[:8]
        mu.append(normalize(sum(z[i, c] * f[i] for i in top) / len(top), dim=0))
    sigma = torch.full((dim,), 1 / dim, dtype=f.dtype)
    for step in range(iterations + 1):
        for _ in range(5):
            a = torch.zeros(count, classes, dtype=f.dtype)
            near = w.T @ z + w @ z
            for i in range(count):
                for c in range(classes):
                    a[i, c] = -((f[i] - mu[c]) ** 2 / sigma).sum() / 2 + 50 / (2 * k) * near[i, c]
            z = y * ((a - a.max(1, keepdim=True).values) / 50).exp()
            z = z / z.sum(1, keepdim=True)
        if step < iterations:
            mu = [normalize((z[:, c, None] * f).sum(0), dim=0) for c in range(classes)]
            sigma = sum((z[:, c, None] * (f - mu[c]) ** 2).sum(0) for c in range(classes)) / z.sum()
    return z


@pytest.mark.parametrize(("n", "iterations"), [(12, 10), (5, 2), (2, 1)])
def test_the_assignment_equals_the_formulas(n, iterations):
    f, t, _ = world(n)
    expected = naive(f, t, iterations=iterations)
    assert torch.allclose(transclip.scores(f, t, iterations=iterations), expected, atol=1e-9)
    assert torch.allclose(transclip.scores(f.float(), t.float(), iterations=iterations).double(), expected, atol=1e-4)


def test_rows_sum_to_one_and_order_does_not_matter():
    f, t, _ = world(40)
    z = transclip.scores(f, t)
    assert torch.allclose(z.sum(1), torch.ones(40, dtype=z.dtype))
    order = torch.randperm(40, generator=seeds.generator(0, "order"))
    assert torch.allclose(transclip.scores(f[order], t), z[order], atol=1e-9)


def test_one_image_and_none_have_clips_answer():
    f, t, _ = world(1)
    assert torch.allclose(transclip.scores(f, t), (100 * f @ t.T).softmax(1), atol=1e-9)
    assert transclip.scores(f[:0], t).shape == (0, 5)


def test_an_assignment_that_is_never_updated_is_clip(monkeypatch):
    f, t, _ = world()
    monkeypatch.setattr(transclip, "INNER", 0)
    assert torch.allclose(transclip.scores(f, t), (100 * f @ t.T).softmax(1), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_that_are_all_alike_stay_finite_and_keep_their_answer(dtype):
    f, t, _ = world(1, dtype=dtype)
    z = transclip.scores(f.expand(12, -1), t)
    assert torch.isfinite(z).all()
    assert torch.allclose(z, z[:1].expand_as(z), atol=1e-3)
    assert torch.equal(z.argmax(1), (f @ t.T).argmax(1).expand(12))


def test_duplicates_tie_and_share_their_answer():
    """Copies are each other's nearest; which three of many equal ones count is open, and changes next to nothing."""
    f, t, _ = world(8)
    z = transclip.scores(f.repeat(5, 1), t).view(5, 8, -1)
    assert torch.equal(z.argmax(2), z[:1].argmax(2).expand(5, -1))
    assert torch.allclose(z, z[:1].expand_as(z), atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_class_that_nobody_is_given_does_no_harm(dtype):
    f, t, _ = world(30, dtype=dtype)
    far = -normalize(f.mean(0, keepdim=True), dim=-1)
    z = transclip.scores(f, torch.cat([t, far]))
    assert torch.isfinite(z).all()
    assert z[:, -1].max() < 1e-3
    assert torch.allclose(z[:, :-1], transclip.scores(f, t), atol=1e-3)


def test_neighbours_mend_an_ambiguous_image():
    """An image that CLIP cannot place goes with the images it is like."""
    t = torch.eye(2, 8, dtype=torch.float64)
    style = torch.eye(8, dtype=torch.float64)[2]
    sure = normalize(torch.stack([t[0] + style] * 6 + [t[1]] * 6), dim=-1)
    lost = normalize(0.50 * t[0] + 0.501 * t[1] + 2 * style, dim=0)
    f = torch.cat([sure, lost[None]])
    assert clip.scores(Views(f, f[:, None]), Text(t, t, torch.arange(2)))[-1].argmax() == 1
    assert transclip.scores(f, t)[-1].argmax() == 0


def test_the_start_may_come_from_another_method():
    f, t, own = world(30)
    given = torch.nn.functional.one_hot(own, len(t)).double()
    assert torch.equal(transclip.scores(f, t, start=given).argmax(1), own)
    assert torch.allclose(transclip.scores(f, t, start=f @ t.T + 7), transclip.scores(f, t))


def test_blocks_change_nothing(monkeypatch):
    f, t, _ = world(30)
    whole = transclip.scores(f, t)
    monkeypatch.setattr(transclip, "BLOCK_BYTES", 1)
    assert torch.allclose(transclip.scores(f, t), whole, atol=1e-12)


def test_what_is_refused():
    f, t, _ = world(5)
    with pytest.raises(ValueError, match="norm nan"):
        transclip.scores(f * torch.nan, t)
    with pytest.raises(ValueError, match="neighbours is 0"):
        transclip.scores(f, t, neighbours=0)
    with pytest.raises(ValueError, match=r"start \(5, 2\)"):
        transclip.scores(f, t, start=torch.ones(5, 2))
    with pytest.raises(ValueError, match="25 of the start's scores are not finite"):
        transclip.scores(f, t, start=torch.full((5, 5), torch.nan))


def test_memory_is_a_handful_of_assignments(monkeypatch):
    """Neither all cosines (4 MiB here) nor differences to the centres (18 MiB) are held at once."""
    monkeypatch.setattr(transclip, "BLOCK_BYTES", 2**18)
    f, t, _ = world(1_000, classes=150, dim=32, dtype=torch.float32)
    held = measure.peak_memory(lambda: transclip.scores(f, t, iterations=1), torch.device("cpu"))
    assert held < 8 * f.shape[0] * t.shape[0] * 4 / 2**20
