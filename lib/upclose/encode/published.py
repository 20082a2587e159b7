"""Published weights: what the papers' tables use, at which revision, and where they lie on this machine.

A file that somebody gave (`keep`) goes before the hub's cache. Both are called by their sha256.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
from huggingface_hub import constants as hub
from huggingface_hub import try_to_load_from_cache

from upclose import paths, shipped

_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors")


class Pin(NamedTuple):
    """Weights as they were published; what is not known is "" or 0.

    Attributes:
        name, tag: open_clip's
        hub: the repository
        file, revision: in it; without a revision the newest is taken
        bytes, sha256: of the file
        licence: of the weights
    """

    name: str
    tag: str
    hub: str
    file: str = ""
    revision: str = ""
    bytes: int = 0
    sha256: str = ""
    licence: str = ""

    @property
    def place(self) -> str:
        """Its page."""
        return f"{hub.ENDPOINT}/{self.hub}"


@cache
def pins() -> dict[tuple[str, str], Pin]:
    """The weights of the papers' tables, by name and tag.

    Source:
        Revisions and checksums are those that two public programs or more pin, some sizes those of one. Nothing of it
        was compared with the hub, where the licences are to be read again.
    """
    with shipped.checked(paths.PUBLISHED / "weights.csv").open(newline="") as file:
        _, *rows = csv.reader(file)
    return {(row[0], row[1]): Pin(*row[:5], int(row[5] or 0), *row[6:]) for row in rows}


def is_published(name: str, tag: str | os.PathLike | None) -> bool:
    """Whether these are weights that open_clip would download: a model and one of its tags."""
    return name in open_clip.list_models() and tag in open_clip.list_pretrained_tags_by_model(name)


def pin(name: str, tag: str) -> Pin:
    """The papers' weights with all that is known of them, others with the repository that open_clip knows."""
    facts = open_clip.get_pretrained_cfg(name, tag)
    return pins().get((name, tag)) or Pin(name, tag, *os.path.split(facts.get("hf_hub", "")))


def parse(text: str) -> tuple[str, str]:
    """NAME:TAG, or the NAME alone of weights of which the papers' tables use one.

    Raises:
        ValueError: such weights are not published, or the tables use several
    """
    name, _, tag = text.partition(":")
    name = name.replace("/", "-")
    tags = [tag] if tag else [other for known, other in pins() if known == name]
    if len(tags) == 1 and is_published(name, tags[0]):
        return name, tags[0]
    close = [f"{known}:{other}" for known, other in pins() if known.startswith(name.removesuffix("-quickgelu"))]
    raise ValueError(
        f"{text!r} is not the name of published weights: write NAME:TAG, "
        f"as {', '.join(close) or ', '.join(map(':'.join, pins()))}"
    )


def kept(name: str, tag: str) -> Path | None:
    """The file that was given as these weights, see `keep`."""
    return next((file for file in _folder(name, tag).glob("*") if re.fullmatch("[0-9a-f]{64}", file.stem)), None)


def cached(name: str, tag: str) -> Path | None:
    """Where the weights lie on this machine; None if they have to be downloaded."""
    if own := kept(name, tag):
        return own
    known = pin(name, tag)
    for file in (known.file,) if known.file else _FILES if known.hub else ():
        if isinstance(found := try_to_load_from_cache(known.hub, file, revision=known.revision or None), str):
            return Path(found)
    return None


def keep(name: str, tag: str, file: Path) -> Path:
    """Copy a file to where these weights are looked for, whole or not at all, in the place of one given before."""
    folder = _folder(name, tag)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"partial-{uuid.uuid4().hex}"
    try:
        shutil.copyfile(file, partial)
        place = folder / f"{shipped.sha256(partial)}{file.suffix}"
        os.replace(partial, place)
    finally:
        partial.unlink(missing_ok=True)
    for other in folder.glob("*"):
        if other != place and not other.name.startswith("partial-"):
            other.unlink()
    return place


def identity(name: str, tag: str) -> str:
    """What tells these weights from others: their name and tag, with the checksum of a file given as them, if another.

    A file is the published one if it has the checksum of the pinned file or of OpenAI's own.
    """
    own = kept(name, tag)
    return f"{name}:{tag}" + ("" if own is None or own.stem in official(name, tag) else f" from {own.stem}")


def rows() -> Iterator[dict[str, Any]]:
    """Each of the papers' weights, and what else is here: "weights", here, MiB, licence, revision, where."""
    for known in [*pins().values(), *_others()]:
        file = cached(known.name, known.tag)
        size = known.bytes if file is None else file.stat().st_size
        yield {
            "weights": f"{known.name}:{known.tag}",
            "here": "no" if file is None else "given" if file == kept(known.name, known.tag) else "yes",
            "MiB": f"{size / 2**20:,.0f}" if size else "not known",
            "licence": known.licence or "not known",
            "revision": known.revision[:12] or "not pinned",
            "where": file or known.place,
        }


def _others() -> Iterator[Pin]:
    """What open_clip could load from this machine and no table uses."""
    for name, tag in open_clip.list_pretrained():
        quick = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu")
        loads = not quick or open_clip.get_model_config(name).get("quick_gelu")
        if loads and (name, tag) not in pins() and cached(name, tag):
            yield pin(name, tag)


def official(name: str, tag: str) -> set[str]:
    """The checksums that are known of the published file: the pinned one's and OpenAI's own."""
    url = open_clip.get_pretrained_cfg(name, tag).get("url", "")
    return {pin(name, tag).sha256, url.split("/")[-2] if "openaipublic" in url else ""}


def _folder(name: str, tag: str) -> Path:
    return paths.cache() / "weights" / name / tag
