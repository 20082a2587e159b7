"""Sentences for classes: {class name: [sentences]}, by source.

| source | sentences |
| --- | --- |
| clip | "a photo of a {name}." |
| clip-e | the templates of CLIP's prompt ensemble |
| clip-d | "{name}, which has {descriptor}." (Menon and Vondrick) |
| lazsl | "a photo of a {name}, which has {descriptor}." (LaZSL section 4.1) |
| dnd | "a photo of a bird with {descriptor}.": the descriptor without the class's name |
| cupl | full sentences by a language model (Pratt et al.) |
| waffle | "a photo of a {name}, which has {random words}." (Roth et al.) |
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from upclose import paths, seeds

TEMPLATE = "a photo of a {}."
_TEMPLATES = {
    "birdlets": (
        "a photo of a {}.",
        "a picture of a {}.",
        "an image of a {}.",
        "a good photo of a {}.",
        "a photo of the {}.",
        "a close-up photo of a {}.",
        "a photo of one {}.",
    )
}
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
SOURCES = ("clip", "clip-e", "clip-d", "lazsl", "dnd", "cupl", "waffle")


def read(file: str | Path) -> dict[str, list[str]]:
    """A description file, {class: [sentences]}.

    Raises:
        ValueError: it is no JSON of that form
        FileNotFoundError: there is no such file
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"no description file {file}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}; it must map class names to lists of sentences")
    for name, rows in content.items():
        if not isinstance(rows, list) or not all(isinstance(row, str) for row in rows):
            raise ValueError(f"{file}: the descriptions of {name!r} must be a list of strings")
    return content


def waffle(class_names: Sequence[str], pairs: int = 15, seed: int = 0) -> dict[str, list[str]]:
    """WaffleCLIP's prompts: the same random descriptors for every class, half of them random words, half random letters.

    Args:
        class_names: C names
        pairs: of a descriptor of words and one of letters
        seed: of the descriptors

    Source: Roth et al., "Waffling around for Performance", section 4.
    """
    rng = seeds.rng(seed, "waffle")
    words = (paths.PACKAGE / "published" / "words.txt").read_text().split()
    descriptors = []
    for _ in range(pairs):
        descriptors.append(" ".join(words[int(k)] for k in rng.choice(len(words), 2, replace=False)))
        letters = ("".join(_LETTERS[int(k)] for k in rng.integers(26, size=int(n))) for n in rng.integers(3, 8, size=2))
        descriptors.append(" ".join(letters))
    return {name: [f"a photo of a {name}, which has {descriptor}." for descriptor in descriptors] for name in class_names}


def _descriptors(source: str, dataset: str, split: str) -> dict[str, list[str]]:
    if dataset != "birdlets":
        raise ValueError(f"no {source} descriptions of {dataset!r} are shipped; read a file with prompts.read")
    return read(paths.PACKAGE / "birdlets" / "prompts" / f"{source}_{split}.json")


def load(source: str, dataset: str, split: str, class_names: Sequence[str], seed: int = 0) -> dict[str, list[str]]:
    """The sentences of a source for the classes of a data set, in the data set's order.

    Args:
        source: one of SOURCES
        dataset: the registry's name
        split: for Birdlets, whose species differ from split to split
        class_names: in the data set's order
        seed: of WaffleCLIP's descriptors

    Raises:
        ValueError: an unknown source, or a class without sentences
    """
    match source:
        case "clip":
            return {name: [TEMPLATE.format(name)] for name in class_names}
        case "clip-e":
            return {name: [template.format(name) for template in _TEMPLATES[dataset]] for name in class_names}
        case "waffle":
            return waffle(class_names, seed=seed)
        case "cupl":
            found = _descriptors("cupl", dataset, split)
            return {name: found[name] for name in class_names}
        case "clip-d" | "lazsl" | "dnd":
            found = _descriptors("clip-d", dataset, split)
            form = {
                "clip-d": "{name}, which has {descriptor}.",
                "lazsl": "a photo of a {name}, which has {descriptor}.",
                "dnd": "a photo of a bird with {descriptor}.",
            }[source]
            return {name: [form.format(name=name, descriptor=d) for d in found[name]] for name in class_names}
    raise ValueError(f"no prompt source {source!r}; there are {', '.join(SOURCES)}")
