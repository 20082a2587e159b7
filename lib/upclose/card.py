"""What the card of a trained birdlets-tiny says, measured on validation species, which training never shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from upclose import birdlets, seeds
from upclose.birdlets import species
from upclose.encode import tiny
from upclose.encode.tiny import CLIP

COLOURED = {"beak": "beak", "legs": "legs", "cap": "cap", "eye_ring": "eye_ring", "collar": "collar"}
COLOURED |= {"wing": "wing_mark", "belly": "belly"}  # part -> the trait that is its colour
BIRDS = 3000  # that the probes learn from
FILLS = 0.6  # of a crop's side: its part


def pictures_of(dataset: birdlets.Birdlets) -> np.ndarray:
    """(n, 3, S, S) uint8: a data set's square pictures at the size that the model reads."""
    return np.stack([_sized(dataset.load(i).numpy()) for i in range(len(dataset))])


def _sized(pixels: np.ndarray, box: tuple[float, ...] | None = None) -> np.ndarray:
    image = Image.fromarray(pixels.transpose(1, 2, 0))
    side = (birdlets.TRAIN_SIZE, birdlets.TRAIN_SIZE)
    return np.asarray(image.resize(side, Image.BICUBIC, box=box)).transpose(2, 0, 1)


@torch.inference_mode()
def _embedded(model: CLIP, pixels: np.ndarray) -> torch.Tensor:
    """(n, D) on the CPU, not normalised."""
    parts = torch.from_numpy(pixels).to(model.text_projection.device).split(64)
    return torch.cat([tiny.image_features(model.visual, tiny.normalise(part))[0] for part in parts]).cpu()


@torch.inference_mode()
def accuracies(model: CLIP, pixels: np.ndarray, dataset: birdlets.Birdlets) -> tuple[np.ndarray, np.ndarray]:
    """Which pictures are right (n,) bool: by the names of the classes alone, and by names with descriptions.

    Args:
        model: in eval mode
        pixels: `pictures_of(dataset)`
        dataset: of Birdlets
    """
    tokenize, device = tiny.tokenizer(birdlets.vocabulary()), model.text_projection.device
    described = birdlets.descriptors(dataset.species)
    names = [f"a photo of a {name}." for name in dataset.class_names]
    said = [f"a photo of a {name}, which has {words}." for name in dataset.class_names for words in described[name]]
    owner = torch.tensor([c for c, name in enumerate(dataset.class_names) for _ in described[name]])
    image = _embedded(model, pixels)
    name, description = (
        F.normalize(tiny.text_features(model, tokenize(some).to(device)).cpu(), dim=-1) for some in (names, said)
    )
    mean = torch.zeros_like(name).index_add_(0, owner, description) / owner.bincount()[:, None]
    by_name, with_descriptions = ((image @ text.T).argmax(1).numpy() == dataset.label for text in (name, mean))
    return by_name, with_descriptions


def close_up(part: tuple[float, ...], side: int) -> tuple[float, float, float, float]:
    """The square around a part (x0, y0, x1, y1) of which it fills `FILLS`, within a picture of side `side`."""
    x0, y0, x1, y1 = part
    width = min(max(x1 - x0, y1 - y0) / FILLS, side)
    x, y = (min(max((a + b - width) / 2, 0), side - width) for a, b in ((x0, x1), (y0, y1)))
    return x, y, x + width, y + width


def readable(model: CLIP, photos: birdlets.Birdlets) -> dict[str, tuple[float, float, float, int]]:
    """How well a linear probe reads the colours of small parts from embeddings: what small parts cost a model.

    The probes learn from photos of `BIRDS` newly drawn birds and are asked about the photos of validation species that
    show the part.

    Args:
        model: in eval mode, on the CPU
        photos: of validation species

    Returns:
        part -> (share of the commonest colour, share read in whole pictures, in crops of the true part, pictures)
    """
    traits = [species.draw_traits(seeds.rng(0, "probe", i)) for i in range(BIRDS)]
    learnt = _views(model, traits, (birdlets.draw(t, "photo", 0, "probe", i) for i, t in enumerate(traits)))
    asked_traits = [photos.species[label].traits for label in photos.label]
    pictures = (birdlets.Picture(photos.load(i).numpy(), photos.parts(i), "") for i in range(len(photos)))
    asked = _views(model, asked_traits, pictures)
    found = {}
    for part in COLOURED:
        (x, close, y), (x_asked, close_asked, y_asked) = learnt[part], asked[part]
        right = (
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(known, y).score(new, y_asked)
            for known, new in ((x, x_asked), (close, close_asked))
        )
        found[part] = (np.unique(y_asked, return_counts=True)[1].max() / len(y_asked), *right, len(y_asked))
    return found


def _views(
    model: CLIP, traits: Sequence[birdlets.Traits], pictures: Iterable[birdlets.Picture]
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Part -> embeddings (n, D) of the whole pictures that show it, of crops of it, and its colours (n,)."""
    whole, (crops, owner, colour) = [], ({part: [] for part in COLOURED} for _ in range(3))
    for i, (bird, picture) in enumerate(zip(traits, pictures)):
        whole.append(_sized(picture.pixels))
        for part, trait in COLOURED.items():
            if getattr(bird, trait) is not None and part in picture.parts:
                box = close_up(picture.parts[part], picture.pixels.shape[-1])
                crops[part].append(_sized(picture.pixels, box))
                owner[part].append(i)
                colour[part].append(getattr(bird, trait))
    x = F.normalize(_embedded(model, np.stack(whole)), dim=-1).numpy()
    close = {part: F.normalize(_embedded(model, np.stack(crops[part])), dim=-1).numpy() for part in COLOURED}
    return {part: (x[owner[part]], close[part], np.array(colour[part])) for part in COLOURED}


def growth(curves: dict[str, list[dict]], batch_size: int) -> list[str]:
    """A table of accuracy against views seen, in powers of two and at the end, one pair of columns a recipe.

    Args:
        curves: recipe -> rows with step, name and descriptions; an empty one is left out
        batch_size: of all recipes
    """
    curves = {recipe: curve for recipe, curve in curves.items() if curve}
    seen = {
        recipe: {row["step"] * batch_size: row for row in curve if _doubled(row["step"]) or row is curve[-1]}
        for recipe, curve in curves.items()
    }

    def cells(row: dict | None) -> str:
        return f"{row['name']:.1%} | {row['descriptions']:.1%}" if row else "|"

    return [
        "| views seen | " + " | ".join(f"{recipe}: by name | with descriptions" for recipe in curves) + " |",
        "| --- |" + " --- | --- |" * len(curves),
        *(
            f"| {views:,} | " + " | ".join(cells(rows.get(views)) for rows in seen.values()) + " |"
            for views in sorted({views for rows in seen.values() for views in rows})
        ),
    ]


def _doubled(step: int) -> bool:
    return step & (step - 1) == 0


def page(name: str, facts: dict, batch_size: int, curves: dict[str, list[dict]], results: dict, parts: dict) -> str:
    """The page that goes with the weights.

    Args:
        name: of the model
        facts: what is said of its training
        batch_size: views a step
        curves: recipe -> its curve, the model's own first
        results: domain -> (share right by name, by name with descriptions, pictures)
        parts: of `readable`
    """
    whole = name.endswith("whole")
    views = "whole pictures with whole captions only" if whole else "whole pictures, medium views and close-ups"
    return "\n".join(
        [
            f"# {name}",
            "",
            f"A small CLIP (open_clip's `CLIP` module), trained from scratch on Birdlets: {views}.",
            f"Made by `python -m upclose.train {name}`; do not edit.",
            "",
            "| | |",
            "| --- | --- |",
            *(f"| {key} | {value} |" for key, value in facts.items() if key != "measure"),
            "| precision | bf16 products, fp32 weights and sums |",
            f"| image tower | {tiny.CONFIG['vision_cfg']} |",
            f"| text tower | {tiny.CONFIG['text_cfg']} |",
            f"| torch | {torch.__version__} |",
            "",
            "## Validation species, never seen in training (120 in 24 groups of 5 siblings, chance 0.8 %)",
            "",
            "Top-1 of the whole picture.",
            "",
            "| domain | by name | with descriptions | pictures |",
            "| --- | --- | --- | --- |",
            *(f"| {domain} | {a:.1%} | {b:.1%} | {n} |" for domain, (a, b, n) in results.items()),
            "",
            "## What can be read of small parts",
            "",
            f"A linear probe on the embedding, trained on {BIRDS:,} photos of other birds, names which of eleven",
            "colours a part has in the photos above that show it (chance 9 %): from the whole picture, and from a crop",
            "of the true part. It says what this embedding keeps, and no more of other models.",
            "",
            "| part | commonest colour | whole picture | crop of the part | pictures |",
            "| --- | --- | --- | --- | --- |",
            *(
                f"| {part.replace('_', ' ')} | {c:.1%} | {w:.1%} | {k:.1%} | {n} |"
                for part, (c, w, k, n) in parts.items()
            ),
            "",
            "## Accuracy against views seen",
            "",
            "Photos of validation species, in the course of training; the rate falls to 0 at each recipe's end.",
            "",
            *growth(curves, batch_size),
            "",
            "## Limits",
            "",
            "It knows painted birds of 12 families and the words of one small grammar, and nothing of real pictures.",
            "Captions and class descriptions come from that same grammar, so that some of what descriptions add is",
            "built in. Unknown words",
            f"become one of {tiny.BUCKETS} untrained tokens. Text beyond {tiny.CONTEXT} tokens is cut.",
            "",
        ]
    )
