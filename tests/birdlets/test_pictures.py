import hashlib
import subprocess
import sys

import numpy as np
import pytest

from upclose import birdlets
from upclose.birdlets import pictures

BIRD = birdlets.held_out()["validation"][3].traits


def digest(domain, seed=0, i=0):
    return hashlib.sha256(birdlets.draw(BIRD, domain, seed, i).pixels.tobytes()).hexdigest()


@pytest.mark.parametrize("domain", birdlets.DOMAINS)
def test_pictures_are_uint8_and_the_same_again(domain):
    picture = birdlets.draw(BIRD, domain, 0, 0)
    assert picture.pixels.shape == (3, 160, 160)
    assert picture.pixels.dtype == np.uint8
    assert digest(domain) == digest(domain) != digest(domain, i=1) != digest(domain, seed=1)


def test_the_same_bytes_in_another_process():
    code = (
        "import hashlib; from upclose import birdlets as b; t = b.held_out()['validation'][3].traits; "
        "print(*(hashlib.sha256(b.draw(t, d, 0, 0).pixels.tobytes()).hexdigest() for d in b.DOMAINS))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert other == [digest(domain) for domain in birdlets.DOMAINS]


@pytest.mark.parametrize("knobs", [birdlets.DEFAULT, birdlets.PROTOTYPE], ids=["default", "filled frame"])
@pytest.mark.parametrize("trait", ["beak", "cap", "crest", "eye_ring", "legs", "collar", "belly"])
def test_a_part_box_holds_the_part_and_no_more(trait, knobs):
    """Paint a part blue, then yellow: the pixels that change are the part and two pixels of the camera's blur."""
    full = BIRD._replace(cap="red", crest="red", collar="red", eye_ring="red")
    edges = []
    for seed in range(12):
        one, two = (birdlets.draw(full._replace(**{trait: c}), "photo", seed, knobs=knobs) for c in ("blue", "yellow"))
        assert one.parts == two.parts
        rows, columns = np.nonzero((one.pixels != two.pixels).any(0))
        changed = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        edges.append(np.subtract(changed, one.parts[trait]) * (-1, -1, 1, 1))  # how far beyond the box, side by side
    beyond = np.array(edges)
    assert beyond.max() <= 3
    behind = 6 if trait == "belly" else 3  # the wing lies on the belly
    assert beyond.min() >= -behind
    assert np.abs(beyond.mean(0)).max() <= 2


@pytest.mark.parametrize("domain", ["sketch", "clipart"])
def test_sketch_and_clipart_have_no_scene_to_clutter(domain):
    bare, full = (birdlets.DEFAULT._replace(clutter=k, distractors=k) for k in (0, 12))
    assert np.array_equal(*(birdlets.draw(BIRD, domain, 4, knobs=knobs).pixels for knobs in (bare, full)))
    assert not np.array_equal(*(birdlets.draw(BIRD, "painting", 4, knobs=knobs).pixels for knobs in (bare, full)))


def test_absent_parts_have_no_box_and_present_ones_do():
    bare = BIRD._replace(cap=None, crest=None, collar=None, eye_ring=None)
    assert not {"cap", "crest", "collar", "eye_ring"} & set(birdlets.draw(bare, "photo", 0).parts)
    full = BIRD._replace(cap="red", crest="red", collar="red", eye_ring="red")
    assert {"cap", "crest", "collar", "eye_ring", "beak", "body"} <= set(birdlets.draw(full, "photo", 0).parts)


def test_boxes_lie_inside_and_the_size_knob_is_the_longer_side():
    for seed in range(40):
        knobs = birdlets.DEFAULT._replace(size=(0.5, 0.5))
        boxes = np.array(list(birdlets.draw(BIRD, "photo", seed, knobs=knobs).parts.values()))
        assert boxes.min() >= 0
        assert boxes.max() <= 160
        extent = boxes[:, 2:].max(0) - boxes[:, :2].min(0)
        assert extent.max() == pytest.approx(80, abs=8)  # a part that is never shown (the neck) may stick out


def test_position_zero_is_the_middle():
    for seed in range(10):
        knobs = birdlets.DEFAULT._replace(position=0.0)
        boxes = np.array(list(birdlets.draw(BIRD, "photo", seed, knobs=knobs).parts.values()))
        centre = (boxes[:, 2:].max(0) + boxes[:, :2].min(0)) / 2
        assert np.abs(centre - 80).max() < 8


def test_distractors_change_the_background_only():
    none = birdlets.draw(BIRD, "photo", 2, knobs=birdlets.DEFAULT._replace(distractors=0))
    many = birdlets.draw(BIRD, "photo", 2, knobs=birdlets.DEFAULT._replace(distractors=12))
    assert none.parts.keys() == many.parts.keys()
    assert (none.pixels != many.pixels).any()


def test_about_three_random_crops_in_ten_hold_less_than_half_of_the_bird():
    data, rng = birdlets.dataset(n=60), np.random.default_rng(0)
    share = []
    for i in range(60):
        boxes = np.array(list(data.parts(i).values()))
        bird = (*boxes[:, :2].min(0), *boxes[:, 2:].max(0))
        for _ in range(10):
            side = 160 * rng.uniform(0.5, 0.9)
            x, y = rng.uniform(0, 160 - side, 2)
            width = min(bird[2], x + side) - max(bird[0], x)
            height = min(bird[3], y + side) - max(bird[1], y)
            area = (bird[2] - bird[0]) * (bird[3] - bird[1])
            share.append(max(width, 0) * max(height, 0) / area < 0.5)
    assert 0.2 < np.mean(share) < 0.4


def test_domains_differ_by_far_more_than_two_photos_do():
    mean = {
        d: np.stack([birdlets.draw(BIRD, d, s).pixels.mean((1, 2)) for s in range(12)]).mean(0)
        for d in birdlets.DOMAINS
    }
    assert mean["sketch"].min() > 225
    assert np.abs(mean["clipart"] - mean["photo"]).max() > 40
    paint, photo = (
        birdlets.draw(BIRD, d, 0, knobs=birdlets.PROTOTYPE).pixels.astype(int) for d in ("painting", "photo")
    )
    smooth = {d: np.mean(np.diff(p, axis=2) == 0) for d, p in (("painting", paint), ("photo", photo))}
    assert smooth["painting"] > 3 * smooth["photo"]  # strokes of one colour, no grain


def test_an_unknown_domain_is_named():
    with pytest.raises(ValueError, match="no domain 'cartoon'; there are photo"):
        birdlets.draw(BIRD, "cartoon", 0)


def test_every_shape_has_an_anatomy():
    for family in birdlets.FAMILIES:
        pieces = pictures._anatomy(family, "hooked", "forked", "striped", False, False)
        assert {"beak", "tail", "wing", "body", "legs", "mark"} <= {piece.part for piece in pieces}
        assert all(np.isfinite(piece.points).all() for piece in pieces)
