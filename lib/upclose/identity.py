"""What makes a run the run that it is: hashes of its code, notebook, sentences, weights and data."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from upclose import datasets, encode, programs, prompts, shipped
from upclose.datasets import registry
from upclose.params import Job, notebook_cells


def ingredients(job: Job, here: bool = True) -> tuple[dict[str, str], list[str]]:
    """The hashes that name a run, and a sentence for each thing that is missing.

    Only what the run uses: the modules that its notebook imports, sentences that are published of its data set, and
    every split that its notebook names and this machine has.

    Args:
        job: its values
        here: it would run on this machine, which must have the device then
    """
    values, missing = {"dataset": "birdlets"} | job.values, []  # a notebook that takes none is about Birdlets
    cells = tuple(
        "".join(cell["source"])
        for cell in notebook_cells(job.notebook)
        if cell["cell_type"] == "code" and "parameters" not in cell.get("metadata", {}).get("tags", [])
    )
    hashes = {"notebook": _hash(list(map(_bare, cells))), "code": _code(cells)}

    @contextmanager
    def noted() -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:
            missing.append(str(error))

    with noted():
        hashes["prompts"] = prompts.identity(_named(values["dataset"], values.get("split", "test")))
    weights = {name: values.get("pretrained", "") for name in values.get("backbones") or [values.get("backbone")]}
    weights |= dict.fromkeys([values.get("second_backbone"), *values.get("encoders", [])], "")  # they have no tag
    for name, pretrained in weights.items():
        if name:
            with noted():
                hashes[f"weights {name}"] = _weights(name, pretrained)
    data = {"data": (values.get("dataset"), values.get("split", "test"), values.get("protocol") or None)}
    data["training data"] = (values.get("train_dataset"), "train", None)
    for what, (dataset, split, protocol) in data.items():
        if dataset:
            with noted():
                hashes[what] = _data(dataset, split, protocol)
            for other in sorted(_splits(cells) - {split}):
                if dataset.startswith("imagefolder:") and not Path(dataset.partition(":")[2], other).is_dir():
                    continue  # without folders of splits, all are the same pictures
                with suppress(ValueError, OSError):  # what is not there is not read
                    hashes[f"{what} ({other})"] = _data(dataset, other, protocol)
    for what in ("description_file", "sentence_file"):
        if values.get(what):
            with noted():
                hashes[what] = _sentences(values[what])
    if here and "device" in values:
        with noted():
            _arithmetic(values["device"], values.get("precision", "fp32"))
    return hashes, missing


def _hash(plain: object) -> str:
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def _bare(cell: str) -> str:
    try:
        return programs.bare(cell)
    except SyntaxError:  # one of IPython's own commands
        return cell


def _python(cells: tuple[str, ...]) -> Iterator[str]:
    """The cells that are Python, without IPython's own commands."""
    for cell in cells:
        for text in (cell, re.sub(r"^(\s*)[%!].*$", r"\1pass", cell, flags=re.MULTILINE)):
            with suppress(SyntaxError):
                ast.parse(text)
                yield text
                break


@cache
def _code(cells: tuple[str, ...]) -> str:
    modules = programs.used("\n".join(_python(cells)))
    return _hash({name: programs.digest(file) for name, file in modules.items()})


@cache
def _splits(cells: tuple[str, ...]) -> frozenset[str]:
    """The splits that a notebook names."""
    nodes = (node for cell in _python(cells) for node in ast.walk(ast.parse(cell)))
    return frozenset(node.value for node in nodes if isinstance(node, ast.Constant)) & frozenset(registry.SPLITS)


@cache
def _weights(backbone: str, pretrained: str) -> str:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*has random weights")
        try:
            return encode.identity(backbone, pretrained or None)
        except UserWarning as warning:
            raise ValueError(str(warning)) from None


@cache
def _named(dataset: str, split: str) -> str:
    """The name under which sentences are published: of a collection of shards, that of the data set that it is."""
    if dataset.startswith("webdataset:"):
        with suppress(ValueError, OSError):  # what is missing is said where the data are asked for
            return datasets.load(dataset, split).name
    return dataset


@cache
def _data(dataset: str, split: str, protocol: str | None) -> str:
    data = datasets.load(dataset, split, protocol=protocol)
    if dataset == "birdlets":  # its fingerprint holds the programs that draw, remarks and all; "code" holds them too
        return _hash([data.class_names, data.key, data.label.tolist()])
    return data.fingerprint


@cache
def _sentences(file: str) -> str:
    prompts.read(file)
    return shipped.sha256(Path(file))


@cache
def _arithmetic(device: str, precision: str) -> None:
    encode.load("birdlets-tiny", None, device, precision)
