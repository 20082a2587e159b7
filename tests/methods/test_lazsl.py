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


def test_own_plans_are_the_plans_of_one_class_an_image():
    views, text = world()
    label = torch.tensor([4, 1, 2, 0])
    for options in ({}, {"selection": False, "hybrid": False, "epsilon": 0.02, "max_iter": 1000}, {"theta": 0.3}):
        own = lazsl.plans(views, text, label, **options)
        every = lazsl.plans(views, text, **options)
        assert own.shape == (4, 9, 5)
        torch.testing.assert_close(own, every[torch.arange(4), label], atol=1e-5, rtol=0)
        for b, y in enumerate(label.tolist()):
            assert not own[b, :, COUNTS[y] :].any()
    with pytest.raises(ValueError, match=r"theta is 1.5"):
        lazsl.plans(views, text, label, theta=1.5)


def clip_like(images=4, crops=60, classes=12, dim=512):
    """Two cones, as CLIP's: cosines of pictures with words are about 0.26 with a deviation of 0.03."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator) / dim**0.5  # noqa: E731
    words, pictures, topic = draw(dim), draw(dim), draw(classes, dim)
    owner = torch.arange(classes).repeat_interleave(torch.arange(classes) % 7 + 3)
    description = normalize(1.2 * words + 0.25 * pictures + 0.6 * topic[owner] + 0.5 * draw(len(owner), dim), dim=-1)
    image = pictures + 0.25 * words + 0.4 * topic[torch.arange(images) % classes] + 0.5 * draw(images, dim)
    image = normalize(image, dim=-1)
    crop = normalize(image[:, None] + 0.5 * draw(images, crops, dim), dim=-1)
    cosine = crop @ description.T
    assert 0.2 < cosine.mean() < 0.32
    assert 0.02 < cosine.std() < 0.05
    return Views(image, crop), Text(normalize(words + topic, dim=-1), description, owner)


def released(views, text, stop=1e-2, theta=0.8, epsilon=0.1):
    """Scores under the stop rule of the authors' program, mean change of u below `stop` or 100 rounds; rounds run."""
    out, rounds = torch.zeros(len(views.image), len(text.label)), []
    for b, (image, crop) in enumerate(zip(views.image, views.crop)):
        keep = (crop @ image >= (crop @ image).mean()).float()
        row = keep / keep.sum()
        for y in range(len(text.label)):
            q = text.description[text.owner == y]
            sim = theta * crop @ q.T + (1 - theta) * image @ q.T
            kernel, u, v = ((sim - 1) / epsilon).exp(), torch.ones(len(crop)), torch.ones(len(q))
            for step in range(1, 101):  # noqa: B007
                before, u = u, row / (kernel @ v)
                v = 1 / len(q) / (kernel.T @ u)
                if (u - before).abs().mean() < stop:
                    break
            rounds.append(step)
            out[b, y] = (u[:, None] * kernel * v * sim).sum()
    return out, rounds


def test_the_released_stop_rule_gives_the_same_scores_to_1e_4():
    views, text = clip_like()
    ours = lazsl.scores(views, text)
    theirs, rounds = released(views, text)
    assert max(rounds) < 100
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert torch.equal(ours.argmax(1), theirs.argmax(1))
    converged, more = released(views, text, stop=0)
    assert min(more) == 100
    torch.testing.assert_close(ours, converged, atol=1e-5, rtol=0)


def test_errors():
    views, text = world()
    with pytest.raises(ValueError, match=r"theta is 1.5"):
        lazsl.scores(views, text, theta=1.5)
    with pytest.raises(ValueError, match=r"epsilon is 0"):
        lazsl.scores(views, text, epsilon=0)


@pytest.mark.parametrize("selection", [True, False])
@pytest.mark.parametrize("function", [lazsl.scores, lazsl.plans])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, t: (v._replace(crop=v.crop.index_fill(1, torch.tensor([2]), math.nan)), t), r"crop.*norm nan"),
        (lambda v, t: (v._replace(image=v.image.index_fill(0, torch.tensor([1]), math.inf)), t), r"image.*norm inf"),
        (lambda v, t: (v, t._replace(description=t.description * math.nan)), r"description.*norm nan"),
        (lambda v, t: (v._replace(crop=v.crop * 1.5), t), r"crop.*norm 1\.5"),
        (lambda v, t: (v._replace(image=v.image * 0.5), t), r"image.*norm 0\.5"),
        (lambda v, t: (v, t._replace(description=t.description * 3)), r"description.*norm 3"),
        (lambda v, t: (v._replace(crop=v.crop[:, :0]), t), r"crop.*\(4, 0, 24\)"),
        (lambda v, t: (v, t._replace(owner=t.owner.where(t.owner != 1, 2))), r"classes \[1\] have no description"),
    ],
)
def test_what_is_no_embedding_is_refused(function, selection, change, message):
    views, text = change(*world())
    with pytest.raises(ValueError, match=message):
        function(views, text, selection=selection)


def test_no_device_is_waited_for():
    with FakeTensorMode():
        cuda = lambda *shape: torch.rand(*shape, device="cuda")  # noqa: E731
        views = Views(cuda(4, 24), cuda(4, 9, 24))
        text = Text(cuda(2, 24), cuda(6, 24), torch.zeros(6, dtype=torch.int64, device="cuda"))
        for epsilon in (0.1, 0.01, math.inf):
            scores = lazsl.scores(views, text, epsilon=epsilon, max_iter=5)
            assert scores.shape == (4, 2)
            assert scores.device.type == "cuda"


def test_the_log_domain_in_float32():
    once = views, text = world()
    twice = (
        Views(views.image.double(), views.crop.double()),
        Text(text.label.double(), text.description.double(), text.owner),
    )
    options, label = dict(epsilon=1e-3, max_iter=5_000), torch.tensor([0, 1, 1, 2])
    close = dict(atol=1e-3, rtol=0)
    torch.testing.assert_close(lazsl.scores(*once, **options), lazsl.scores(*twice, **options), atol=1e-4, rtol=0)
    torch.testing.assert_close(lazsl.plans(*once, **options).double(), lazsl.plans(*twice, **options), **close)
    own = lazsl.plans(*once, label, **options), lazsl.plans(*twice, label, **options)
    torch.testing.assert_close(own[0].double(), own[1], **close)


def test_on_a_device_no_crop_is_left_out():
    with FakeTensorMode():
        views = Views(torch.rand(4, 24, device="cuda"), torch.rand(4, 9, 24, device="cuda"))
        owner = torch.zeros(6, dtype=torch.int64, device="cuda")
        text = Text(torch.rand(1, 24, device="cuda"), torch.rand(6, 24, device="cuda"), owner)
        pieces = list(lazsl._pieces(views, text, torch.rand(4, 9, device="cuda")))
    assert [(crop.shape, row.shape) for _, crop, row in pieces] == [((4, 9, 24), (4, 9))]


def test_descriptions_out_of_order_and_labels_of_another_number_are_refused():
    views, text = world()
    with pytest.raises(ValueError, match="class after class"):
        text._replace(owner=text.owner.flip(0)).padded()
    with pytest.raises(ValueError, match=r"4 images, but labels \(1,\)"):
        lazsl.plans(views, text, torch.tensor([0]))


def test_the_exact_plan_is_the_limit_of_a_small_epsilon():
    views, text = world()
    sharp = lazsl.scores(views, text, epsilon=1e-3, max_iter=20_000, tolerance=1e-6)
    torch.testing.assert_close(lazsl.exact_scores(views, text), sharp, atol=2e-3, rtol=0)
    assert (lazsl.exact_scores(views, text) >= sharp - 1e-5).all()  # no plan is better


def test_the_released_loop_without_its_stop_is_lazsl():
    views, text = world()
    to_the_end, rounds = lazsl.released_scores(views, text, stop=0)
    torch.testing.assert_close(to_the_end, lazsl.scores(views, text, max_iter=1000), atol=1e-5, rtol=0)
    assert rounds == 100
    assert lazsl.released_scores(views, text)[1] < 100
