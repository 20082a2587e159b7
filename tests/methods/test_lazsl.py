import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize

from upclose.features import Text, Views
from upclose.methods import lazsl

COUNTS = [3, 1, 5, 3, 4]


def world(images=4, crops=9, dim=24, counts=COUNTS, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)  # noqa: E731
    image = draw(images, dim)
    views = Views(image, normalize(image[:, None] + draw(images, crops, dim), dim=-1))
    return views, Text.from_lists(draw(len(counts), dim), [draw(m, dim) for m in counts])


def naive(views, text, theta=0.8, epsilon=0.1, selection=True, hybrid=True, rounds=500):
    """Equations 5-17, one image and one class at a time, in float64."""
    views, text = Views(views.image.double(), views.crop.double()), Text(*(part.double() for part in text))
    score, plan = torch.zeros(len(views.image), len(text.label)), {}
    for b, (image, crop) in enumerate(zip(views.image, views.crop)):
        cosine = [float(p @ image) for p in crop]
        delta = sum(cosine) / len(cosine)
        kept = [not selection or value >= delta for value in cosine]
        r = torch.tensor([k / sum(kept) for k in kept], dtype=torch.float64)
        for y in range(len(text.label)):
            q = text.description[text.owner == y]
            sim = crop @ q.T
            if hybrid:
                sim = theta * sim + (1 - theta) * (image @ q.T)
            kernel = torch.exp(-(1 - sim) / epsilon)
            c = torch.full((len(q),), 1 / len(q), dtype=torch.float64)
            v = torch.ones_like(c)
            for _ in range(rounds):
                u = r / (kernel @ v)
                v = c / (kernel.T @ u)
            plan[b, y] = u[:, None] * kernel * v
            score[b, y] = (plan[b, y] * sim).sum()
    return score, plan


@pytest.mark.parametrize("selection", [True, False])
@pytest.mark.parametrize("hybrid", [True, False])
def test_equals_the_equations(selection, hybrid):
    views, text = world()
    score, plan = naive(views, text, selection=selection, hybrid=hybrid)
    ours = lazsl.scores(views, text, selection=selection, hybrid=hybrid)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, score, atol=1e-5, rtol=0)
    plans = lazsl.plans(views, text, selection=selection, hybrid=hybrid)
    assert plans.shape == (4, 5, 9, 5)
    for (b, y), expected in plan.items():
        torch.testing.assert_close(plans[b, y, :, : COUNTS[y]].double(), expected, atol=1e-5, rtol=0)
        assert not plans[b, y, :, COUNTS[y] :].any()


def test_small_epsilon_uses_the_log_domain():
    views, text = world()
    score, _ = naive(views, text, epsilon=0.02, rounds=4000)
    ours = lazsl.scores(views, text, epsilon=0.02, max_iter=4000)
    torch.testing.assert_close(ours, score, atol=1e-4, rtol=0)


def test_plans_have_their_marginals():
    views, text = world()
    plans = lazsl.plans(views, text)
    row = lazsl.crop_mass(views)
    torch.testing.assert_close(plans.sum(-1), row[:, None].expand(-1, 5, -1), atol=2e-5, rtol=0)
    _, mask = text.padded()
    torch.testing.assert_close(plans.sum(-2), (mask / text.counts[:, None]).expand(4, -1, -1), atol=2e-5, rtol=0)


def test_selection_drops_crops_below_the_mean():
    views, text = world()
    cosine = (views.crop * views.image[:, None]).sum(-1)
    kept = cosine >= cosine.mean(-1, keepdim=True)
    assert kept.any(-1).all()
    assert not kept.all(-1).any()
    torch.testing.assert_close(lazsl.crop_mass(views), kept / kept.sum(-1, keepdim=True))
    scores = lazsl.scores(views, text)
    for b in range(4):
        alone = Views(views.image[b : b + 1], views.crop[b : b + 1, kept[b]])
        dropped = lazsl.scores(alone, text, selection=False)
        torch.testing.assert_close(dropped[0], scores[b], atol=1e-6, rtol=0)


def test_equal_cosines_keep_every_crop():
    views, _ = world(crops=1)
    same = Views(views.image, views.crop.repeat(1, 30, 1))
    torch.testing.assert_close(lazsl.crop_mass(same), torch.full((4, 30), 1 / 30))


def description_mean(image, text):
    cosine = image @ text.description.T
    return torch.stack([cosine[:, text.owner == y].mean(-1) for y in range(len(text.label))], 1)


def test_degenerate_cases():
    views, text = world()
    clip_d = description_mean(views.image, text)
    close = dict(atol=1e-6, rtol=0)
    torch.testing.assert_close(lazsl.scores(views, text, theta=0.0), clip_d, **close)
    one = Views(views.image, views.image[:, None])
    torch.testing.assert_close(lazsl.scores(one, text), clip_d, **close)
    torch.testing.assert_close(
        lazsl.scores(views, text, hybrid=False), lazsl.scores(views, text, theta=1.0), atol=0, rtol=0
    )
    row = lazsl.crop_mass(views)
    product = lazsl.plans(views, text, epsilon=math.inf)
    _, mask = text.padded()
    expected = row[:, None, :, None] * (mask / text.counts[:, None])[None, :, None, :]
    torch.testing.assert_close(product, expected, **close)
    control = description_mean(views.crop.mean(1), text)
    plain = lazsl.scores(views, text, epsilon=math.inf, selection=False, hybrid=False)
    torch.testing.assert_close(plain, control, **close)


def test_the_image_only_rescales_epsilon():
    views, text = world()
    plan = lazsl.plans(views, text, theta=0.8, epsilon=0.1)
    torch.testing.assert_close(plan, lazsl.plans(views, text, hybrid=False, epsilon=0.125), atol=1e-5, rtol=0)


def test_invariance_to_batches_order_and_padding(monkeypatch):
    views, text = world(images=7)
    scores, plans = lazsl.scores(views, text), lazsl.plans(views, text)
    monkeypatch.setitem(lazsl.PAIRS, "cpu", 1)
    torch.testing.assert_close(lazsl.scores(views, text), scores, atol=2e-6, rtol=0)
    torch.testing.assert_close(lazsl.plans(views, text), plans, atol=1e-5, rtol=0)
    monkeypatch.undo()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    shuffled = Views(views.image, views.crop[:, order])
    torch.testing.assert_close(lazsl.scores(shuffled, text), scores, atol=2e-6, rtol=0)
    torch.testing.assert_close(lazsl.plans(shuffled, text), plans[:, :, order], atol=1e-5, rtol=0)
    per_class = text.description.split(COUNTS)
    classes = [4, 2, 0]
    fewer = Text.from_lists(text.label[classes], [per_class[y].flip(0) for y in classes])
    torch.testing.assert_close(lazsl.scores(views, fewer), scores[:, classes], atol=2e-6, rtol=0)
    assert lazsl.scores(views.select(slice(0, 0)), text).shape == (0, 5)


def test_gradients_reach_the_crops():
    views, text = world()
    crop = views.crop.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(lazsl.scores(Views(views.image, crop), text).sum(), crop)
    assert gradient.isfinite().all()
    massless = lazsl.crop_mass(views) == 0
    assert not gradient[massless].any()
    assert gradient[~massless].any()


def test_errors():
    views, text = world()
    with pytest.raises(ValueError, match=r"theta is 1.5"):
        lazsl.scores(views, text, theta=1.5)
    with pytest.raises(ValueError, match=r"epsilon is 0"):
        lazsl.scores(views, text, epsilon=0)
    with pytest.raises(ValueError, match=r"holds nan"):
        lazsl.scores(Views(views.image, views.crop * math.nan), text, selection=False)


def test_no_device_is_waited_for():
    with FakeTensorMode():
        cuda = lambda *shape: torch.rand(*shape, device="cuda")  # noqa: E731
        views = Views(cuda(4, 24), cuda(4, 9, 24))
        length = lazsl._Length(3, torch.zeros(2, dtype=torch.int64, device="cuda"), cuda(6, 24))
        plan, sim = lazsl._align(views.crop, lazsl.crop_mass(views), length, 0.1, 5, 1e-5)
        assert plan.shape == sim.shape == (2, 4, 9, 3)
        assert plan.device.type == "cuda"
