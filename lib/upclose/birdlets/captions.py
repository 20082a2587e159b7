"""What is said of a bird: training captions, class descriptions, full sentences.

Captions and descriptions come from one grammar, so a part of "descriptions help" is built into this world.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from upclose import seeds
from upclose.birdlets.pictures import DOMAINS, PARTS, SCENES
from upclose.birdlets.species import (
    BEAKS,
    COLOURS,
    FAMILIES,
    SMALL,
    TAILS,
    WORLD_SEED,
    Species,
    Traits,
    draw_traits,
    epithet,
    is_held_out_name,
)

DOMAIN_WORDS = dict(zip(DOMAINS, ("photo", "painting", "sketch", "clipart")))
TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "a good photo of a {}.",
    "a photo of the {}.",
    "a close-up photo of a {}.",
    "a photo of one {}.",
)
GENERIC = ("feathers", "two wings", "a small head", "two eyes", "a tail", "a round body", "sharp claws")
_WORD_PART = {
    "body": "body",
    "beak": "beak",
    "cap": "cap",
    "ring": "eye_ring",
    "crest": "crest",
    "collar": "collar",
    "wings": "wing",
    "stripes": "wing",
    "spots": "wing",
    "belly": "belly",
    "tail": "tail",
    "legs": "legs",
}
_MARKS = {"striped": "stripes", "spotted": "spots"}
_TRAIT_PART = {"beak_shape": "beak"}  # every other small trait is named as its part


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def phrase(traits: Traits, trait: str) -> str | None:
    """One trait in words, None where the bird has no such part: "an orange beak", "wings with red spots"."""
    value = getattr(traits, trait)
    if value is None:
        return None
    match trait:
        case "beak_shape":
            return _a(f"{value} beak")
        case "eye_ring":
            return _a(f"{value} eye ring")
        case "wing":
            return "plain wings" if value == "plain" else f"wings with {traits.wing_mark} {_MARKS[value]}"
        case "legs":
            return f"{value} legs"
    return _a(f"{value} {trait}")


def phrases(traits: Traits) -> dict[str, str]:
    """All that can be said of a bird: trait -> words, body first."""
    said = {trait: phrase(traits, trait) for trait in ("body", *SMALL)}
    return {trait: words for trait, words in said.items() if words is not None}


def part_of(description: str) -> str | None:
    """The part that a description names, None for a generic one: "an orange beak" -> "beak"."""
    if any(description.rstrip(".").endswith(generic) for generic in GENERIC):
        return None
    return _WORD_PART.get(description.rstrip(".").split()[-1])


def named_parts(species: Sequence[Species], said: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """The part that each description truly names.

    Args:
        species: C birds
        said: the descriptions of each, in any number

    Returns:
        C lists of the longest one's length; None for a description that is generic or wrong of this bird, and at the
        end of shorter lists
    """
    width = max(map(len, said))
    true = [{*phrases(bird.traits).values()} for bird in species]
    named = [[part_of(words) if words in own else None for words in rows] for own, rows in zip(true, said)]
    return [row + [None] * (width - len(row)) for row in named]


# ------------------------------------------------------------------------------------------ class descriptions


def descriptors(species: tuple[Species, ...]) -> dict[str, list[str]]:
    """Descriptions of each species in CLIP-D's form, {name: [phrases]}.

    As language models do, every list ends with something that is true of any bird, and about every third list says one
    thing that is wrong.
    """
    out = {}
    for bird in species:
        rng = seeds.rng(WORLD_SEED, "descriptors", bird.name)
        said = list(phrases(bird.traits).values())
        said.append(GENERIC[int(rng.integers(len(GENERIC)))])
        if rng.random() < 0.35:
            trait = SMALL[int(rng.integers(len(SMALL)))]
            while (wrong := phrase(draw_traits(rng), trait)) is None or wrong in said:
                pass
            said.append(wrong)
        out[bird.name] = said
    return out


def sentences(species: tuple[Species, ...], n: int = 8) -> dict[str, list[str]]:
    """Full sentences on each species as CuPL's language model writes them, {name: [sentences]}."""
    out = {}
    for bird in species:
        rng = seeds.rng(WORLD_SEED, "sentences", bird.name)
        said = list(phrases(bird.traits).values())
        lines = []
        while len(lines) < n:
            one, two, three = (said[int(k)] for k in rng.choice(len(said), 3, replace=False))
            line = (
                f"a {bird.name} has {one}, {two} and {three}.",
                f"the {bird.name} is {_a(bird.traits.body)} {bird.traits.family} with {one} and {two}.",
                f"a photo of a {bird.name} with {one} and {two}.",
                f"a {bird.name} is a bird with {one}.",
            )[len(lines) % 4]
            if line not in lines:
                lines.append(line)
        out[bird.name] = lines
    return out


# ------------------------------------------------------------------------------------------- training captions


def _opening(rng: np.random.Generator, domain: str, close: bool) -> str:
    u = rng.random()
    if u < 0.12:
        return "an image of" if u < 0.06 else "a picture of"
    word = DOMAIN_WORDS[domain]
    if close and u < 0.5:
        return f"a close-up {word} of"
    return f"a good {word} of" if u > 0.95 else f"a {word} of"


def _noun(traits: Traits, shown: set[str], rng: np.random.Generator, full: bool) -> str:
    """What to call the bird when these parts are in the picture."""
    noun = traits.family if {"body", "head"} <= shown else "bird"
    if "body" in shown:
        noun = f"{traits.body} {noun}"
    if full:
        traits_shown = [t for t in SMALL if _TRAIT_PART.get(t, t) in shown and epithet(traits, t)]
        if traits_shown:
            name = f"{epithet(traits, traits_shown[int(rng.integers(len(traits_shown)))])} {noun}"
            if not is_held_out_name(name):
                return name
    return noun


def captions(
    traits: Traits, shown: set[str], scene: str, domain: str, close: bool, rng: np.random.Generator
) -> list[str]:
    """Two captions of a picture that shows the parts `shown`: one names the bird, one says what it looks like."""
    start = _opening(rng, domain, close)
    plain = domain in ("sketch", "clipart")
    if not shown:
        return [f"{start} {'nothing' if plain else 'a ' + scene}."] * 2
    named = f"{start} {'the' if rng.random() < 0.1 else 'a'} {_noun(traits, shown, rng, True)}"
    if not plain and rng.random() < 0.15:
        named += f" in a {scene}"
    said = [words for trait, words in phrases(traits).items() if _TRAIT_PART.get(trait, trait) in shown]
    if not said:
        return [f"{named}."] * 2
    count = min(len(said), 1 + int(rng.integers(4)))
    picked = [said[int(k)] for k in rng.choice(len(said), count, replace=False)]
    listed = picked[0] if count == 1 else f"{', '.join(picked[:-1])} and {picked[-1]}"
    u = rng.random()
    if close and u < 0.4:
        told = f"{start} {listed}"
    elif u < 0.65:
        told = f"{start} a {_noun(traits, shown, rng, u < 0.55)}, which has {listed}"
    elif u < 0.75:
        told = f"a {_noun(traits, shown, rng, True)} has {listed}"
    elif u < 0.85:
        told = f"the {_noun(traits, shown, rng, True)} is a bird with {listed}"
    else:
        told = f"{start} a {_noun(traits, shown, rng, False)} with {listed}"
    return [f"{named}.", f"{told}."]


def vocabulary() -> list[str]:
    """Every word of the grammar, sorted."""
    text = " ".join(
        [
            *TEMPLATES,
            *GENERIC,
            *COLOURS,
            *FAMILIES,
            *BEAKS,
            *TAILS,
            *SCENES,
            *DOMAIN_WORDS.values(),
            *(part.replace("_", " ") for part in PARTS),
            "billed capped eyed crested collared striped spotted bellied tailed legged point hook curve fork",
            "wings with stripes spots plain beak tail which has have is and in the a an bird of nothing",
            "body type kind this that",
        ]
    )
    return sorted(
        {word for word in text.lower().replace("{}", " ").replace("-", " ").replace(".", " ").split() if word.isalpha()}
    )
