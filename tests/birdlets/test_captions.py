import json

import numpy as np
import pytest

from upclose import birdlets, paths
from upclose.birdlets import captions, species

TEST = birdlets.held_out()["test"]


def test_shipped_description_files_are_what_the_grammar_says():
    folder = paths.PACKAGE / "birdlets" / "prompts"
    for split, birds in birdlets.held_out().items():
        assert json.loads((folder / f"clip-d_{split}.json").read_text()) == birdlets.descriptors(birds)
        assert json.loads((folder / f"cupl_{split}.json").read_text()) == birdlets.sentences(birds)


def test_descriptions_say_all_parts_and_then_something_generic_and_sometimes_wrong():
    said = birdlets.descriptors(TEST)
    wrong = 0
    for bird in TEST:
        true = list(birdlets.phrases(bird.traits).values())
        assert said[bird.name][: len(true)] == true
        assert said[bird.name][len(true)] in captions.GENERIC
        wrong += len(said[bird.name]) == len(true) + 2
        assert not set(said[bird.name][len(true) + 1 :]) & set(true)
    assert 0.2 < wrong / len(TEST) < 0.5


@pytest.mark.parametrize("bird", TEST[:20])
def test_part_of_finds_the_part_of_every_phrase(bird):
    for trait, words in birdlets.phrases(bird.traits).items():
        part = {"beak_shape": "beak"}.get(trait, trait)
        assert birdlets.part_of(words) == part
        assert birdlets.part_of(f"a photo of a {bird.name}, which has {words}.") == part
    assert birdlets.part_of("two wings") is None


def test_named_parts_are_of_true_phrases_and_stand_where_they_were_said():
    true = [list(birdlets.phrases(bird.traits).values()) for bird in TEST[:2]]
    wrong = next(words for words in birdlets.phrases(TEST[5].traits).values() if words not in true[1])
    named = birdlets.named_parts(TEST[:2], [true[0], [true[1][0], "two wings", wrong]])
    assert named[0] == [birdlets.part_of(words) for words in true[0]]
    assert named[1] == [birdlets.part_of(true[1][0]), *[None] * (len(true[0]) - 1)]


def test_captions_say_only_what_is_shown():
    rng = np.random.default_rng(0)
    traits = TEST[0].traits._replace(cap="red", beak="blue", beak_shape="hooked", collar="pink")
    for _ in range(200):
        for line in captions.captions(traits, {"beak"}, "meadow", "photo", True, rng):
            words = set(line.replace(".", "").replace("-", " ").replace(",", "").split())
            assert not words & {traits.family, traits.body, "cap", "capped", "collar", "collared", "belly", "legs"}
    assert captions.captions(traits, set(), "meadow", "photo", False, rng)[0].endswith("a meadow.")
    assert captions.captions(traits, set(), "meadow", "sketch", False, rng)[0].endswith("nothing.")


def test_training_captions_never_use_a_held_out_name():
    bird = TEST[0]
    rng = np.random.default_rng(0)
    lines = [
        line
        for _ in range(300)
        for line in captions.captions(bird.traits, set(birdlets.PARTS), "sea", "photo", False, rng)
    ]
    assert not any(bird.name in line for line in lines)
    assert any(
        species.epithet(bird.traits, t) in line
        for t in species.SMALL
        if species.epithet(bird.traits, t)
        for line in lines
    )


def test_the_vocabulary_covers_all_that_is_ever_said():
    words = set(birdlets.vocabulary())
    lines = [
        line
        for table in (birdlets.descriptors(TEST), birdlets.sentences(TEST))
        for rows in table.values()
        for line in rows
    ]
    lines += [line for i in range(60) for pair in birdlets.training_views(0, i, False)[1] for line in pair]
    spoken = {
        word for line in lines for word in line.lower().replace("-", " ").replace(".", " ").replace(",", " ").split()
    }
    assert spoken <= words
