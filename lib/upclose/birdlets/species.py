"""Species of Birdlets: what a bird is made of, how it is named, and which birds belong to which split.

A species is a family silhouette, a body colour and ten small traits. Held-out species come in groups of siblings that
share the family, the body colour and about two fifths of the small traits; a sibling's name adds one trait that is its
own in the group: "orange-billed white tern". Training never repeats a species: each picture shows a new one.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from upclose import seeds

FAMILIES = (
    "finch",
    "tern",
    "heron",
    "duck",
    "owl",
    "woodpecker",
    "parrot",
    "hawk",
    "hummingbird",
    "penguin",
    "swan",
    "quail",
)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey")
BEAKS = ("pointed", "hooked", "flat", "curved")
TAILS = ("short", "fan", "forked", "long")
WINGS = ("plain", "striped", "spotted")
GROUPS, SIBLINGS = 24, 5
WORLD_SEED = 20261122
_CHANGED = 5  # small traits that a sibling draws anew


class Traits(NamedTuple):
    """Everything that can be seen of a bird. None: the bird has no such part."""

    family: str
    body: str
    beak: str
    beak_shape: str
    cap: str | None
    eye_ring: str | None
    crest: str | None
    collar: str | None
    wing: str
    wing_mark: str | None
    belly: str
    tail: str
    legs: str


class Species(NamedTuple):
    """A named bird: the trait in the name stands in `epithet`, the sibling group in `group` (-1 in training)."""

    name: str
    traits: Traits
    epithet: str
    group: int


SMALL = ("beak", "beak_shape", "cap", "eye_ring", "crest", "collar", "wing", "belly", "tail", "legs")
_SOMETIMES = {"cap": 0.7, "eye_ring": 0.6, "crest": 0.4, "collar": 0.6}
_SHAPE_WORD = {"pointed": "point", "hooked": "hook", "flat": "flat", "curved": "curve"}
_TAIL_WORD = {"short": "short", "fan": "fan", "forked": "fork", "long": "long"}


def epithet(traits: Traits, trait: str) -> str | None:
    """The word that a name makes of one small trait, None where the bird has nothing to show for it."""
    value = getattr(traits, trait)
    if value is None or value == "plain":
        return None
    match trait:
        case "beak":
            return f"{value}-billed"
        case "beak_shape":
            return f"{_SHAPE_WORD[value]}-billed"
        case "cap":
            return f"{value}-capped"
        case "eye_ring":
            return f"{value}-eyed"
        case "crest":
            return f"{value}-crested"
        case "collar":
            return f"{value}-collared"
        case "wing":
            return f"{traits.wing_mark}-{value}"
        case "belly":
            return f"{value}-bellied"
        case "tail":
            return f"{_TAIL_WORD[value]}-tailed"
        case "legs":
            return f"{value}-legged"
    raise ValueError(f"{trait!r} is no small trait; there are {', '.join(SMALL)}")


def name_of(traits: Traits, trait: str) -> str:
    """The name built on one small trait: "orange-billed white tern"."""
    return f"{epithet(traits, trait)} {traits.body} {traits.family}"


def _pick(rng: np.random.Generator, choices: tuple[str, ...], *but: str | None) -> str:
    while (choice := choices[int(rng.integers(len(choices)))]) in but:
        pass
    return choice


def _draw_trait(rng: np.random.Generator, trait: str, body: str) -> dict[str, str | None]:
    """A value for one small trait; a colour that lies on the body differs from the body's."""
    match trait:
        case "beak_shape":
            return {trait: _pick(rng, BEAKS)}
        case "tail":
            return {trait: _pick(rng, TAILS)}
        case "wing":
            wing = _pick(rng, WINGS)
            return {"wing": wing, "wing_mark": None if wing == "plain" else _pick(rng, COLOURS, body)}
        case "beak" | "legs":
            return {trait: _pick(rng, COLOURS)}
    if rng.random() >= _SOMETIMES.get(trait, 1.0):
        return {trait: None}
    return {trait: _pick(rng, COLOURS, body)}


def draw_traits(rng: np.random.Generator, family: str | None = None, body: str | None = None) -> Traits:
    """A bird drawn at random, of a given family and body colour where asked for."""
    family = family or _pick(rng, FAMILIES)
    body = body or _pick(rng, COLOURS)
    small: dict[str, str | None] = {}
    for trait in SMALL:
        small |= _draw_trait(rng, trait, body)
    return Traits(family=family, body=body, **small)


def _sibling_group(rng: np.random.Generator, family: str, body: str, group: int) -> list[Species] | None:
    """Five siblings, or None where the draw left one without a trait of its own."""
    base = draw_traits(rng, family, body)
    birds: list[Traits] = []
    for _ in range(SIBLINGS):
        traits = base
        for trait in rng.choice(SMALL, _CHANGED, replace=False):
            traits = traits._replace(**_draw_trait(rng, str(trait), body))
        birds.append(traits)
    words = [{trait: epithet(bird, trait) for trait in SMALL} for bird in birds]
    named = []
    for i, bird in enumerate(birds):
        others = {word for j, row in enumerate(words) if j != i for word in row.values()}
        own = [trait for trait, word in words[i].items() if word is not None and word not in others]
        if not own:
            return None
        trait = own[int(rng.integers(len(own)))]
        named.append(Species(name_of(bird, trait), bird, trait, group))
    return named if len(set(birds)) == SIBLINGS else None


@cache
def held_out() -> dict[str, tuple[Species, ...]]:
    """The validation and test species: 24 groups of 5 siblings each, no name and no trait tuple in both."""
    rng = seeds.rng(WORLD_SEED, "held-out species")
    pairs = [(family, body) for family in FAMILIES for body in COLOURS]
    order = rng.permutation(len(pairs))
    groups: list[list[Species]] = []
    for pair in order[: 2 * GROUPS]:
        while (drawn := _sibling_group(rng, *pairs[pair], len(groups) % GROUPS)) is None:
            pass
        groups.append(drawn)
    split = {
        "validation": tuple(bird for group in groups[:GROUPS] for bird in group),
        "test": tuple(bird for group in groups[GROUPS:] for bird in group),
    }
    everybody = [bird for birds in split.values() for bird in birds]
    assert len({bird.traits for bird in everybody}) == len({bird.name for bird in everybody}) == len(everybody)
    return split


@cache
def _banned() -> tuple[frozenset[Traits], frozenset[str]]:
    birds = [bird for split in held_out().values() for bird in split]
    return frozenset(bird.traits for bird in birds), frozenset(bird.name for bird in birds)


def is_held_out(traits: Traits) -> bool:
    """Whether a bird has the full trait tuple of a validation or test species."""
    return traits in _banned()[0]


def is_held_out_name(name: str) -> bool:
    """Whether a name belongs to a validation or test species."""
    return name in _banned()[1]


def training_traits(rng: np.random.Generator, family: str, body: str) -> Traits:
    """A training bird of a family and body colour: drawn at random, and again where the draw is a held-out one."""
    while is_held_out(traits := draw_traits(rng, family, body)):
        pass
    return traits
