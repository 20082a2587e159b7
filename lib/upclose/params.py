"""Parameter files: one YAML a table or notebook, checked whole before anything is computed."""

from __future__ import annotations

import ast
import difflib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model

from upclose import methods, paths
from upclose.birdlets import DOMAINS
from upclose.datasets import registry
from upclose.prompts import SOURCES

MOST_CELLS = 10_000  # of a grid
Count = Annotated[int, Field(ge=1, le=10**9)]
Crops = Annotated[int, Field(ge=1, le=10_000)]
Share = Annotated[float, Field(ge=1e-4, le=1)]
Weight = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=1e12)]
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


def _different(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("the same seed twice is the same draw, not another one")
    return seeds


Seeds = Annotated[list[Seed], Field(min_length=1), AfterValidator(_different)]


def _registered(name: str) -> str:
    kind, _, place = name.partition(":")
    if registry.is_own(name) and not place:
        raise ValueError(f"it names no place: {kind}:{registry.OWN[kind]}")
    if name not in ("", "birdlets") and not registry.is_own(name):
        registry.entry(name)
    return name


Domains = _text(
    lambda value: value == "all" or set(value.split("+")) <= set(DOMAINS), f"{', '.join(DOMAINS)}, joined by +, or all"
)
Device = _text(re.compile(r"cpu|mps|(cuda|xpu)(:\d+)?").fullmatch, "cpu, cuda, cuda:1 (and so on), mps and xpu")
DataSet = Annotated[str, AfterValidator(_registered)]


# Names that mean one thing in every notebook and take less than their type says. A list called "taus" sweeps "tau".
LIMITS: dict[str, Any] = {
    "dataset": Annotated[DataSet, Field(min_length=1)],
    "train_dataset": DataSet,
    "split": Literal["train", "validation", "test"],
    "domain": Domains,
    "domains": _some(Literal[DOMAINS]),
    "device": Device,
    "precision": Literal["fp32", "bf16", "fp16"],
    "source": Literal[SOURCES],
    "crops": Crops,
    "crop_counts": _some(Crops),
    "largest_crops": Crops,
    "alpha": Share,
    "beta": Share,
    "lower_scales": _some(Share),
    "shares": _some(Share),
    "tau": Factor,
    "theta": Weight,
    "box_alpha": Weight,
    "epsilon": Positive,
    "learning_rate": Positive,
    "seed": Seed,
    "seeds": Seeds,
    "crop_seeds": Seeds,
    "large_seeds": Seeds,
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


Grid = dict[str, Annotated[list[Any], Field(min_length=1)]]


class Case(BaseModel):
    """Values that hold for some cells of the grid only."""

    model_config = ConfigDict(extra="forbid")
    when: dict[str, Any] = Field(min_length=1)
    set: dict[str, Any] = Field(min_length=1)


class Taken(BaseModel):
    """What a notebook takes for a parameter, where that is less than its name and its type say.

    `among` lists the values, or those of a list's elements; `rows_of` adds the rows of a registered method, of which a
    list must have one; `least` bounds a number.
    """

    model_config = ConfigDict(extra="forbid")
    among: list[Any] = []
    rows_of: str = ""
    least: float | None = None


class About(BaseModel):
    """A notebook's own facts, in its sheet `params/birdlets/<notebook>.yaml`.

    `paper` as `compare.papers` calls it; `splits` whose pictures it encodes all; `source` of the sentences that it
    reads where neither a method nor a parameter says; `takes` what its parameters may be.
    """

    model_config = ConfigDict(extra="forbid")
    paper: str = ""
    splits: list[Literal["train", "validation", "test"]] = ["test"]
    source: str = ""
    takes: dict[str, Taken] = {}


class Sheet(BaseModel):
    """A parameter file: `notebook` and either fixed `parameters`, a `grid` of lists, or both.

    `reproduces` says which published table the file fills. `defaults` names the file `defaults/<name>.yaml` beside this
    one: its parameters and its grid hold where this one says nothing. `cells` are grids that are run one after the
    other, each together with `grid`; `exceptions` change values where `when` matches. A text may quote other
    parameters: "alpha {alpha}". `about` is the notebook's own.
    """

    model_config = ConfigDict(extra="forbid")
    notebook: str
    reproduces: str = ""
    defaults: str = ""
    about: About = About()
    parameters: dict[str, Any] = {}
    grid: Grid = {}
    cells: list[Grid] = []
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
    """The notebook of a name.

    Args:
        name: such as "01_lgca" or "ablations/lgca", with or without its ending

    Raises:
        ParameterError: there is none, or it lies outside the repository's notebooks
    """
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


class Parameter(NamedTuple):
    """A line of a notebook's parameters cell: its type as it is written, and its value."""

    kind: str
    default: Any


def parameters(notebook: Path) -> dict[str, Parameter]:
    """The typed assignments of the cell that is tagged `parameters`.

    Raises:
        ParameterError: the notebook has not exactly one such cell
    """
    return _parameters(notebook, notebook.stat().st_mtime_ns)


@cache
def _parameters(notebook: Path, changed: int) -> dict[str, Parameter]:
    tagged = [cell for cell in notebook_cells(notebook) if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise ParameterError(f"{notebook.name} has {len(tagged)} cells tagged 'parameters'; it needs exactly one")
    lines = ast.parse("".join(tagged[0]["source"])).body
    return {
        line.target.id: Parameter(ast.unparse(line.annotation), ast.literal_eval(line.value))
        for line in lines
        if isinstance(line, ast.AnnAssign)
    }


def defaults(notebook: Path) -> dict[str, Any]:
    """The values of a notebook's parameters as it stands.

    Args:
        notebook: its file

    Returns:
        {name: value}

    Raises:
        ParameterError: it has no readable parameters cell
    """
    return {name: parameter.default for name, parameter in parameters(notebook).items()}


def about(notebook: str) -> About:
    """What a notebook's sheet in `params/birdlets` says of it; nothing where there is none."""
    file = paths.PARAMS / "birdlets" / f"{notebook}.yaml"
    return _about(file, file.stat().st_mtime_ns) if file.is_file() else About()


@cache
def _about(file: Path, changed: int) -> About:
    return read(file).about


def _kind(name: str, parameter: Parameter, taken: Taken) -> Any:
    """What a parameter may be: what its notebook takes, else what its name means, else what its type says.

    Raises:
        ParameterError: a type that is not read
    """
    kind, default = parameter
    rows = methods.get(taken.rows_of).rows if taken.rows_of else ()
    among = (*taken.among, *rows)
    if name in LIMITS and not among:
        found = LIMITS[name]
    elif kind.startswith("list["):
        inner = Parameter(kind.removeprefix("list[").removesuffix("]"), min(default, default=0))
        found = _some(_kind(name.removesuffix("s"), inner, Taken(among=among)))
    elif among:
        found = Literal[among]
    elif kind == "int":
        found = Annotated[int, Field(ge=min(default, 1), le=10**9)]
    elif kind == "float":
        found = Annotated[float, Field(ge=min(default, 0), le=1e12)]
    elif kind in ("str", "bool"):
        found = {"str": str, "bool": bool}[kind]
    else:
        raise ParameterError(f"{name!r} is a {kind}; a parameter is an int, float, str, bool or a list of one of them")
    if taken.least is not None:
        found = Annotated[found, Field(ge=taken.least)]
    return Annotated[found, AfterValidator(_with_a_row_of(taken.rows_of, rows))] if rows else found


def _with_a_row_of(method: str, rows: tuple[str, ...]) -> Callable[[list[str]], list[str]]:
    def check(values: list[str]) -> list[str]:
        if not set(values) & set(rows):
            raise ValueError(f"one of them must be a row of {method}: {', '.join(rows)}")
        return values

    return check


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
    known = parameters(notebook)
    takes = about(_name(notebook)).takes
    for name in values:
        if name not in known:
            raise ParameterError(f"{where}: {notebook.name} has no parameter {name!r}; {_nearest(name, known)}")
    for name in takes:
        if name not in known:
            raise ParameterError(f"the sheet of {notebook.name} takes {name!r}, which is no parameter of it")
    model = create_model(
        "Parameters",
        __config__=ConfigDict(extra="forbid", strict=True),
        **{name: (_kind(name, parameter, takes.get(name, Taken())), ...) for name, parameter in known.items()},
    )
    try:
        checked = model(**{**{name: parameter.default for name, parameter in known.items()}, **values}).model_dump()
    except ValidationError as error:
        raise ParameterError(_sentence(error, where)) from None
    for low, high, why in ORDERED:
        if low in checked and high in checked and np.max(checked[low]) > np.min(checked[high]):
            raise ParameterError(f"{where}: {low}={checked[low]} is above {high}={checked[high]}; {why}")
    return checked


def read(file: Path) -> Sheet:
    """A parameter file, with its defaults.

    Raises:
        ParameterError: the file or that of its defaults is missing, is not YAML, or has other keys than `Sheet`
    """
    file = Path(file)
    content = _mapping(file)
    if name := content.get("defaults"):
        base = _mapping(file.parent / "defaults" / f"{Path(str(name)).name}.yaml")
        if "defaults" in base:
            raise ParameterError(f"{file}: the defaults {name!r} have defaults of their own, which are not read")
        content = _over(base, content)
    try:
        return Sheet(**content)
    except (ValidationError, TypeError) as error:
        raise ParameterError(
            _sentence(error, str(file)) if isinstance(error, ValidationError) else f"{file}: {error}"
        ) from None


def _over(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A sheet over its defaults; what it fixes their grid does not sweep."""
    both = {**base, **own}
    for key in {"parameters", "grid"} & set(base) & set(own):
        if isinstance(base[key], dict) and isinstance(own[key], dict):
            both[key] = {**base[key], **own[key]}
    fixed = set(own.get("parameters") or ()) - set(own.get("grid") or ())
    if "grid" in base and isinstance(both["grid"], dict):
        both["grid"] = {name: values for name, values in both["grid"].items() if name not in fixed}
    return both


def _mapping(file: Path) -> dict[str, Any]:
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
    return content


def _files_near(file: Path) -> str:
    if file.is_dir():
        inside = [p.relative_to(file).as_posix() for p in sorted(file.rglob("*.yaml"))]
        return f"it is a folder of {len(inside)}, such as {', '.join(inside[:3]) or 'none'}"
    known = [p.relative_to(paths.ROOT).as_posix() for p in paths.PARAMS.rglob("*.yaml")]
    close = difflib.get_close_matches(file.as_posix(), known, 3)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {len(known)} in {paths.PARAMS}"


def override(text: str) -> tuple[str, Any]:
    """A parameter of the command line.

    Args:
        text: "name=value", the value in YAML

    Returns:
        the name and the value

    Raises:
        ParameterError: it is not of that form

    Example:
        >>> override("images=30"), override("seeds=[0, 1]")
        (('images', 30), ('seeds', [0, 1]))
    """
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
    for part in _grids(sheet, fixed):
        for cell in itertools.product(*part.values()):
            swept = dict(zip(part, cell))
            values = {**sheet.parameters, **swept}
            for case in sheet.exceptions:
                if all(values.get(name) == value for name, value in case.when.items()):
                    values |= case.set
            yield swept, _quoted(values, values | fixed) | fixed


def _grids(sheet: Sheet, fixed: Iterable[str]) -> list[Grid]:
    """What is swept in each of the sheet's `cells`; one of `grid` alone where there are none."""
    return [
        {name: values for name, values in {**sheet.grid, **part}.items() if name not in fixed}
        for part in sheet.cells or [{}]
    ]


def _quoted(values: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """The values with "{name}" in their texts replaced by that parameter's value.

    Raises:
        ParameterError: the file has no such parameter
    """

    def said(match: re.Match) -> str:
        if (name := match[1]) not in known:
            raise ParameterError(f"{match.string!r} quotes {name!r}, which the file neither sets nor sweeps")
        return f"{known[name]:g}" if isinstance(known[name], float) else str(known[name])

    return {
        name: re.sub(r"\{(\w+)\}", said, value) if isinstance(value, str) else value for name, value in values.items()
    }


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
    size = sum(math.prod(map(len, part.values())) for part in _grids(sheet, overrides or {}))
    if size > MOST_CELLS:
        raise ParameterError(f"{file}: the grid has {size:,} cells, at most {MOST_CELLS:,} are taken: split the file")
    for case in sheet.exceptions:
        if unknown := set(case.when).difference(sheet.grid, sheet.parameters, *sheet.cells):
            name = sorted(unknown)[0]
            raise ParameterError(f"{file}: an exception asks for {name!r}, which the file neither sets nor sweeps")
    return [
        Job(_run_name([Path(file).stem, *swept.values()]), notebook, check(notebook, values, str(file)))
        for swept, values in cells(sheet, overrides)
    ]


def _run_name(parts: list[Any]) -> str:
    """A name for a folder: not hidden, and short enough for every file system with what is put around it."""
    name = "-".join(map(_slug, parts)).lstrip(".-") or "run"
    return name.encode()[:120].decode(errors="ignore")


def _slug(value: Any) -> str:
    kept = "".join(c if c.isalnum() or c in "._" else "-" for c in str(value))
    return "-".join(filter(None, kept.split("-")))
