"""Birdlets: small painted birds of which everything is known.

`dataset` gives the pictures, `held_out` the species, `descriptors` and `sentences` what is said of them, `Knobs` how
hard a picture is, and `Birdlets.parts` where each part of a bird is.
"""

from upclose.birdlets.captions import TEMPLATES, descriptors, named_parts, part_of, phrases, sentences, vocabulary
from upclose.birdlets.pictures import DEFAULT, DOMAINS, PARTS, PROTOTYPE, SCENES, Knobs, Picture, draw
from upclose.birdlets.species import COLOURS, FAMILIES, Species, Traits, held_out
from upclose.birdlets.world import (
    TRAIN_SIBLINGS,
    TRAIN_SIZE,
    Birdlets,
    contact_sheet,
    crowd,
    dataset,
    training_views,
    visible,
)

__all__ = [
    "COLOURS",
    "DEFAULT",
    "DOMAINS",
    "FAMILIES",
    "PARTS",
    "PROTOTYPE",
    "SCENES",
    "TEMPLATES",
    "TRAIN_SIBLINGS",
    "TRAIN_SIZE",
    "Birdlets",
    "Knobs",
    "Picture",
    "Species",
    "Traits",
    "contact_sheet",
    "crowd",
    "dataset",
    "descriptors",
    "draw",
    "held_out",
    "named_parts",
    "part_of",
    "phrases",
    "sentences",
    "training_views",
    "visible",
    "vocabulary",
]
