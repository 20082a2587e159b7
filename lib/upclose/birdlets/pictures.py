"""Draws one picture of one bird, and says where each of its parts is.

A bird is a list of polygons in its own coordinates (the body about one unit long, looking right, y down) that are made
once for each shape, then turned, scaled and moved at once. A picture is drawn at twice its size and averaged down. The
same (species, seed, knobs) gives the same bytes in every process.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from upclose import seeds
from upclose.birdlets.species import Traits

DOMAINS = ("photo", "painting", "sketch", "clipart")
SCENES = ("meadow", "forest", "sea", "desert", "snow", "mountain", "city", "lake")
PARTS = ("body", "belly", "head", "cap", "beak", "eye_ring", "crest", "collar", "wing", "tail", "legs")
RGB = {
    "red": (206, 38, 38),
    "orange": (244, 132, 24),
    "yellow": (248, 216, 48),
    "green": (48, 152, 58),
    "blue": (44, 92, 208),
    "purple": (128, 54, 172),
    "pink": (248, 150, 190),
    "brown": (122, 76, 40),
    "black": (30, 30, 34),
    "white": (244, 244, 240),
    "grey": (138, 142, 146),
}


class Knobs(NamedTuple):
    """What makes a picture of this world easy or hard.

    Attributes:
        size: range of the bird's longer side as a share of the picture's
        position: 0 puts the bird in the middle, 1 anywhere that it fits, off the centre more often than on it
        clutter: neutral objects in the scene
        distractors: look-alikes, things shaped and coloured like a bird's parts that belong to no bird
        pixels: side of the picture
    """

    size: tuple[float, float] = (0.4, 0.7)
    position: float = 1.0
    clutter: int = 5
    distractors: int = 3
    pixels: int = 160


DEFAULT = Knobs()
PROTOTYPE = Knobs(size=(0.7, 0.95), position=0.5, clutter=4, distractors=0)


class Picture(NamedTuple):
    """A drawn bird.

    Attributes:
        pixels: uint8 (3, H, W)
        parts: part -> (x0, y0, x1, y1) in pixels, for every part of which at least half is inside the picture
        scene: one of SCENES
    """

    pixels: np.ndarray
    parts: dict[str, tuple[float, float, float, float]]
    scene: str


# --------------------------------------------------------------------------------------------------- anatomy


class _Build(NamedTuple):
    """A family's silhouette: half axes and lean of the body, neck, head radius, leg length."""

    a: float
    b: float
    lean: float
    neck: tuple[float, float]
    width: float
    head: float
    leg: float
    raised: float = 0.12  # how often the wing is up


_BUILDS = {
    "finch": _Build(0.36, 0.26, 25, (0.06, -0.10), 0.17, 0.19, 0.17),
    "tern": _Build(0.45, 0.16, 6, (0.08, -0.05), 0.12, 0.14, 0.11, 0.35),
    "heron": _Build(0.34, 0.19, 22, (0.14, -0.40), 0.08, 0.14, 0.42),
    "duck": _Build(0.42, 0.24, 4, (0.05, -0.25), 0.13, 0.17, 0.11),
    "owl": _Build(0.36, 0.28, 78, (0.00, -0.10), 0.26, 0.26, 0.09),
    "woodpecker": _Build(0.40, 0.16, 66, (0.06, -0.12), 0.11, 0.15, 0.10),
    "parrot": _Build(0.36, 0.20, 58, (0.03, -0.08), 0.19, 0.21, 0.10),
    "hawk": _Build(0.40, 0.26, 48, (0.08, -0.10), 0.15, 0.15, 0.18, 0.25),
    "hummingbird": _Build(0.28, 0.14, 34, (0.05, -0.07), 0.11, 0.15, 0.08, 0.8),
    "penguin": _Build(0.46, 0.23, 86, (0.02, -0.08), 0.17, 0.17, 0.07),
    "swan": _Build(0.42, 0.23, 8, (0.10, -0.48), 0.08, 0.13, 0.10),
    "quail": _Build(0.31, 0.29, 18, (0.06, -0.10), 0.13, 0.14, 0.13),
}


def _ellipse(x: float, y: float, a: float, b: float, start: float = 0.0, end: float = 360.0, n: int = 20) -> np.ndarray:
    t = np.radians(np.linspace(start, end, n, endpoint=end - start < 360))
    return np.stack([x + a * np.cos(t), y + b * np.sin(t)], 1)


def _smooth(points: list[tuple[float, float]], n: int = 5) -> np.ndarray:
    """A closed Catmull-Rom curve through the points."""
    p = np.asarray(points, float)
    t = (np.arange(n) / n)[:, None, None]
    before, after, far = np.roll(p, 1, 0), np.roll(p, -1, 0), np.roll(p, -2, 0)
    curve = 0.5 * (
        2 * p
        + (after - before) * t
        + (2 * before - 5 * p + 4 * after - far) * t**2
        + (3 * p - before - 3 * after + far) * t**3
    )
    return curve.transpose(1, 0, 2).reshape(-1, 2)


def _turn(points: np.ndarray, degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return points @ np.array([[c, s], [-s, c]])


def _beak(shape: str, r: float) -> np.ndarray:
    """The beak of a head of radius r at the origin; sizes follow r only in part, so that every beak can be seen."""
    k = 0.10 + 0.45 * r
    x = 0.82 * r
    outline = {
        "pointed": [(0, -0.30), (2.1, 0.05), (0, 0.38)],
        "hooked": [(0, -0.62), (0.75, -0.55), (1.25, 0.0), (1.22, 0.85), (0.82, 0.30), (0, 0.55)],
        "flat": [
            (0, -0.30),
            (0.9, -0.22),
            (1.5, -0.48),
            (1.85, -0.1),
            (1.8, 0.42),
            (1.3, 0.55),
            (0.8, 0.32),
            (0, 0.42),
        ],
        "curved": [(0, -0.34), (0.8, -0.28), (1.6, 0.25), (2.0, 1.15), (1.45, 0.62), (0.8, 0.18), (0, 0.32)],
    }[shape]
    return np.asarray(outline) * k + [x, 0.05 * r]


def _tail(shape: str) -> np.ndarray:
    """The tail in the body's frame with its root at the origin, pointing to -x."""
    return np.asarray(
        {
            "short": [(0.06, -0.07), (-0.14, -0.09), (-0.17, 0.0), (-0.14, 0.09), (0.06, 0.07)],
            "fan": [(0.06, -0.06), (-0.26, -0.24), (-0.36, -0.10), (-0.38, 0.06), (-0.30, 0.22), (0.06, 0.06)],
            "forked": [(0.06, -0.07), (-0.46, -0.22), (-0.24, 0.0), (-0.46, 0.20), (0.06, 0.07)],
            "long": [(0.06, -0.05), (-0.62, -0.06), (-0.66, 0.0), (-0.62, 0.06), (0.06, 0.05)],
        }[shape]
    )


class _Piece(NamedTuple):
    part: str  # one of PARTS, or "neck", "eye", "pupil", "mark"
    points: np.ndarray  # (k, 2) in the bird's coordinates


@cache
def _anatomy(family: str, beak: str, tail: str, wing: str, raised: bool, swims: bool) -> tuple[_Piece, ...]:
    """The polygons of a bird in the order in which they are painted."""
    f = _BUILDS[family]
    root = _turn(np.array([[0.74 * f.a, -0.10 * f.b]]), -f.lean)[0]  # where the neck leaves the body
    head = root + f.neck
    along = np.asarray(f.neck) / np.linalg.norm(f.neck)
    across = np.array([-along[1], along[0]])
    r = f.head
    pieces: list[_Piece] = []

    def add(part: str, points: np.ndarray) -> None:
        pieces.append(_Piece(part, points))

    add("tail", _turn(_tail(tail) + np.array([-0.86 * f.a, 0.0]), -f.lean))
    foot = 0.0
    if not swims:
        hip = _turn(np.array([[-0.10 * f.a, 0.0]]), -f.lean)[0]
        down = abs(np.sin(np.radians(f.lean))) * f.a + abs(np.cos(np.radians(f.lean))) * f.b
        top, foot = hip[1] + 0.55 * down, hip[1] + 0.86 * down + f.leg
        for x in (hip[0] - 0.07, hip[0] + 0.09):
            add(
                "legs",
                np.array(
                    [
                        (x - 0.025, top),
                        (x + 0.025, top),
                        (x + 0.025, foot - 0.035),
                        (x + 0.12, foot),
                        (x - 0.05, foot),
                        (x - 0.025, foot - 0.035),
                    ]
                ),
            )
    crown = _turn(
        np.array([(-0.9, -0.5), (-1.5, -1.55), (-0.55, -1.1), (-0.45, -2.0), (0.0, -1.15), (0.5, -1.85), (0.45, -0.8)])
        * r,
        -8,
    )
    add("crest", head + crown)
    add(
        "neck",
        np.stack(
            [
                root - across * f.width * 0.75,
                head - across * f.width * 0.5,
                head + across * f.width * 0.5,
                root + across * f.width * 0.75,
            ]
        ),
    )
    egg = _ellipse(0, 0, f.a, f.b, n=28)
    egg[:, 1] *= 1 + 0.35 * egg[:, 0] / f.a - 0.12  # fuller at the breast
    add("body", _turn(egg, -f.lean))
    add("belly", _turn(_ellipse(0.22 * f.a, 0.46 * f.b, 0.52 * f.a, 0.42 * f.b), -f.lean))
    add("head", head + _ellipse(0, 0, r, r))
    mid = root + np.asarray(f.neck) * (0.42 if np.linalg.norm(f.neck) > 0.2 else 0.18)
    half, thick = max(f.width * 0.62, 0.62 * r), 0.05
    sag = along * -0.05
    add(
        "collar",
        np.stack(
            [
                mid - across * half + along * thick,
                mid + sag + along * thick,
                mid + across * half + along * thick,
                mid + across * half - along * thick,
                mid + sag - along * thick * 1.3,
                mid - across * half - along * thick,
            ]
        ),
    )
    add("cap", head + _turn(_ellipse(0, 0, 1.06 * r, 1.06 * r, 180, 360, 12), -14))
    add("beak", head + _beak(beak, r))
    eye = head + np.array([0.34, -0.12]) * r
    ring = 0.035 + 0.26 * r
    add("eye_ring", eye + _ellipse(0, 0, ring, ring, n=16))
    add("eye", eye + _ellipse(0, 0, 0.55 * ring, 0.55 * ring, n=12))
    if raised:
        plume = _smooth(
            [(0.32, -0.2), (0.18, -2.1), (-0.35, -3.2), (-0.75, -2.6), (-0.62, -1.1), (-0.42, 0.1), (0.0, 0.35)]
        )
        axis = np.array([(0.02, -0.7), (-0.12, -1.3), (-0.28, -1.9), (-0.40, -2.45), (-0.28, -0.45)])
        size, spin = np.array([f.a, 0.55 * f.b + 0.06]), -0.55 * f.lean
    else:
        plume = _smooth(
            [(0.52, -0.15), (0.42, 0.42), (0.0, 0.62), (-0.55, 0.40), (-1.12, 0.05), (-0.55, -0.42), (0.1, -0.55)]
        )
        axis = np.array([(0.24, 0.02), (-0.06, 0.08), (-0.36, 0.06), (-0.64, 0.03), (-0.06, -0.26)])
        size, spin = np.array([f.a, 0.92 * f.b]), -f.lean
    place = lambda p: _turn(p * size, spin)  # noqa: E731
    add("wing", place(plume))
    if wing == "striped":
        for x, y in axis[:4]:
            tilt = np.array([(-0.07, -0.32), (0.05, -0.32), (0.09, 0.30), (-0.03, 0.30)])
            wide = np.array([(-0.30, -0.13), (0.24, -0.05), (0.24, 0.14), (-0.30, 0.06)])
            add("mark", place((wide if raised else tilt) + [x, y]))
    elif wing == "spotted":
        spot = 0.048 + 0.05 * f.b
        for x, y in np.concatenate([axis, axis[1:3] + ([0.12, 0.0] if raised else [0.02, 0.30])]):
            add("mark", place(np.array([[x, y]])) + _ellipse(0, 0, spot, spot, n=8))
    return tuple(pieces)


# ------------------------------------------------------------------------------------------------ background

_SKY = {
    "meadow": (168, 208, 240),
    "forest": (96, 128, 96),
    "sea": (176, 214, 240),
    "desert": (244, 216, 160),
    "snow": (206, 218, 230),
    "mountain": (186, 204, 236),
    "city": (190, 194, 206),
    "lake": (208, 198, 222),
}
_GROUND = {
    "meadow": (112, 176, 72),
    "forest": (66, 74, 44),
    "sea": (40, 98, 152),
    "desert": (222, 176, 104),
    "snow": (236, 240, 246),
    "mountain": (116, 122, 104),
    "city": (112, 110, 116),
    "lake": (78, 128, 138),
}
WATER = ("sea", "lake")


def _jitter(rng: np.random.Generator, colour: tuple[int, int, int], amount: float) -> tuple[int, int, int]:
    return tuple(int(min(255, max(0, c + d))) for c, d in zip(colour, rng.normal(0, amount, 3)))


def _flat(points: np.ndarray) -> list[float]:
    return points.ravel().tolist()


def _background(draw: ImageDraw.ImageDraw, scene: str, side: int, rng: np.random.Generator, knobs: Knobs) -> None:
    ground = _jitter(rng, _GROUND[scene], 12)
    horizon = side * rng.uniform(0.35, 0.75)
    draw.rectangle((0, 0, side, horizon), fill=_jitter(rng, _SKY[scene], 14))
    draw.rectangle((0, horizon, side, side), fill=ground)
    u = rng.random((8, 4))
    match scene:
        case "forest":
            for x, w, g, h in u[:6]:
                x, w = x * side, side * (0.03 + 0.05 * w)
                draw.rectangle((x, 0, x + w, horizon + side * 0.12 * g), fill=(70 + int(30 * h), 52, 40))
                r = side * (0.08 + 0.1 * g)
                draw.ellipse(
                    (x - r, side * 0.2 * h - r, x + r + w, side * 0.2 * h + r), fill=(40, 90 + int(50 * g), 44)
                )
        case "mountain" | "lake":
            for x, w, h, g in u[:4]:
                x, w, h = x * side, side * (0.2 + 0.3 * w), side * (0.15 + 0.3 * h)
                tone = int(90 + 60 * g)
                draw.polygon((x - w, horizon, x, horizon - h, x + w, horizon), fill=(tone, tone, tone + 18))
                draw.polygon(
                    (x - w * 0.25, horizon - h * 0.75, x, horizon - h, x + w * 0.25, horizon - h * 0.75),
                    fill=(236, 238, 244),
                )
        case "city":
            for x, w, h, g in u:
                x, w, h = x * side, side * (0.08 + 0.1 * w), side * (0.15 + 0.4 * h)
                tone = int(70 + 70 * g)
                draw.rectangle((x, horizon - h, x + w, horizon), fill=(tone, tone, tone + 12))
                for k in range(3):
                    y = horizon - h * (0.85 - 0.25 * k)
                    draw.rectangle((x + w * 0.2, y, x + w * 0.8, y + side * 0.02), fill=(228, 214, 150))
        case "desert":
            for x, w, h, _ in u[:3]:
                x, w = x * side, side * (0.3 + 0.3 * w)
                draw.ellipse(
                    (x - w, horizon - side * 0.1 * h, x + w, horizon + side * 0.3), fill=_jitter(rng, _GROUND[scene], 8)
                )
            x, h = u[3, 0] * side, side * (0.15 + 0.1 * u[3, 1])
            draw.rectangle((x, horizon - h, x + side * 0.03, horizon + side * 0.1), fill=(70, 120, 70))
        case "snow":
            for x, w, h, g in u[:4]:
                x, w, h = x * side, side * (0.06 + 0.05 * w), side * (0.2 + 0.15 * h)
                draw.polygon((x - w, horizon, x, horizon - h, x + w, horizon), fill=(52, int(84 + 30 * g), 74))
        case "meadow":
            for x, y, h, g in u:
                x, y = x * side, horizon + (side - horizon) * y
                draw.line(
                    (x, y, x + side * 0.03 * (g - 0.5), y - side * (0.05 + 0.08 * h)),
                    fill=(60, 130, 50),
                    width=max(1, side // 100),
                )
        case "sea":
            for x, y, w, _ in u:
                x, y = x * side, horizon + (side - horizon) * y
                draw.line((x, y, x + side * (0.05 + 0.1 * w), y), fill=(150, 190, 220), width=max(1, side // 120))
    palette = list(RGB.values())
    for _ in range(knobs.clutter):
        kind, x, y, s, c, t = rng.random(6)
        x, y, s = x * side, side * (0.15 + 0.85 * y), side * (0.02 + 0.035 * s)
        colour = _jitter(rng, palette[int(c * len(palette))], 25)
        if kind < 0.4:
            draw.rectangle((x - s, y - s, x + s, y + s * (0.5 + t)), fill=colour)
        elif kind < 0.7:
            draw.ellipse((x - s, y - s, x + s, y + s), fill=colour)
        else:
            draw.line((x, y, x + 4 * s * (t - 0.5), y + 3 * s * (kind - 0.8)), fill=colour, width=max(1, int(s / 2)))
    for _ in range(knobs.distractors):
        kind, x, y, s, c, t = rng.random(6)
        x, y, s = x * side, side * (0.1 + 0.9 * y), side * (0.035 + 0.05 * s)
        colour = _jitter(rng, palette[int(c * len(palette))], 12)
        if kind < 0.45:  # a thing like a beak
            shape = _turn(_beak(("pointed", "hooked", "flat", "curved")[int(kind / 0.45 * 4)], 0.15) * (s * 5), t * 360)
            draw.polygon(_flat(shape + np.array([x, y])), fill=colour)
        elif kind < 0.7:  # a thing like an eye
            draw.ellipse((x - s * 0.6, y - s * 0.6, x + s * 0.6, y + s * 0.6), fill=colour)
            draw.ellipse((x - s * 0.3, y - s * 0.3, x + s * 0.3, y + s * 0.3), fill=RGB["black"])
        elif kind < 0.85:  # a thing like a barred or dotted wing
            draw.ellipse((x - 1.6 * s, y - s, x + 1.6 * s, y + s), fill=colour)
            mark = _jitter(rng, palette[int(t * len(palette))], 12)
            for k in (-0.8, -0.1, 0.6):
                draw.rectangle((x + k * s, y - 0.6 * s, x + (k + 0.25) * s, y + 0.6 * s), fill=mark)
        else:  # a thing like a pair of legs
            for dx in (-0.5, 0.4):
                draw.rectangle((x + dx * s, y - s, x + (dx + 0.25) * s, y + s), fill=colour)


# ---------------------------------------------------------------------------------------------------- a bird


class _Pose(NamedTuple):
    pieces: tuple[_Piece, ...]
    points: list[np.ndarray]  # one (k, 2) array a piece, in pixels of the picture


def _shown(traits: Traits, piece: _Piece) -> bool:
    return piece.part not in ("cap", "crest", "collar", "eye_ring") or getattr(traits, piece.part) is not None


def _pose(traits: Traits, rng: np.random.Generator, knobs: Knobs, scene: str) -> _Pose:
    raised = bool(rng.random() < _BUILDS[traits.family].raised)
    swims = bool(rng.random() < 0.5) and traits.family in ("duck", "swan") and scene in WATER
    pieces = tuple(
        piece
        for piece in _anatomy(traits.family, traits.beak_shape, traits.tail, traits.wing, raised, swims)
        if _shown(traits, piece)
    )
    lengths = np.cumsum([len(piece.points) for piece in pieces])[:-1]
    points = _turn(np.concatenate([piece.points for piece in pieces]), rng.uniform(-14, 14))
    if rng.random() < 0.5:
        points = points * [-1, 1]
    low, high = points.min(0), points.max(0)
    side = knobs.pixels * rng.uniform(*knobs.size)
    points = (points - (low + high) / 2) * (side / (high - low).max())
    room = knobs.pixels - (high - low) * (side / (high - low).max())
    offset = 0.5 * np.sin(rng.uniform(-np.pi / 2, np.pi / 2, 2))
    points += knobs.pixels / 2 + offset * knobs.position * np.maximum(room, 0)
    return _Pose(pieces, np.split(points, lengths))


def _boxes(pose: _Pose, pixels: int) -> dict[str, tuple[float, float, float, float]]:
    starts = np.cumsum([0] + [len(points) for points in pose.points[:-1]])
    points = np.concatenate(pose.points)
    every = np.hstack([np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)]).tolist()
    found: dict[str, tuple[float, float, float, float]] = {}
    for piece, (x0, y0, x1, y1) in zip(pose.pieces, every):
        if piece.part in PARTS:
            u0, v0, u1, v1 = found.get(piece.part, (x0, y0, x1, y1))
            found[piece.part] = min(x0, u0), min(y0, v0), max(x1, u1), max(y1, v1)
    boxes = {}
    for part, (x0, y0, x1, y1) in found.items():
        inside = max(x0, 0.0), max(y0, 0.0), min(x1, float(pixels)), min(y1, float(pixels))
        width, height = inside[2] - inside[0], inside[3] - inside[1]
        if width > 0 and height > 0 and width * height >= 0.5 * (x1 - x0) * (y1 - y0):
            boxes[part] = inside
    return boxes


def _colours(traits: Traits, rng: np.random.Generator) -> dict[str, tuple[int, int, int]]:
    body = _jitter(rng, RGB[traits.body], 8)
    shade = tuple(int(c * 0.82) + (14 if max(body) < 60 else 0) for c in body)
    colours = {"body": body, "neck": body, "head": body, "tail": shade, "wing": shade, "eye": (12, 12, 14)}
    for part in ("belly", "cap", "beak", "eye_ring", "crest", "collar", "legs"):
        value = getattr(traits, part)
        if value is not None:
            colours[part] = _jitter(rng, RGB[value], 8)
    if traits.wing_mark is not None:
        colours["mark"] = _jitter(rng, RGB[traits.wing_mark], 8)
    return colours


def _paint(draw: ImageDraw.ImageDraw, pose: _Pose, colours: dict, outline: tuple | None = None, width: int = 1) -> None:
    for piece, points in zip(pose.pieces, pose.points):
        draw.polygon(_flat(points * 2), fill=colours[piece.part], outline=outline, width=width)


# --------------------------------------------------------------------------------------------------- domains


@cache
def _textures(pixels: int, kind: str) -> np.ndarray:
    """(8, H, W) int16: smooth patches of light and fine grain, or paper."""
    rng = seeds.rng(0, "texture", kind, pixels)
    out = []
    for _ in range(8):
        layers = np.zeros((pixels, pixels), np.float32)
        for cells, amount in ((4, 16.0), (12, 8.0)) if kind == "light" else ((6, 5.0), (40, 3.0)):
            coarse = Image.fromarray(rng.normal(0, amount, (cells, cells)).astype(np.float32))
            layers += np.asarray(coarse.resize((pixels, pixels), Image.BICUBIC))
        out.append(layers + rng.normal(0, 5.0 if kind == "light" else 3.0, layers.shape))
    return np.stack(out).astype(np.int16)


@cache
def _strokes(pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Six fields of brush strokes.

    Returns:
        (6, H * W) int64, the flat index of the pixel whose colour the stroke on top carries there, and
        (6, H, W) int16, the relief that its bristles leave
    """
    rng = seeds.rng(0, "strokes", pixels)
    length, thick = max(3, pixels // 16), max(2, pixels // 45)
    source = np.empty((6, pixels, pixels), np.int64)
    relief = np.zeros((6, pixels, pixels), np.int16)
    along = np.arange(length) - length // 2
    for field in range(6):
        source[field] = np.arange(pixels * pixels).reshape(pixels, pixels)
        for _ in range(pixels * pixels // 30):
            cy, cx = rng.integers(pixels, size=2)
            angle = rng.normal(-0.7, 0.5)
            tone = rng.integers(-14, 15, thick)
            for t in range(thick):
                y = np.clip(cy + along * np.sin(angle) + t * np.cos(angle), 0, pixels - 1).astype(int)
                x = np.clip(cx + along * np.cos(angle) - t * np.sin(angle), 0, pixels - 1).astype(int)
                source[field, y, x] = cy * pixels + cx
                relief[field, y, x] = tone[t]
    return source.reshape(6, -1), relief


def _photo(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    image = image.reduce(2)
    if rng.random() < 0.35:
        image = image.filter(ImageFilter.BoxBlur(rng.uniform(0.2, 0.6)))
    gain = rng.uniform(0.82, 1.12) * rng.uniform(0.94, 1.06, 3)
    image = image.point(np.minimum(np.outer(gain, np.arange(256)), 255).astype(np.uint8).ravel().tolist())
    light, side = rng.integers(16, size=2)
    texture = _textures(image.height, "light")[light // 2]
    texture = texture[:: 1 - 2 * int(light % 2), :: 1 - 2 * int(side % 2)]
    pixels = np.asarray(image).astype(np.int16)
    pixels += texture[..., None]
    return np.clip(pixels, 0, 255, out=pixels).astype(np.uint8)


def _painting(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    hue, saturation, value = image.reduce(2).convert("HSV").split()
    turn = int(rng.integers(-9, 10))
    hue = hue.point([(h + turn) % 256 for h in range(256)])
    saturation = saturation.point([min(255, int(40 + 0.85 * s)) for s in range(256)])
    value = value.point([min(255, 36 * round(v / 36) + 10) for v in range(256)])
    pixels = np.asarray(Image.merge("HSV", (hue, saturation, value)).convert("RGB"))
    side = pixels.shape[0]
    source, relief = _strokes(side)
    pick = int(rng.integers(len(source)))
    stroked = pixels.reshape(-1, 3)[source[pick]].reshape(side, side, 3).astype(np.int16)
    glaze = np.array([16, 2, -24]) * rng.uniform(0.3, 1.0)
    return np.clip(stroked + relief[pick][..., None] + glaze.astype(np.int16), 0, 255).astype(np.uint8)


def _sketch(pose: _Pose, colours: dict, side: int, rng: np.random.Generator) -> np.ndarray:
    image = Image.new("RGB", (2 * side, 2 * side), (252, 250, 244))
    draw = ImageDraw.Draw(image)
    pale = {}
    for part, colour in colours.items():
        grey = int(0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2])
        pale[part] = tuple(int(0.48 * (0.45 * grey + 0.55 * c) + 0.52 * 252) for c in colour)
    _paint(draw, pose, pale, outline=(52, 50, 54), width=max(2, side // 54))
    hatch = Image.new("L", image.size, 0)
    pen = ImageDraw.Draw(hatch)
    gap, slope = int(rng.integers(7, 12)), rng.uniform(0.5, 1.5)
    for x in range(-2 * side, 2 * side, gap):
        pen.line((x, 0, x + 2 * side * slope, 2 * side), fill=42)
    shadow = Image.new("L", image.size, 0)
    ink = ImageDraw.Draw(shadow)
    for piece, points in zip(pose.pieces, pose.points):
        ink.polygon(_flat(points * 2), fill=255 if piece.part in ("wing", "tail", "neck") else 0)
    image = ImageChops.subtract(image, Image.merge("RGB", [ImageChops.multiply(hatch, shadow)] * 3))
    pixels = np.asarray(image.reduce(2)).astype(np.int16) + _textures(side, "paper")[int(rng.integers(8)), ..., None]
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _clipart(pose: _Pose, colours: dict, side: int, rng: np.random.Generator) -> np.ndarray:
    page = ((255, 255, 255), (250, 240, 190), (238, 190, 190), (196, 220, 244), (206, 236, 200), (222, 202, 240))
    image = Image.new("RGB", (2 * side, 2 * side), page[int(rng.integers(len(page)))])
    vivid = {
        part: tuple(int(min(255, max(0, 128 + 1.5 * (c - 120)))) for c in colour) for part, colour in colours.items()
    }
    _paint(ImageDraw.Draw(image), pose, vivid, outline=(0, 0, 0), width=max(3, side // 40))
    return np.asarray(image.reduce(2))


def draw(traits: Traits, domain: str, seed: int, *key: object, knobs: Knobs = DEFAULT) -> Picture:
    """One picture of a bird.

    Args:
        traits: what the bird looks like
        domain: one of DOMAINS
        seed: with `key`, decides scene, pose, place and everything else that is drawn at random
        key: names the picture
        knobs: how hard the picture is

    Raises:
        ValueError: no such domain
    """
    if domain not in DOMAINS:
        raise ValueError(f"no domain {domain!r}; there are {', '.join(DOMAINS)}")
    rng = seeds.rng(seed, "picture", *key)
    scene = SCENES[int(rng.integers(len(SCENES)))]
    pose = _pose(traits, rng, knobs, scene)
    colours = _colours(traits, rng)
    side = knobs.pixels
    if domain == "sketch":
        pixels = _sketch(pose, colours, side, rng)
    elif domain == "clipart":
        pixels = _clipart(pose, colours, side, rng)
    else:
        image = Image.new("RGB", (2 * side, 2 * side))
        canvas = ImageDraw.Draw(image)
        _background(canvas, scene, 2 * side, rng, knobs)
        _paint(canvas, pose, colours)
        pixels = (_photo if domain == "photo" else _painting)(image, rng)
    return Picture(np.ascontiguousarray(pixels.transpose(2, 0, 1)), _boxes(pose, side), scene)
