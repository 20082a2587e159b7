import pytest
import torch
from torch.nn.functional import normalize

from upclose import seeds
from upclose.features import Text, Views
from upclose.methods import clip

COUNTS = (3, 1, 4, 2)


@pytest.fixture
def world():
    draw = seeds.generator(0, "clip")

    def unit(*shape):
        return normalize(torch.randn(*shape, 16, generator=draw), dim=-1)

    return Views(unit(5), unit(5, 7)), Text.from_lists(unit(len(COUNTS)), [unit(m) for m in COUNTS])


def loop(function, views, text):
    """`function(b, c, descriptions of c)` for every image and class."""
    return torch.tensor(
        [
            [function(b, c, text.description[text.owner == c]).item() for c in range(len(text.label))]
            for b in range(len(views.image))
        ]
    )


def test_scores_are_the_cosines_with_the_class_prompts(world):
    views, text = world
    expected = loop(lambda b, c, _: torch.cosine_similarity(views.image[b], text.label[c], dim=0), views, text)
    assert torch.allclose(clip.scores(views, text), expected, atol=1e-6)


def test_description_scores_are_the_mean_of_the_cosines(world):
    views, text = world
    expected = loop(lambda b, c, d: torch.stack([views.image[b] @ row for row in d]).mean(), views, text)
    assert torch.allclose(clip.description_scores(views, text), expected, atol=1e-6)


def test_normalised_description_scores_are_the_cosine_with_the_mean(world):
    views, text = world
    expected = loop(lambda b, c, d: torch.cosine_similarity(views.image[b], d.mean(0), dim=0), views, text)
    found = clip.description_scores(views, text, normalise=True)
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, clip.description_scores(views, text), atol=1e-3)


def test_the_control_is_the_mean_over_crops_and_descriptions(world):
    views, text = world
    expected = loop(lambda b, c, d: torch.stack([x @ row for x in views.crop[b] for row in d]).mean(), views, text)
    assert torch.allclose(clip.multi_crop_scores(views, text), expected, atol=1e-6)


def test_one_crop_that_is_the_image_is_clip_d(world):
    views, text = world
    same = Views(views.image, views.image[:, None])
    assert torch.allclose(clip.multi_crop_scores(same, text), clip.description_scores(views, text), atol=1e-6)


def test_one_description_that_is_the_prompt_is_clip(world):
    views, text = world
    own = Text.from_lists(text.label, list(text.label[:, None]))
    for normalise in (False, True):
        assert torch.allclose(
            clip.description_scores(views, own, normalise=normalise), clip.scores(views, text), atol=1e-6
        )


@pytest.mark.parametrize("function", [clip.scores, clip.description_scores, clip.multi_crop_scores])
def test_scores_are_float32_and_do_not_depend_on_the_batch(world, function):
    views, text = world
    found = function(views, text)
    assert found.dtype == torch.float32
    assert found.shape == (5, len(COUNTS))
    parts = torch.cat([function(views.select(slice(i, i + 1)), text) for i in range(5)])
    assert torch.allclose(found, parts, atol=1e-6)
    double = function(Views(*(x.double() for x in views[:2])), Text(text[0].double(), text[1].double(), text[2]))
    assert double.dtype == torch.float32
