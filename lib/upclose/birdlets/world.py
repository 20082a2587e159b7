"""Birdlets as a data set, and the views that birdlets-tiny is trained on."""

from __future__ import annotations

import hashlib
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from upclose import programs, seeds
from upclose.birdlets import captions, pictures, species
from upclose.birdlets.pictures import DEFAULT, DOMAINS, Knobs, Picture

TRAIN_SIZE = 48
TRAIN_SIBLINGS = 4  # consecutive training pictures share family and body colour, so that small parts tell them apart
SHOWN, LEAST = 0.6, 0.045  # of a part's box, and of a view's side: what a caption speaks of
_TRAIN_DOMAINS = (0.92, 0.02, 0.04, 0.02)  # photo, painting, sketch, clipart


@cache
def _code() -> str:
    """A hash of the programs that draw: another program, another data set."""
    files = [programs.digest(Path(module.__file__)) for module in (pictures, species, seeds)]
    return hashlib.sha256("".join(files).encode()).hexdigest()[:16]


def _check(knobs: Knobs) -> None:
    low, high = knobs.size
    in_range = {
        "size": (0 < low <= high <= 1, "must be a range within 0 to 1"),
        "position": (0 <= knobs.position <= 1, "must lie in 0 to 1"),
        "clutter": (knobs.clutter >= 0, "must not be negative"),
        "distractors": (knobs.distractors >= 0, "must not be negative"),
        "pixels": (knobs.pixels >= 1, "must be at least 1"),
    }
    for name, (holds, rule) in in_range.items():
        if not holds:
            raise ValueError(f"birdlets' knob {name}={getattr(knobs, name)} {rule}")


class Birdlets:
    """Pictures of held-out species, drawn when asked for.

    Args:
        split: "test" or "validation"
        domain: one of DOMAINS, several joined by "+", or "all"
        n: pictures a domain, spread evenly over the species
        seed: of the pictures
        knobs: how hard they are; sketches and clipart have no scene, so `clutter` and `distractors` do nothing there
        classes: only the first so many species (sibling group after sibling group of 5), None for all 120

    Raises:
        ValueError: an unknown split or domain, n < 1, classes or knobs out of range
    """

    name = "birdlets"

    def __init__(
        self,
        split: str = "test",
        domain: str = "photo",
        n: int = 2000,
        seed: int = 0,
        knobs: Knobs = DEFAULT,
        classes: int | None = None,
    ):
        held_out = species.held_out()
        if split not in held_out:
            raise ValueError(f"birdlets has no split {split!r}; there are {', '.join(held_out)}")
        self.domain_names = list(DOMAINS) if domain == "all" else domain.split("+")
        for part in self.domain_names:
            if part not in DOMAINS:
                raise ValueError(
                    f"birdlets has no domain {part!r}; there are {', '.join(DOMAINS)}, joined by '+', or all"
                )
        if n < 1:
            raise ValueError(f"birdlets needs at least one picture a domain, not n={n}")
        if classes is not None and not 1 <= classes <= len(held_out[split]):
            raise ValueError(f"birdlets has 1 to {len(held_out[split])} classes, not classes={classes}")
        _check(knobs)
        self.split, self.seed, self.knobs = split, seed, knobs
        self.species = held_out[split][:classes]
        self.class_names = [bird.name for bird in self.species]
        count = len(self.species)
        order = [seeds.rng(seed, "order", split, part).permutation(n) % count for part in self.domain_names]
        self.label = np.concatenate(order).astype(np.int64)
        self.domain = np.repeat(np.arange(len(self.domain_names)), n)
        self.key = [f"{split}/{part}/{i:06d}" for part in self.domain_names for i in range(n)]
        facts = (_code(), seed, tuple(knobs), self.class_names, self.key, self.label.tolist())
        self.fingerprint = hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
        self._draw = lru_cache(maxsize=2048)(self._draw)  # 160 MB of pictures: crop sets read them again

    def __len__(self) -> int:
        return len(self.key)

    def _draw(self, i: int) -> Picture:
        bird = self.species[self.label[i]]
        return pictures.draw(bird.traits, self.domain_names[self.domain[i]], self.seed, self.key[i], knobs=self.knobs)

    def load(self, i: int) -> Tensor:
        """Picture i, uint8 (3, H, W)."""
        return torch.from_numpy(self._draw(i).pixels.copy())

    def parts(self, i: int) -> dict[str, tuple[float, float, float, float]]:
        """The true boxes of picture i: part -> (x0, y0, x1, y1) in pixels."""
        return self._draw(i).parts

    def __reduce__(self):
        classes = len(self.species)
        return type(self), (
            self.split,
            "+".join(self.domain_names),
            len(self) // len(self.domain_names),
            self.seed,
            self.knobs,
            classes,
        )


def dataset(
    split: str = "test",
    domain: str = "photo",
    n: int = 2000,
    seed: int = 0,
    knobs: Knobs = DEFAULT,
    classes: int | None = None,
) -> Birdlets:
    """The arguments are those of `Birdlets`."""
    return Birdlets(split, domain, n, seed, knobs, classes)


def crowd(count: int) -> tuple[species.Species, ...]:
    """So many species with different names: those for tests, those for validation, and then newly drawn ones."""
    held_out = species.held_out()
    known = {bird.name: bird for bird in (*held_out["test"], *held_out["validation"])}
    more, k = {}, 0
    while len(known) + len(more) < count:
        traits = species.draw_traits(seeds.rng(0, "more species", k := k + 1))
        name = species.name_of(traits, "beak")
        if name not in known:
            more[name] = species.Species(name, traits, "beak", -1)
    return (*known.values(), *more.values())[:count]


def _inside(part: tuple[float, ...], box: tuple[float, ...]) -> float:
    """The share of a part's box that lies in a view."""
    width = min(part[2], box[2]) - max(part[0], box[0])
    height = min(part[3], box[3]) - max(part[1], box[1])
    return max(width, 0.0) * max(height, 0.0) / max((part[2] - part[0]) * (part[3] - part[1]), 1e-6)


def visible(parts: dict[str, tuple[float, ...]], box: tuple[float, ...]) -> set[str]:
    """The parts of which a view shows enough to speak of them: `SHOWN` of their box, `LEAST` of the view's side."""
    side = box[2] - box[0]
    return {
        name
        for name, part in parts.items()
        if _inside(part, box) >= SHOWN and max(part[2] - part[0], part[3] - part[1]) >= LEAST * side
    }


def _close_up(parts: dict, pixels: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    names = [name for name in parts if name not in ("body", "head")] or list(parts)
    x0, y0, x1, y1 = parts[names[int(rng.integers(len(names)))]]
    side = min(float(pixels), max(max(x1 - x0, y1 - y0) / rng.uniform(0.3, 0.85), 0.16 * pixels))
    x = np.clip((x0 + x1) / 2 + side * rng.uniform(-0.3, 0.3), side / 2, pixels - side / 2)
    y = np.clip((y0 + y1) / 2 + side * rng.uniform(-0.3, 0.3), side / 2, pixels - side / 2)
    return x - side / 2, y - side / 2, x + side / 2, y + side / 2


def _anywhere(pixels: int, scale: tuple[float, float], rng: np.random.Generator) -> tuple[float, float, float, float]:
    side = pixels * rng.uniform(*scale)
    x, y = rng.uniform(0, pixels - side, 2)
    return x, y, x + side, y + side


def _around(parts: dict, pixels: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A tighter framing that still holds the whole bird."""
    boxes = np.array(list(parts.values()))
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    side = rng.uniform(min(1.04 * (high - low).max(), pixels), pixels)
    x, y = (rng.uniform(max(h - side, 0), max(min(l, pixels - side), 0) + 1e-6) for l, h in zip(low, high))
    return x, y, x + side, y + side


def training_views(seed: int, index: int, whole: bool) -> tuple[np.ndarray, list[list[str]]]:
    """One picture of a new random species, cut into views that are captioned from what they show.

    Pictures 4k .. 4k + 3 show siblings, as the held-out species come in groups of siblings.

    Args:
        seed: of the training pictures
        index: of the picture
        whole: two framings of the whole bird, instead of whole picture, medium view and close-up

    Returns:
        uint8 (V, 3, TRAIN_SIZE, TRAIN_SIZE), V = 2 or 3, and V pairs of captions
    """
    rng = seeds.rng(seed, "training", index)
    shared = species.draw_traits(seeds.rng(seed, "training siblings", index // TRAIN_SIBLINGS))
    traits = species.training_traits(rng, shared.family, shared.body)
    domain = DOMAINS[int(rng.choice(len(DOMAINS), p=_TRAIN_DOMAINS))]
    low = rng.uniform(0.3, 0.8)
    knobs = Knobs((low, low + 0.15), rng.uniform(0.3, 1.0), int(rng.integers(9)), int(rng.integers(6)), DEFAULT.pixels)
    picture = pictures.draw(traits, domain, seed, "training", index, knobs=knobs)
    full = (0.0, 0.0, float(knobs.pixels), float(knobs.pixels))
    if whole:
        views = [full, _around(picture.parts, knobs.pixels, rng)]
    else:
        part = (
            _close_up(picture.parts, knobs.pixels, rng)
            if rng.random() < 0.7
            else _anywhere(knobs.pixels, (0.25, 0.6), rng)
        )
        views = [full, _anywhere(knobs.pixels, (0.5, 0.95), rng), part]
    image = Image.fromarray(picture.pixels.transpose(1, 2, 0))
    pixels = [np.asarray(image.resize((TRAIN_SIZE, TRAIN_SIZE), Image.BICUBIC, box=box)) for box in views]
    said = [
        captions.captions(
            traits, visible(picture.parts, box), picture.scene, domain, box[2] - box[0] < 0.5 * knobs.pixels, rng
        )
        for box in views
    ]
    return np.stack(pixels).transpose(0, 3, 1, 2), said


def contact_sheet(
    rows: int = 8, columns: int = 9, split: str = "validation", seed: int = 0, knobs: Knobs = DEFAULT
) -> Image.Image:
    """A page of pictures: half of the rows photos, the others painting, sketch and clipart in turn."""
    strips = []
    for row in range(rows):
        domain = "photo" if row < rows // 2 else DOMAINS[1 + row % 3]
        data = Birdlets(split, domain, rows * columns, seed, knobs)
        strips.append(np.concatenate([data._draw(row * columns + c).pixels for c in range(columns)], 2))
    return Image.fromarray(np.concatenate(strips, 1).transpose(1, 2, 0))
