from math import e, exp

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize

from upclose import seeds
from upclose.features import Text, Views
from upclose.methods import clip, wca

COUNTS = (3, 1, 4, 2)


def unit(*shape, key="wca"):
    return normalize(torch.randn(*shape, 16, generator=seeds.generator(0, key, *shape)), dim=-1)


@pytest.fixture
def world():
    return Views(unit(5), unit(5, 7)), Text.from_lists(unit(4, key="y"), [unit(m, key="t") for m in COUNTS])


def naive(views, text, image_scale, text_scale):
    """FAIR's eqs. 7-10, one number at a time."""
    out = torch.zeros(len(views.image), len(text.label))
    for b, f in enumerate(views.image):
        for c, y in enumerate(text.label):
            t = text.description[text.owner == c]
            w = [exp(image_scale * (f @ x).item()) for x in views.crop[b]]
            v = [exp(text_scale * (y @ row).item()) for row in t]
            theta = views.crop[b] @ t.T
            for i in range(len(w)):
                for j in range(len(v)):
                    out[b, c] += w[i] / sum(w) * v[j] / sum(v) * theta[i, j]
    return out


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.0, 1.0), (5.0, 0.0), (e**4, e**2)])
def test_scores_equal_the_equations(world, scale):
    found = wca.scores(*world, image_scale=scale[0], text_scale=scale[1])
    assert torch.allclose(found, naive(*world, *scale), atol=1e-6)


def test_released_normalises_both_weighted_means(world):
    views, text = world
    found = wca.scores(views, text, **wca.RELEASED)
    for b in range(5):
        w = (e**4 * views.crop[b] @ views.image[b]).softmax(0)
        for c in range(4):
            t = text.description[text.owner == c]
            v = (e**2 * t @ text.label[c]).softmax(0)
            expected = torch.cosine_similarity(w @ views.crop[b], v @ t, dim=0)
            assert found[b, c].item() == pytest.approx(expected.item(), abs=1e-6)


def test_scale_0_is_the_multi_crop_control(world):
    assert torch.allclose(wca.scores(*world, image_scale=0, text_scale=0), clip.multi_crop_scores(*world), atol=1e-6)


def test_one_crop_that_is_the_image_and_uniform_text_is_clip_d(world):
    views, text = world
    same = Views(views.image, views.image[:, None])
    assert torch.allclose(wca.scores(same, text, text_scale=0), clip.description_scores(views, text), atol=1e-6)


def test_one_class_description_that_is_the_prompt_and_one_crop_is_clip(world):
    views, text = world
    own = Text.from_lists(text.label, list(text.label[:, None]))
    assert torch.allclose(
        wca.scores(Views(views.image, views.image[:, None]), own), clip.scores(views, text), atol=1e-6
    )


def test_weights_sum_to_1_and_prefer_what_is_like_the_whole(world):
    views, text = world
    w, v = wca.image_weights(views, scale=3.0), wca.text_weights(text, scale=3.0)
    assert w.shape == (5, 7)
    assert v.shape == (sum(COUNTS),)
    assert torch.allclose(w.sum(-1), torch.ones(5))
    assert torch.allclose(torch.stack([v[text.owner == c].sum() for c in range(4)]), torch.ones(4))
    assert torch.equal(w.argmax(-1), torch.einsum("bd,bnd->bn", views.image, views.crop).argmax(-1))


def test_a_large_scale_picks_the_best_and_does_not_overflow(world):
    views, text = world
    found = wca.scores(views, text, image_scale=1e4, text_scale=1e4)
    best = views.crop[torch.arange(5), torch.einsum("bd,bnd->bn", views.image, views.crop).argmax(-1)]
    rows = [text.description[text.owner == c] for c in range(4)]
    row = torch.stack([t[(t @ text.label[c]).argmax()] for c, t in enumerate(rows)])
    assert torch.allclose(found, best @ row.T, atol=1e-3)


def test_permuting_crops_or_descriptions_changes_nothing_and_classes_permute(world):
    views, text = world
    expected = wca.scores(views, text, image_scale=2, text_scale=2)
    crops = torch.randperm(7, generator=seeds.generator(1, "crops"))
    assert torch.allclose(
        wca.scores(views._replace(crop=views.crop[:, crops]), text, image_scale=2, text_scale=2), expected, atol=1e-6
    )
    rows = [text.description[text.owner == c] for c in range(4)]
    assert torch.allclose(
        wca.scores(views, Text.from_lists(text.label, [t.flip(0) for t in rows]), image_scale=2, text_scale=2),
        expected,
        atol=1e-6,
    )
    order = [2, 0, 3, 1]
    permuted = Text.from_lists(text.label[order], [rows[c] for c in order])
    assert torch.allclose(wca.scores(views, permuted, image_scale=2, text_scale=2), expected[:, order], atol=1e-6)


def test_the_batch_changes_nothing(world):
    views, text = world
    parts = [wca.scores(views.select(slice(i, i + 2)), text) for i in range(0, 5, 2)]
    assert torch.allclose(torch.cat(parts), wca.scores(views, text), atol=1e-6)


def test_runs_on_a_device_without_reading_values_back():
    with FakeTensorMode(), torch.device("cuda"):
        views = Views(torch.empty(5, 16), torch.empty(5, 7, 16))
        text = Text(torch.empty(4, 16), torch.empty(10, 16), torch.empty(10, dtype=torch.int64))
        found = [wca.scores(views, text, **wca.RELEASED), clip.description_scores(views, text, normalise=True)]
        assert [(x.device.type, x.shape) for x in found] == [("cuda", (5, 4))] * 2
