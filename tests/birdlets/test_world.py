import pickle

import numpy as np
import pytest
import torch

from upclose import birdlets
from upclose.birdlets import world
from upclose.features import Dataset


def test_the_data_set_keeps_the_protocol():
    data = birdlets.dataset("test", "all", n=125)
    assert isinstance(data, Dataset)
    assert len(data) == len(data.key) == len(data.label) == len(data.domain) == 500
    assert data.domain_names == list(birdlets.DOMAINS)
    assert np.bincount(data.domain).tolist() == [125] * 4
    assert len(set(data.key)) == 500
    image = data.load(3)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 160, 160)


def test_labels_are_spread_evenly():
    counts = np.bincount(birdlets.dataset(n=240).label, minlength=120)
    assert (counts == 2).all()


def test_the_fingerprint_tells_data_sets_apart():
    prints = {
        birdlets.dataset(**options).fingerprint
        for options in (
            {"n": 10},
            {"n": 11},
            {"n": 10, "seed": 1},
            {"n": 10, "split": "validation"},
            {"n": 10, "domain": "sketch"},
            {"n": 10, "knobs": birdlets.PROTOTYPE},
            {"n": 10, "classes": 20},
        )
    }
    assert len(prints) == 7
    assert birdlets.dataset(n=10).fingerprint == birdlets.dataset(n=10).fingerprint


def test_a_copy_in_another_process_is_the_same():
    data = birdlets.dataset("validation", "photo+sketch", n=7, seed=3, knobs=birdlets.PROTOTYPE, classes=10)
    copy = pickle.loads(pickle.dumps(data))
    assert copy.fingerprint == data.fingerprint
    assert torch.equal(copy.load(9), data.load(9))
    assert copy.parts(9) == data.parts(9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "train"}, "no split 'train'; there are validation, test"),
        ({"domain": "oil"}, "no domain 'oil'; there are photo"),
        ({"n": 0}, "not n=0"),
        ({"classes": 500}, "1 to 120 classes, not classes=500"),
        ({"classes": 0}, "1 to 120 classes, not classes=0"),
        ({"knobs": birdlets.Knobs(size=(0.7, 0.4))}, r"size=\(0.7, 0.4\) must be a range within 0 to 1"),
        ({"knobs": birdlets.Knobs(size=(0.0, 0.4))}, "size=.* must be a range"),
        ({"knobs": birdlets.Knobs(size=(0.9, 1.1))}, "size=.* must be a range"),
        ({"knobs": birdlets.Knobs(position=2.0)}, "position=2.0 must lie in 0 to 1"),
        ({"knobs": birdlets.Knobs(clutter=-1)}, "clutter=-1 must not be negative"),
        ({"knobs": birdlets.Knobs(distractors=-1)}, "distractors=-1 must not be negative"),
        ({"knobs": birdlets.Knobs(pixels=0)}, "pixels=0 must be at least 1"),
    ],
)
def test_errors_name_the_choices(options, words):
    with pytest.raises(ValueError, match=words):
        birdlets.dataset(**options)


def test_visible_asks_for_a_share_of_the_part_and_of_the_view():
    parts = {"beak": (10.0, 10.0, 20.0, 20.0), "eye_ring": (50.0, 50.0, 52.0, 52.0)}
    assert birdlets.visible(parts, (0, 0, 100, 100)) == {"beak"}
    assert birdlets.visible(parts, (40, 40, 70, 70)) == {"eye_ring"}
    assert birdlets.visible(parts, (15, 0, 115, 100)) == set()  # half of the beak


def test_training_views():
    pixels, said = birdlets.training_views(0, 11, False)
    assert pixels.shape == (3, 3, world.TRAIN_SIZE, world.TRAIN_SIZE)
    assert [len(pair) for pair in said] == [2, 2, 2]
    again, same = birdlets.training_views(0, 11, False)
    assert np.array_equal(pixels, again)
    assert said == same
    whole, _ = birdlets.training_views(0, 11, True)
    assert len(whole) == 2
    assert np.array_equal(whole[0], pixels[0])  # the same picture


def test_the_whole_framing_never_cuts_the_bird():
    rng = np.random.default_rng(0)
    data = birdlets.dataset(n=120)
    for i in range(120):
        x0, y0, x1, y1 = world._around(data.parts(i), 160, rng)
        boxes = np.array(list(data.parts(i).values()))
        assert x0 <= boxes[:, 0].min() + 1e-3
        assert y0 <= boxes[:, 1].min() + 1e-3
        assert x1 >= boxes[:, 2].max() - 1e-3
        assert y1 >= boxes[:, 3].max() - 1e-3
        assert x0 >= -1e-3
        assert x1 <= 160 + 1e-3


def test_training_siblings_share_family_and_body():
    for start in (0, 40):
        nouns = set()
        for i in range(start, start + birdlets.TRAIN_SIBLINGS):
            name = birdlets.training_views(5, i, True)[1][0][0]
            nouns.add(tuple(name.rstrip(".").split(" in a ")[0].split()[-2:]))
        assert len({noun for noun in nouns if noun[1] in birdlets.FAMILIES}) == 1


def test_fewer_classes_are_the_first_ones():
    some, every = birdlets.dataset(n=40, classes=10), birdlets.dataset(n=40)
    assert some.class_names == every.class_names[:10]
    assert birdlets.dataset(n=40, classes=120).fingerprint == every.fingerprint
    assert len(birdlets.dataset(n=4, classes=1).class_names) == 1


def test_the_fingerprint_of_the_shipped_world():
    """The weights were trained on these programs, and every bank is named by them: change them and all is made anew."""
    assert birdlets.dataset(n=10).fingerprint == "e7eb63f525f8b70e311ea358570a5cfb"


def test_contact_sheet():
    sheet = birdlets.contact_sheet(4, 3, seed=1)
    assert sheet.size == (480, 640)
    pixels = np.asarray(sheet).transpose(2, 0, 1)
    shown = [
        [
            d
            for d in birdlets.DOMAINS
            if np.array_equal(picture, birdlets.dataset("validation", d, 12, 1).load(i).numpy())
        ]
        for i, picture in enumerate(
            pixels[:, y : y + 160, x : x + 160] for y in range(0, 640, 160) for x in range(0, 480, 160)
        )
    ]
    assert shown == [["photo"]] * 6 + [["clipart"]] * 3 + [["painting"]] * 3


def test_a_crowd_begins_with_the_held_out_species_and_has_no_name_twice():
    held = birdlets.held_out()
    crowd = birdlets.crowd(245)
    assert crowd[:240] == held["test"] + held["validation"]
    assert len({bird.name for bird in crowd}) == len({bird.traits for bird in crowd}) == 245
    assert birdlets.crowd(3) == held["test"][:3]
