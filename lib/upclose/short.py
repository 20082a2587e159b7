"""The short way: `upclose.classify` and `upclose.explain` for a few pictures of one's own.

For a data set use `upclose.evaluate`, which keeps what it encodes; here every call encodes its pictures again.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from upclose import crops, encode, evaluate, images, prompts
from upclose.features import Ladder, Plan, Text, Views
from upclose.methods import dnd, lazsl, wca

Picture = str | PathLike | Tensor
Classes = Mapping[str, Sequence[str]] | str | PathLike

PLANS = {
    "LaZSL": lazsl.plans,
    "D&D": dnd.plans,
    "WCA": lambda views, text: (wca.image_weights(views)[..., None] * wca.text_weights(text))[:, None],
}
"""Methods whose score is a sum over crops and sentences: (views, text of one class) -> mass (B, 1, N, M)."""


class Answers(NamedTuple):
    """What a method says of B pictures.

    Attributes:
        picture: B names
        class_names: C names
        scores: (B, C), larger is better
    """

    picture: list[str]
    class_names: list[str]
    scores: Tensor

    @property
    def answer(self) -> list[str]:
        """The best class of every picture."""
        return [self.class_names[c] for c in self.scores.argmax(1).tolist()]

    def _repr_html_(self) -> str:
        best = self.scores.topk(min(3, len(self.class_names)))
        rows = [
            "".join(f"<td>{html.escape(self.class_names[c])} {s:.4f}</td>" for s, c in zip(values, order))
            for values, order in zip(best.values.tolist(), best.indices.tolist())
        ]
        lines = (f"<tr><th>{html.escape(name)}</th>{row}</tr>" for name, row in zip(self.picture, rows))
        return f"<table>{''.join(lines)}</table>"


class Explanation(NamedTuple):
    """Which crop stands for which sentence of a class.

    Attributes:
        class_name: whose sentences these are
        sentence: M sentences
        box: (M, 4) x0, y0, x1, y1 in pixels, for each the crop that holds most of its mass
        share: (M,) the share of the sentence's mass on that crop, over what a crop has on average
        pixels: uint8 (3, H, W) the picture
    """

    class_name: str
    sentence: list[str]
    box: Tensor
    share: Tensor
    pixels: Tensor

    def _repr_html_(self) -> str:
        rows = []
        for sentence, (x0, y0, x1, y1), share in zip(self.sentence, self.box.int().tolist(), self.share.tolist()):
            crop = Image.fromarray(self.pixels[:, y0:y1, x0:x1].permute(1, 2, 0).numpy()).resize((64, 64))
            crop.save(packed := io.BytesIO(), "PNG")
            source = f"data:image/png;base64,{base64.b64encode(packed.getvalue()).decode()}"
            said = html.escape(sentence)
            rows.append(f'<tr><td><img src="{source}" alt="crop"></td><td>{said}</td><td>{share:.2f}</td></tr>')
        return f"<b>{html.escape(self.class_name)}</b><table>{''.join(rows)}</table>"


def classify(
    pictures: Sequence[Picture],
    classes: Classes,
    *,
    method: str = "LaZSL",
    encoder: encode.Encoder | None = None,
    plan: Plan | None = None,
) -> Answers:
    """Name pictures with a zero-shot method of the registry.

    Args:
        pictures: files, or uint8 (3, H, W)
        classes: class name -> sentences, or a JSON file of that
        method: by its name in tables, in any case
        encoder: from `encode.load`; None is birdlets-tiny, which knows painted birds only
        plan: the crops; None is 30 squares of 50 to 90 % of the short side, for LGCA each expanded up to three times

    Raises:
        ValueError: an unknown method, one that needs more than pictures and sentences, no list of pictures or an empty
            one, fewer than two classes, or a class without sentences
        upclose.images.ImageError: a file that is no picture

    Example:
        >>> import upclose, torch
        >>> picture = torch.zeros(3, 64, 64, dtype=torch.uint8)
        >>> upclose.classify([picture], {"tern": ["an orange beak"], "crow": ["a black beak"]}).scores.shape
        torch.Size([1, 2])
    """
    if isinstance(pictures, Picture) or not len(pictures):
        raise ValueError("classify takes a list of pictures: [picture] for one")
    encoder = encoder or encode.load("birdlets-tiny")
    _, names, text = _text(encoder, classes)
    if len(names) < 2:
        raise ValueError(f"to name a picture takes at least two classes, not {len(names)}")
    chosen = evaluate.methods.get(method)
    rule = evaluate.rules([chosen.name], lambda _: text)[chosen.name]
    plan = plan or Plan(factor=1.25, steps=4 if "ladder" in chosen.needs else 1)
    read = [_pixels(picture) for picture in pictures]
    scores = [rule(_views(encoder, pixels, name, plan))[0] for name, pixels in read]
    return Answers([name for name, _ in read], names, torch.stack(scores).cpu())


def explain(
    picture: Picture,
    classes: Classes,
    *,
    method: str = "LaZSL",
    class_name: str | None = None,
    encoder: encode.Encoder | None = None,
    plan: Plan | None = None,
) -> Explanation:
    """Which crop a method matches with which sentence.

    Args:
        picture: a file, or uint8 (3, H, W)
        classes: as in `classify`
        method: one of `PLANS`, in any case
        class_name: whose sentences; None is the method's answer
        encoder: as in `classify`
        plan: as in `classify`

    Raises:
        ValueError: a method without a plan, or an unknown class
    """
    encoder = encoder or encode.load("birdlets-tiny")
    chosen = evaluate.methods.get(method).name
    if chosen not in PLANS:
        raise ValueError(f"{chosen} has no plan over crops and sentences; explain shows {', '.join(PLANS)}")
    said, names, text = _text(encoder, classes)
    if class_name is None:
        class_name = classify([picture], said, method=chosen, encoder=encoder, plan=plan).answer[0]
    if class_name not in names:
        raise ValueError(f"no class {class_name!r} among {', '.join(names[:10])}")
    name, pixels = _pixels(picture)
    views = _views(encoder, pixels, name, plan or Plan())
    mass = PLANS[chosen](views, text.of(names.index(class_name)))[0, 0].cpu()  # (N, M)
    best = mass.argmax(0)
    share = mass.amax(0) * len(mass) / mass.sum(0)
    return Explanation(class_name, list(said[class_name]), views.box[0, best].cpu(), share, pixels)


def _pixels(picture: Picture) -> tuple[str, Tensor]:
    return ("picture", picture) if isinstance(picture, Tensor) else (Path(picture).name, images.load_image(picture))


def _text(encoder: encode.Encoder, classes: Classes) -> tuple[dict, list[str], Text]:
    said = dict(classes) if isinstance(classes, Mapping) else prompts.read(classes)
    if not (names := list(said)):
        raise ValueError("no classes: give {class name: [sentences]}")
    return said, names, encode.embed_text(encoder, [prompts.TEMPLATE.format(n) for n in names], [*said.values()], names)


def _views(encoder: encode.Encoder, pixels: Tensor, key: str, plan: Plan) -> Views | Ladder:
    box = crops.plan_boxes(plan, *pixels.shape[1:], key)
    parts = encoder.encode_images([pixels]), encoder.encode_crops(pixels, box)[None], box[None]
    return Ladder(*parts) if plan.steps > 1 else Views(*parts)
