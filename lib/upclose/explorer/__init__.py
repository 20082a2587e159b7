"""The explorer: a page in which one sees, and changes, what each method matches with what.

`case` computes what the page needs of one picture and two classes, `write` writes the page, `gallery` chooses the
pictures of Birdlets that the book shows. The page computes the methods itself, from the cosines that stand in a case;
`tests/test_explorer.py` compares it with the library in a browser.

    python -m upclose.explorer site/explorer
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from upclose import birdlets, crops, datasets, encode, evaluate, paths, prompts
from upclose.features import Plan, Text

SQUARE = Plan("square", 16, (0.5, 0.9), 0, 1.25, 4)
"""The crops of WCA, LGCA and LaZSL, each expanded 0 to 3 times."""

SMALL = Plan("area", 9, (0.1, 0.75))
"""The crops of D&D."""

MOST_PIXELS = 800
"""The longer side of a picture as the page shows it. Crops were cut from the picture itself."""

PAGE = ("index.html", "explorer.css", "explorer.js", "methods.js")


class Case(NamedTuple):
    """One picture, ready for the page.

    Attributes:
        id: letters, digits and dashes, 80 at most
        pixels: uint8 (3, H, W)
        facts: what the page reads, as JSON would hold it
    """

    id: str
    pixels: Tensor
    facts: dict


def case(
    encoder: encode.Encoder,
    pixels: Tensor,
    key: str,
    text: Text,
    said: Mapping[str, Sequence[str]],
    *,
    truth: int | None = None,
    why: str = "",
    parts: Mapping[str, Sequence[float]] | None = None,
) -> Case:
    """The cosines of one picture's crops with the descriptions of two classes.

    Args:
        encoder: of the picture
        pixels: uint8 (3, H, W)
        key: of the picture; its crops are those that a bank of `SQUARE` or `SMALL` holds under this key
        text: of the two classes
        said: their names and sentences, in the order of `text`
        truth: which of the two is the true class, None where that is not known
        why: what the page says above the picture
        parts: name -> box (x0, y0, x1, y1) in pixels, where the truth is known
    """
    height, width = pixels.shape[1:]
    image = encoder.encode_images([pixels])[0]
    classes = [
        {
            "name": name,
            "sentence": list(sentences),
            "whole": _numbers(text.of(k).description @ image),
            "label": _numbers(text.of(k).description @ text.label[k]),
            "cos": {},
        }
        for k, (name, sentences) in enumerate(said.items())
    ]
    cut = {}
    for name, plan in (("square", SQUARE), ("small", SMALL)):
        box = crops.plan_boxes(plan, height, width, key).reshape(plan.steps, plan.n, 4)
        crop = encoder.encode_crops(pixels, box)  # (T, N, D)
        cut[name] = {"box": _numbers(box, 1), "image": _numbers(crop @ image)}
        for k, facts in enumerate(classes):
            facts["cos"][name] = _numbers(crop @ text.of(k).description.mT)
    facts = {
        "width": width,
        "height": height,
        "truth": truth,
        "why": why,
        "parts": [[part, *_numbers(torch.tensor(box), 1)] for part, box in (parts or {}).items()],
        "crops": cut,
        "classes": classes,
    }
    return Case(re.sub(r"[^0-9a-z]+", "-", key.lower())[:80].strip("-") or "picture", pixels, facts)


def write(folder: str | Path, cases: Sequence[Case], stops: Sequence[Mapping] = ()) -> Path:
    """Write the page, which opens from a disk without a server.

    Args:
        folder: is made if need be; of what is there, files of the same names are replaced
        cases: the first is shown first
        stops: of a guided tour: title, id of a case, method, at (slider -> position), said, link

    Returns:
        the page's path

    Raises:
        ValueError: no case, or two of one id
    """
    if len({each.id for each in cases}) < max(1, len(cases)):
        raise ValueError(f"the explorer needs pictures with ids of their own, not {[each.id for each in cases]}")
    folder = Path(folder)
    for name in PAGE:
        (folder / "data").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(__file__).with_name("page") / name, folder / name)
    pictures = []
    for id, pixels, facts in cases:
        file = f"data/{id}.jpg"
        shown = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        shown.thumbnail((MOST_PIXELS, MOST_PIXELS))
        shown.save(packed := io.BytesIO(), "JPEG", quality=92, subsampling=0)
        paths.write(folder / file, packed.getvalue())
        paths.write(folder / "data" / f"{id}.js", _call("add", id, facts | {"file": file}))
        names = " or ".join(said["name"] for said in facts["classes"])
        pictures.append({"id": id, "file": file, "alt": f"{names}. {facts['why']}"})
    paths.write(folder / "data" / "index.js", _call("begin", {"pictures": pictures, "stops": list(stops)}))
    return folder / "index.html"


def _call(function: str, *values) -> bytes:
    """A script of one call. `<` is written as an escape, so that no text can end the script's element."""
    said = ", ".join(json.dumps(value, separators=(",", ":")).replace("<", "\\u003c") for value in values)
    return f"explorer.{function}({said});\n".encode()


def _numbers(x: Tensor, digits: int = 6) -> list:
    if x.ndim > 1:
        return [_numbers(row, digits) for row in x]
    return [round(value, digits) for value in x.double().tolist()]


def explain(
    encoder: encode.Encoder,
    pixels: Tensor,
    key: str,
    classes: Mapping[str, Sequence[str]],
    *,
    method: str = "LaZSL",
) -> Case:
    """A picture of one's own: the two classes that a method ranks first.

    Args:
        encoder: of picture and sentences
        pixels: uint8 (3, H, W)
        key: a name for the picture; its crops are drawn from it
        classes: class name -> its sentences
        method: a zero-shot method of the registry, which chooses the two classes

    Raises:
        ValueError: fewer than two classes, or a class without sentences
    """
    if len(classes) < 2:
        raise ValueError(f"{len(classes)} classes: an explanation compares two, so give at least two")
    names = list(classes)
    text = encode.embed_text(encoder, [prompts.TEMPLATE.format(n) for n in names], list(classes.values()), names)
    box = crops.plan_boxes(SQUARE, *pixels.shape[1:], key)
    ladder = evaluate.Ladder(encoder.encode_images([pixels]), encoder.encode_crops(pixels, box)[None])
    scores = evaluate.rules([method], lambda _: text)[method](ladder)[0]
    first, second = scores.topk(2).indices.tolist()
    two = Text.from_lists(text.label[[first, second]], [text.of(c).description for c in (first, second)])
    said = {names[c]: classes[names[c]] for c in (first, second)}
    why = f"{method} says {names[first]} ({scores[first]:.4f}); next is {names[second]} ({scores[second]:.4f})."
    return case(encoder, pixels, key, two, said, why=why)


# ------------------------------------------------------------------------------------------------- the book's pictures

RIVALS = ("CLIP-D", "WCA", "LGCA", "LaZSL", "D&D")
KINDS = {
    "only LaZSL": "Only LaZSL names this bird; the other four methods do not.",
    "LGCA misled": "WCA names this bird; LGCA, which expands WCA's crops, does not.",
    "only D&D": "Only D&D names this bird.",
    "only WCA": "Only WCA names this bird.",
    "not CLIP-D": "Every method that reads crops names this bird; CLIP-D, which reads the whole picture, does not.",
    "none": "All five methods are wrong here.",
    "only CLIP-D": "Only CLIP-D, which reads the whole picture, names this bird.",
    "not LaZSL": "LaZSL alone is wrong here.",
    "all": "All five methods name this bird.",
}


def kinds(right: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which pictures show which kind of disagreement: {kind: (n,) bool}, for who is right {method: (n,) bool}."""
    table = torch.stack([right[name] for name in RIVALS])  # (5, n)
    count = table.sum(0)
    found = {"none": count == 0, "all": count == len(RIVALS), "LGCA misled": right["WCA"] & ~right["LGCA"]}
    for row, name in zip(table, RIVALS):
        found |= {f"only {name}": row & (count == 1), f"not {name}": ~row & (count == len(RIVALS) - 1)}
    return found


def gallery(encoder: encode.Encoder, *, images: int = 150, each: int = 6) -> list[tuple[str, Case]]:
    """The pictures of Birdlets that the book shows, as (kind, case): the first of every kind in every domain.

    Args:
        encoder: of pictures and sentences
        images: of each domain, among which is looked for
        each: pictures that a domain gives at most
    """
    found: list[tuple[str, Case]] = []
    for domain in birdlets.DOMAINS:
        data = datasets.load("birdlets", "test", limit=images, domain=domain)
        text = evaluate.text(encoder, data, "lazsl")
        said = prompts.load("lazsl", data.name, data.split, data.class_names)
        label, scores = torch.as_tensor(data.label), {}
        for names, plan in ((RIVALS[:-1], SQUARE), (RIVALS[-1:], SMALL)):
            rules = evaluate.rules(names, lambda _, text=text: text)
            rows = evaluate.collect(lambda score, _: score, rules, encoder, data, [plan])
            scores |= {name: row[0] for name, row in rows.items()}
        right = {name: score.argmax(1) == label for name, score in scores.items()}
        here: list[tuple[str, Case]] = []
        disagree = kinds(right)
        for kind, why in KINDS.items():
            if (rows := disagree[kind].nonzero()[:, 0].tolist()) and len(here) < each:
                here.append((kind, _bird(encoder, data, rows[0], text, said, scores, why)))
        found += here
    return found


def _bird(encoder, data, i: int, text: Text, said, scores: Mapping[str, Tensor], why: str) -> Case:
    """A picture of Birdlets against the strongest other class of the methods that are wrong, or of LaZSL."""
    true = int(data.label[i])
    wrong = [int(s[i].argmax()) for s in scores.values() if int(s[i].argmax()) != true]
    others = scores["LaZSL"][i].clone()
    others[true] = -torch.inf
    rival = max(set(wrong), key=wrong.count) if wrong else int(others.argmax())
    two = Text.from_lists(text.label[[true, rival]], [text.of(c).description for c in (true, rival)])
    names = [data.class_names[c] for c in (true, rival)]
    start = re.compile(r"^a photo of an? .*?, which (has )?", re.IGNORECASE)
    short = {name: [start.sub("", line).rstrip(".") for line in said[name]] for name in names}
    return case(encoder, data.load(i), data.key[i], two, short, truth=0, why=why, parts=data.parts(i))


STOPS = (
    (
        "A plan",
        "only LaZSL",
        "LaZSL",
        {},
        "Move over a description. LaZSL gives each the same mass, 1/M, and the crops that resemble it most take it. "
        "Crops that are less like the picture than its average crop have none: they are faint.",
        "02_lazsl.html#a-plan-drawn",
    ),
    (
        "Entropy",
        "only LaZSL",
        "LaZSL",
        {"epsilon": 100},
        "Epsilon is 1 here and every crop that is kept has nearly the same share of every description: transport has "
        "become their mean. Draw epsilon down to 0.01 and watch single crops claim single attributes.",
        "02_lazsl.html#optimal-transport-on-three-crops-and-three-attributes",
    ),
    (
        "The whole picture's share",
        "not CLIP-D",
        "LaZSL",
        {"theta": 0},
        "With theta at 0 only the whole picture counts, LaZSL is CLIP-D, and it is wrong. Raise theta: the crops, "
        "which hold the bird larger, change the answer.",
        "02_lazsl.html#lazsl-s-two-additions-and-one-library-call",
    ),
    (
        "Expansion misleads LGCA",
        "LGCA misled",
        "LGCA",
        {"step": 100},
        "WCA names this bird and LGCA does not. Draw the step from first to last: fewer and fewer crops remain, each "
        "class keeps its own, and expanded they soon are the whole picture.",
        "01_lgca.html#when-does-expansion-pay-crop-scale-against-step",
    ),
    (
        "Small crops",
        "only D&D",
        "D&D",
        {},
        "D&D takes nine crops of 10 to 75 % of the area. Every crop must give its mass away, also one that shows only "
        "landscape: move over such a crop to see to which description it goes.",
        "03_dnd.html#zero-shot-d-d-beside-its-control",
    ),
)
"""The guided tour: title, kind of picture, method, positions of sliders, what is said, the book's section."""


def tour(found: Sequence[tuple[str, Case]]) -> list[dict]:
    """The stops for which `gallery` found a picture."""
    first = dict(reversed([(kind, each.id) for kind, each in found]))
    keys = ("title", "id", "method", "at", "said", "link")
    return [
        dict(zip(keys, (title, first[kind], method, at, said, f"../{section}")))
        for title, kind, method, at, said, section in STOPS
        if kind in first
    ]
