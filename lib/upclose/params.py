"""Parameter files: one YAML a table or notebook, checked whole before anything is computed."""

from __future__ import annotations

import ast
import difflib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from upclose import paths
from upclose.birdlets import DOMAINS

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0)]


def _some(kind: Any) -> Any:
    return Annotated[list[kind], Field(min_length=1)]


# What a parameter may be, by name, for all notebooks. Names that end in "s" and hold a list sweep the singular.
FIELDS: dict[str, Any] = {
    "dataset": str,
    "split": Literal["train", "validation", "test"],
    "domain": str,
    "domains": _some(Literal[DOMAINS]),
    "backbone": str,
    "backbones": _some(str),
    "pretrained": str,
    "device": str,
    "precision": Literal["fp32", "bf16", "fp16"],
    "images": Count,
    "crops": Count,
    "alpha": Share,
    "beta": Share,
    "crop_seeds": _some(Seed),
    "tau": Annotated[float, Field(ge=1)],
    "taus": _some(Annotated[float, Field(ge=1)]),
    "second_backbone": str,
    "table": str,
    "setting": str,
    "methods": _some(str),
    "source": str,
    "description_file": str,
    "sentence_file": str,
    "validation_images": Count,
    "repeats": Count,
    "largest_crops": Count,
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
    "crop_counts": _some(Count),
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
    "train_dataset": str,
    "seed": Seed,
    "seeds": _some(Seed),
}


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


def _nearest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"


def notebook_path(name: str) -> Path:
    """The notebook of a name such as "01_lgca" or "ablations/lgca"."""
    path = paths.NOTEBOOKS / f"{name.removesuffix('.ipynb')}.ipynb"
    if not path.is_file():
        known = [p.relative_to(paths.NOTEBOOKS).with_suffix("").as_posix() for p in paths.NOTEBOOKS.rglob("*.ipynb")]
        raise ParameterError(f"no notebook {name!r}; {_nearest(name, (k for k in known if 'checkpoint' not in k))}")
    return path


def defaults(notebook: Path) -> dict[str, Any]:
    """The parameters of a notebook: the typed assignments of the cell that is tagged `parameters`."""
    cells = json.loads(notebook.read_text())["cells"]
    tagged = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise ParameterError(f"{notebook.name} has {len(tagged)} cells tagged 'parameters'; it needs exactly one")
    lines = ast.parse("".join(tagged[0]["source"])).body
    return {line.target.id: ast.literal_eval(line.value) for line in lines if isinstance(line, ast.AnnAssign)}


def _sentence(error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {name}={first['input']!r}: {first['msg'].lower()}{more}"


def check(notebook: Path, values: dict[str, Any], where: str = "parameters") -> dict[str, Any]:
    """All parameters of a notebook, with these values put in.

    Args:
        notebook: whose parameters they are
        values: some or all of them
        where: they come from, for the message

    Raises:
        ParameterError: a name that the notebook does not have, a wrong type, a value out of range, alpha above beta
    """
    known = defaults(notebook)
    for name in values:
        if name not in known:
            raise ParameterError(f"{where}: {notebook.name} has no parameter {name!r}; {_nearest(name, known)}")
    for name in known:
        if name not in FIELDS:
            raise ParameterError(f"{notebook.name}: upclose.params.FIELDS does not say what {name!r} may be")
    model = create_model(
        "Parameters", __config__=ConfigDict(extra="forbid", strict=True), **{n: (FIELDS[n], ...) for n in known}
    )
    try:
        checked = model(**{**known, **values}).model_dump()
    except ValidationError as error:
        raise ParameterError(_sentence(error, where)) from None
    if checked.get("alpha", 0) > checked.get("beta", 1):
        raise ParameterError(
            f"{where}: alpha={checked['alpha']} is above beta={checked['beta']}; crops are drawn from U(alpha, beta)"
        )
    return checked


def read(file: Path) -> Sheet:
    """A parameter file.

    Raises:
        ParameterError: the file is missing, is not YAML, or has other keys than `Sheet`
    """
    file = Path(file)
    if not file.is_file():
        known = [p.relative_to(paths.ROOT).as_posix() for p in paths.PARAMS.rglob("*.yaml")]
        raise ParameterError(f"no parameter file {file}; {_nearest(file.as_posix(), known)}")
    try:
        content = yaml.safe_load(file.read_text())
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


def override(text: str) -> tuple[str, Any]:
    """A command line's "name=value", the value read as YAML."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ParameterError(f"-p {text!r} is not of the form name=value")
    return name.strip(), yaml.safe_load(value)


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
