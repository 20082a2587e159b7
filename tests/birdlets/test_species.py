from itertools import combinations

import numpy as np
import pytest

from upclose import birdlets, seeds
from upclose.birdlets import species


def test_held_out_species_share_nothing_between_splits():
    held = birdlets.held_out()
    assert {split: len(birds) for split, birds in held.items()} == {"validation": 120, "test": 120}
    everybody = [bird for birds in held.values() for bird in birds]
    assert len({bird.traits for bird in everybody}) == 240
    assert len({bird.name for bird in everybody}) == 240
    pairs = [{(bird.traits.family, bird.traits.body) for bird in birds} for birds in held.values()]
    assert not pairs[0] & pairs[1]  # not even a family of one colour


def test_siblings_share_family_and_body_and_differ_in_small_parts():
    for birds in birdlets.held_out().values():
        for group in range(species.GROUPS):
            siblings = [bird for bird in birds if bird.group == group]
            assert len(siblings) == species.SIBLINGS
            assert len({(bird.traits.family, bird.traits.body) for bird in siblings}) == 1


def test_siblings_have_four_small_parts_of_ten_in_common_and_strangers_two():
    common = {True: [], False: []}
    for birds in birdlets.held_out().values():
        for one, two in combinations(birds, 2):
            same = sum(getattr(one.traits, t) == getattr(two.traits, t) for t in species.SMALL)
            common[one.group == two.group].append(same)
    assert np.mean(common[True]) == pytest.approx(4.0, abs=0.2)
    assert (min(common[True]), max(common[True])) == (1, 8)
    assert np.mean(common[False]) == pytest.approx(2.0, abs=0.2)


def test_a_name_tells_a_trait_that_no_sibling_has():
    for birds in birdlets.held_out().values():
        for bird in birds:
            word = species.epithet(bird.traits, bird.epithet)
            assert bird.name == f"{word} {bird.traits.body} {bird.traits.family}"
            siblings = [other for other in birds if other.group == bird.group and other is not bird]
            assert all(species.epithet(s.traits, t) != word for s in siblings for t in species.SMALL)


def test_training_never_draws_a_held_out_bird(monkeypatch):
    bird = birdlets.held_out()["test"][0].traits
    draws = iter([bird, bird, bird._replace(legs="red" if bird.legs != "red" else "blue")])
    monkeypatch.setattr(species, "draw_traits", lambda *_: next(draws))
    assert species.training_traits(np.random.default_rng(0), bird.family, bird.body) != bird


def test_colours_on_the_body_can_be_seen():
    rng = seeds.rng(0, "test")
    for _ in range(300):
        traits = species.draw_traits(rng)
        on_body = (traits.cap, traits.eye_ring, traits.crest, traits.collar, traits.wing_mark, traits.belly)
        assert traits.body not in on_body
        assert (traits.wing == "plain") == (traits.wing_mark is None)
