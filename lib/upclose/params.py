"""Parameter files: one YAML a table or notebook, checked whole before anything is computed."""

from __future__ import annotations

import ast
import difflib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model

from upclose import paths
from upclose.birdlets import DOMAINS
from upclose.datasets import registry
from upclose.methods import fair
from upclose.prompts import SOURCES

MOST_CELLS = 10_000  # of a grid
Count = Annotated[int, Field(ge=1, le=10**9)]
Crops = Annotated[int, Field(ge=1, le=10_000)]
Share = Annotated[float, Field(ge=1e-4, le=1)]
Positive = Annotated[float, Field(gt=0, le=1e12)]
NotNegative = Annotated[float, Field(ge=0, le=1e12)]
Factor = Annotated[float, Field(ge=1, le=100)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


def _some(kind: Any) -> Any:
    return Annotated[list[kind], Field(min_length=1)]


def _text(known: Callable[[str], bool], what: str) -> Any:
    """Text of which `known` is true; `what` there is stands in the error."""

    def check(value: str) -> str:
        if not known(value):
            raise ValueError(f"there are {what}")
        return value

    return Annotated[str, AfterValidator(check)]


def _adapting(methods: list[str]) -> list[str]:
    if not set(methods) & set(fair.ROWS):
        raise ValueError(f"one of them must be a row of FAIR: {', '.join(fair.ROWS)}")
    return methods


def _different(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("the same seed twice is the same draw, not another one")
    return seeds


Seeds = Annotated[list[Seed], Field(min_length=1), AfterValidator(_different)]


def _registered(name: str) -> str:
    if name == "imagefolder:":
        raise ValueError("it names no folder: imagefolder:PATH")
    if name not in ("", "birdlets") and not name.startswith("imagefolder:"):
        registry.entry(name)
    return name


Domains = _text(
    lambda value: value == "all" or set(value.split("+")) <= set(DOMAINS), f"{', '.join(DOMAINS)}, joined by +, or all"
)
Device = _text(re.compile(r"cpu|mps|(cuda|xpu)(:\d+)?").fullmatch, "cpu, cuda, cuda:1 (and so on), mps and xpu")
DataSet = Annotated[str, AfterValidator(_registered)]


# What a parameter may be, by name, for all notebooks. Names that end in "s" and hold a list sweep the singular.
FIELDS: dict[str, Any] = {
    "dataset": Annotated[DataSet, Field(min_length=1)],
    "split": Literal["train", "validation", "test"],
    "domain": Domains,
    "domains": _some(Literal[DOMAINS]),
    "backbone": str,
    "backbones": _some(str),
    "pretrained": str,
    "device": Device,
    "precision": Literal["fp32", "bf16", "fp16"],
    "images": Count,
    "crops": Crops,
    "alpha": Share,
    "beta": Share,
    "crop_seeds": Seeds,
    "tau": Factor,
    "taus": _some(Factor),
    "second_backbone": str,
    "setting": str,
    "source": Literal[SOURCES],
    "description_file": str,
    "sentence_file": str,
    "validation_images": Count,
    "repeats": Count,
    "probe_steps": Count,
    "largest_crops": Crops,
    "largest_descriptions": Count,
    "cost_images": Count,
    "clip_images": Count,
    "theta": Annotated[float, Field(ge=0, le=1)],
    "thetas": _some(Annotated[float, Field(ge=0, le=1)]),
    "epsilon": Positive,
    "epsilons": _some(Positive),
    "alphas": _some(Share),
    "counts": _some(Count),
    "exact_images": Count,
    "sweep_images": Count,
    "protocol": str,
    "descriptions": Count,
    "crop_counts": _some(Crops),
    "lower_scales": _some(Share),
    "shots": _some(Count),
    "cache_alphas": _some(Positive),
    "cache_betas": _some(NotNegative),
    "capacity": Count,
    "classes": Count,
    "top_k": Count,
    "top_ks": _some(Count),
    "epochs": Count,
    "batch_size": Count,
    "learning_rate": Positive,
    "learning_rates": _some(Positive),
    "samples": Count,
    "box_alpha": Annotated[float, Field(ge=0, le=1)],
    "box_alphas": _some(Annotated[float, Field(ge=0, le=1)]),
    "sample_counts": _some(Count),
    "shares": _some(Share),
    "kept": _some(Count),
    "train_dataset": DataSet,
    "seed": Seed,
    "seeds": Seeds,
}

# Where a notebook takes less than that, or only it knows: the rows that it computes, the tables that they stand in, the
# settings that change what is computed (elsewhere a setting is a label), the data that it is about.
CHOICES: dict[str, dict[str, Any]] = {
    "00_start_here": {"dataset": Literal["birdlets"]},
    "01_lgca": {
        "methods": _some(
            Literal[
                "CLIP",
                "CLIP-E",
                "CLIP-D",
                "WaffleCLIP",
                "CuPL",
                "WCA",
                "LGCA",
                "LGCA (schedule)",
                "WCA (released)",
                "WCA (as many encodings)",
                "multi-crop",
                "multi-crop (as many encodings)",
                "multi-crop (the ladder)",
            ]
        ),
        "table": Literal["Table 1"],
        "crops": Annotated[int, Field(ge=4, le=10_000)],
    },
    "02_lazsl": {
        "methods": _some(
            Literal[
                "CLIP",
                "CLIP-D",
                "WaffleCLIP",
                "CuPL",
                "CLIP-D (LaZSL's sentence)",
                "multi-crop",
                "WCA",
                "WCA (released)",
                "LaZSL (mean)",
                "Baseline",
                "Baseline+OT",
                "Baseline+OT+VS",
                "Baseline+OT+Hybrid",
                "LaZSL",
            ]
        ),
        "table": Literal["Table 1", "Table 2", "Table 3", "Figure 5"],
    },
    "03_dnd": {
        "methods": _some(
            Literal[
                "CLIP",
                "CLIP+D",
                "CLIP+R (descriptions alone)",
                "D&D (descriptions alone)",
                "CLIP+D+R (averaging)",
                "D&D",
                "zero-shot",
                "Tip-Adapter",
                "Tip-Adapter-F",
                "linear probe",
                "Tip+D&D",
                "whole-image keys",
                "D&D + Tip-Adapter",
                "whole images",
            ]
        ),
        "table": Literal["", "Table 3", "Table 4", "Table 5"],
        "setting": Literal["all", "ablation", "few-shot", "test-time"],
    },
    "04_fair": {
        "methods": Annotated[
            list[Literal["CLIP", "CuPL", "multi-crop", "WCA (N=16)", "linear probe", *fair.ROWS]],
            AfterValidator(_adapting),
        ],
        "table": Literal["Birdlets", *(f"Table {k}" for k in (1, 2, 3, 4, 5, 7, 8, 9, 10)), "Figure 10"],
        "setting": Literal[
            "inductive",
            "transductive",
            "unsupervised adaptation",
            "ablation",
            "neither factor",
            "S_i only",
            "S_i and |S_i - S_j|",
            "pseudo-labelers",
            "other VLM",
            "complexity",
            "fine-tuning",
            "sweep",
        ],
        "precision": Literal["fp32", "bf16"],
    },
    "05_lare": {
        "methods": _some(
            Literal["zero-shot", "linear probe", "repeated", "Gaussian noise", "mixup", "LADS", "LARE"],
        ),
        "table": Literal["", "Table 1", "Table 2"],
        "dataset": Literal["birdlets", "cub-painting", "domainnet-40", "cifar100"],
    },
    "ablations/fair": {"dataset": Literal["birdlets"], "domain": Literal[DOMAINS]},
    "ablations/lare": {
        "methods": _some(Literal["linear probe", "repeated", "Gaussian noise", "LARE"]),
        "table": Literal["", "Figure 4", "Table 3", "Table 4", "Table 5"],
        "dataset": Literal["birdlets", "cifar100"],
    },
    "ablations/lgca": {"dataset": Literal["birdlets"]},
    "complexity/lgca_theorem": {"dataset": Literal["birdlets"]},
}
# (a, b, why): no value of a may be above any of b.
ORDERED = (
    ("alpha", "beta", "crops are drawn from U(alpha, beta)"),
    ("alphas", "beta", "crops are drawn from U(alpha, beta)"),
    ("lower_scales", "beta", "crops are drawn from U(lower scale, beta)"),
    ("top_k", "crops", "k of the N crops count"),
    ("top_ks", "crops", "k of the N crops count"),
    ("top_k", "crop_counts", "k of the N crops count"),
)


class ParameterError(ValueError):
    """Something in a parameter file or on the command line is not right; the message is one sentence."""


class Case(BaseModel):
    """Values that hold for some cells of the grid only."""

    model_config = ConfigDict(extra="forbid")
    when: dict[str, Any] = Field(min_length=1)
    set: dict[str, Any] = Field(min_length=1)


class Sheet(BaseModel):
    """A parameter file: `notebook` and either fixed `parameters`, a `grid` of lists, or both.

    `reproduces` says which published table the file fills; `exceptions` change values where `when` matches.
    """

    model_config = ConfigDict(extra="forbid")
    notebook: str
    reproduces: str = ""
    parameters: dict[str, Any] = {}
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    exceptions: list[Case] = []


class Job(NamedTuple):
    """One notebook with one set of values: a cell of the grid.

    Attributes:
        name: readable, from the file's name and the grid's values
        notebook: the path of the notebook
        values: every parameter of the notebook, defaults included
    """

    name: str
    notebook: Path
    values: dict[str, Any]


class _Loader(yaml.SafeLoader):
    """YAML as 1.2 reads numbers (1e-4 is one, 1:30 and 0x1F are text), without aliases, a key once in a mapping."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.constructor.ConstructorError(
                None, None, f"the alias *{event.anchor} is not taken", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key, value in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} stands twice in one mapping", value.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    start: [(tag, pattern) for tag, pattern in known if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")]
    for start, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9]\d*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _load(text: str) -> Any:
    return yaml.load(text, _Loader)


def _nearest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"


def _name(notebook: Path) -> str:
    return notebook.relative_to(paths.NOTEBOOKS).with_suffix("").as_posix()


def notebook_path(name: str) -> Path:
    """The notebook of a name such as "01_lgca" or "ablations/lgca"."""
    path = paths.NOTEBOOKS / f"{name.removesuffix('.ipynb')}.ipynb"
    if not path.resolve().is_relative_to(paths.NOTEBOOKS.resolve()):
        raise ParameterError(
            f"notebook {name!r} is not in {paths.NOTEBOOKS}: a sheet runs notebooks of this repository only"
        )
    if not path.is_file():
        known = map(_name, paths.NOTEBOOKS.rglob("*.ipynb"))
        raise ParameterError(f"no notebook {name!r}; {_nearest(name, (k for k in known if 'checkpoint' not in k))}")
    return path


def notebook_cells(notebook: Path) -> list[dict[str, Any]]:
    """The cells of a notebook's file.

    Raises:
        ParameterError: it is cut short or no notebook
    """
    try:
        return json.loads(notebook.read_text())["cells"]
    except (ValueError, KeyError, TypeError) as error:
        raise ParameterError(f"{notebook} is cut short or no notebook ({error})") from None


def defaults(notebook: Path) -> dict[str, Any]:
    """The parameters of a notebook: the typed assignments of the cell that is tagged `parameters`."""
    tagged = [cell for cell in notebook_cells(notebook) if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise ParameterError(f"{notebook.name} has {len(tagged)} cells tagged 'parameters'; it needs exactly one")
    lines = ast.parse("".join(tagged[0]["source"])).body
    return {line.target.id: ast.literal_eval(line.value) for line in lines if isinstance(line, ast.AnnAssign)}


def _sentence(error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "missing":
        return f"{where}: {name!r} is missing{more}"
    said = first["msg"].removeprefix("Value error, ")
    return f"{where}: {name}={first['input']!r}: {said[0].lower()}{said[1:]}{more}"


def check(notebook: Path, values: dict[str, Any], where: str = "parameters") -> dict[str, Any]:
    """All parameters of a notebook, with these values put in.

    Args:
        notebook: whose parameters they are
        values: some or all of them
        where: they come from, for the message

    Raises:
        ParameterError: a name that the notebook does not have, a wrong type, a value out of range or not among the
            known ones, alpha above beta
    """
    known = defaults(notebook)
    kinds = FIELDS | CHOICES.get(_name(notebook), {})
    for name in values:
        if name not in known:
            raise ParameterError(f"{where}: {notebook.name} has no parameter {name!r}; {_nearest(name, known)}")
    for name in known:
        if name not in kinds:
            raise ParameterError(f"{notebook.name}: upclose.params does not say what {name!r} may be")
    model = create_model(
        "Parameters", __config__=ConfigDict(extra="forbid", strict=True), **{n: (kinds[n], ...) for n in known}
    )
    try:
        checked = model(**{**known, **values}).model_dump()
    except ValidationError as error:
        raise ParameterError(_sentence(error, where)) from None
    for low, high, why in ORDERED:
        if low in checked and high in checked and np.max(checked[low]) > np.min(checked[high]):
            raise ParameterError(f"{where}: {low}={checked[low]} is above {high}={checked[high]}; {why}")
    return checked


def read(file: Path) -> Sheet:
    """A parameter file.

    Raises:
        ParameterError: the file is missing, is not YAML, or has other keys than `Sheet`
    """
    file = Path(file)
    if not file.is_file():
        raise ParameterError(f"no parameter file {file}; {_files_near(file)}")
    try:
        content = _load(file.read_text())
    except RecursionError:
        raise ParameterError(f"{file} is nested too deeply") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = getattr(error, "problem", None) or "it is not text"
        line = f" in line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise ParameterError(f"{file} is not YAML: {problem}{line}") from None
    if not isinstance(content, dict):
        raise ParameterError(
            f"{file} holds a {type(content).__name__}; it must map 'notebook', 'parameters' and 'grid'"
        )
    try:
        return Sheet(**content)
    except (ValidationError, TypeError) as error:
        raise ParameterError(
            _sentence(error, str(file)) if isinstance(error, ValidationError) else f"{file}: {error}"
        ) from None


def _files_near(file: Path) -> str:
    if file.is_dir():
        inside = [p.relative_to(file).as_posix() for p in sorted(file.rglob("*.yaml"))]
        return f"it is a folder of {len(inside)}, such as {', '.join(inside[:3]) or 'none'}"
    known = [p.relative_to(paths.ROOT).as_posix() for p in paths.PARAMS.rglob("*.yaml")]
    close = difflib.get_close_matches(file.as_posix(), known, 3)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {len(known)} in {paths.PARAMS}"


def override(text: str) -> tuple[str, Any]:
    """A command line's "name=value", the value read as YAML."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ParameterError(f"-p {text!r} is not of the form name=value")
    try:
        return name.strip(), _load(value)
    except yaml.YAMLError as error:
        raise ParameterError(
            f"-p {text!r}: the value is not YAML ({getattr(error, 'problem', None) or 'a character that YAML has not'})"
        ) from None


def cells(sheet: Sheet, fixed: dict[str, Any] | None = None) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every cell of a grid, as the file says it; no notebook is needed.

    Args:
        sheet: a parameter file
        fixed: name -> value that hold for every cell; the grid does not sweep them

    Yields:
        what the grid sweeps, and all values that the file gives
    """
    fixed = fixed or {}
    grid = {name: values for name, values in sheet.grid.items() if name not in fixed}
    for cell in itertools.product(*grid.values()):
        swept = dict(zip(grid, cell))
        values = {**sheet.parameters, **swept}
        for case in sheet.exceptions:
            if all(values.get(name) == value for name, value in case.when.items()):
                values |= case.set
        yield swept, values | fixed


def jobs(file: Path, overrides: dict[str, Any] | None = None) -> list[Job]:
    """Every cell of a parameter file's grid, checked.

    Args:
        file: the YAML
        overrides: name -> value; a name that the grid sweeps is fixed to this one value

    Raises:
        ParameterError: see `read` and `check`; nothing has been computed then
    """
    sheet = read(file)
    notebook = notebook_path(sheet.notebook)
    size = math.prod(len(values) for name, values in sheet.grid.items() if name not in (overrides or {}))
    if size > MOST_CELLS:
        raise ParameterError(f"{file}: the grid has {size:,} cells, at most {MOST_CELLS:,} are taken: split the file")
    for case in sheet.exceptions:
        if unknown := set(case.when) - set(sheet.grid) - set(sheet.parameters):
            name = sorted(unknown)[0]
            raise ParameterError(f"{file}: an exception asks for {name!r}, which the file neither sets nor sweeps")
    return [
        Job("-".join(map(_slug, [Path(file).stem, *swept.values()])), notebook, check(notebook, values, str(file)))
        for swept, values in cells(sheet, overrides)
    ]


def _slug(value: Any) -> str:
    kept = "".join(c if c.isalnum() or c in "._" else "-" for c in str(value))
    return "-".join(filter(None, kept.split("-")))
