"""The shipped weights: what their cards say of them, measured again on fewer pictures."""

import pytest

from upclose import birdlets, encode, prompts
from upclose.features import Views
from upclose.methods import clip
from upclose.metrics import accuracy

CARD = {
    "birdlets-tiny": (27.3, 33.3),
    "birdlets-tiny-1": (25.3, 33.3),
    "birdlets-tiny-2": (25.2, 33.0),
    "birdlets-tiny-whole": (13.2, 15.8),
}  # by name and with descriptions, 1,200 photos


@pytest.fixture(scope="module")
def photos():
    data = birdlets.dataset("validation", "photo", n=600)
    return data, [data.load(i) for i in range(len(data))]


@pytest.mark.parametrize(
    ("name", "by_name", "described"),
    [
        ("birdlets-tiny", 20, 27),
        ("birdlets-tiny-1", 20, 27),
        ("birdlets-tiny-2", 20, 27),
        ("birdlets-tiny-whole", 8, 10),
    ],
)  # chance is 0.8
def test_the_shipped_weights_know_validation_species(photos, name, by_name, described):
    data, pixels = photos
    encoder = encode.load(name, device="cpu")
    image = encoder.encode_images(pixels)
    views = Views(image, image[:, None])
    said = prompts.load("clip-d", "birdlets", "validation", data.class_names)
    text = encode.embed_text(
        encoder, [prompts.TEMPLATE.format(c) for c in data.class_names], list(said.values()), data.class_names
    )
    found = accuracy(clip.scores(views, text), data.label), accuracy(clip.description_scores(views, text), data.label)
    assert found[0] > by_name
    assert found[1] > described
    for value, card in zip(found, CARD[name]):
        assert value == pytest.approx(card, abs=5)  # 600 pictures: a standard error of 1.9 points
