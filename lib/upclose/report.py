"""What complete runs have measured: the page of a day, `results/<date>/index.html`, and the papers' tables."""

from __future__ import annotations

import hashlib
import html
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import pandas as pd
import yaml
from PIL import Image

from upclose import claims, compare, images, paths

T = TypeVar("T")
_ROW = ("variant", "method", "dataset", "backbone", "setting", "metric")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 3rem 0 .3rem; border-top: 1px solid #ccc; padding-top: 1rem }
p, figcaption { color: #555; font-size: .85rem; margin: .3rem 0 }
.table { overflow-x: auto; margin: .6rem 0 } .metrics .table { overflow-y: auto; max-height: 20rem }
table { border-collapse: collapse; font-size: .85rem }
th { position: sticky; top: 0; background: #fff }
th, td { padding: .15rem .9rem .15rem 0; text-align: left; border-bottom: 1px solid #eee; vertical-align: top }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.holds { color: #0072b2; font-weight: 600 } .fails { color: #b34700; font-weight: 600 } .undecided { color: #777 }
.equal { color: #1a7f5a; font-weight: 600 }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(34rem, 1fr)); gap: 1rem;
  align-items: start; grid-auto-flow: dense }
figure { margin: 0 } figure.whole { grid-column: 1 / -1 } img { width: 100%; border: 1px solid #eee }
"""


def verdicts(folder: Path) -> dict[str, int | str]:
    """How many of a run's claims have each verdict; "" where it makes none."""
    if not (file := folder / "claims.csv").exists():
        return dict.fromkeys(claims.VERDICTS, "")
    found = pd.read_csv(file, keep_default_na=False)["verdict"]
    return {verdict: int((found == verdict).sum()) for verdict in claims.VERDICTS}


def _cell(tag: str, text: str, name: str) -> str:
    return f'<{tag} class="{name}">{text}</{tag}>' if name else f"<{tag}>{text}</{tag}>"


def table(frame: pd.DataFrame, links: bool = False) -> str:
    """A table, escaped; numbers to the right, verdicts in colour; with `links` the first column goes to the runs."""
    number = {c: bool(pd.to_numeric(frame[c].replace("", None), errors="coerce").notna().any()) for c in frame}
    rows = ["".join(_cell("th", html.escape(c), "n" * number[c]) for c in frame)]
    for values in frame.astype(str).itertuples(index=False, name=None):
        cells = [
            _cell("td", html.escape(v), "n" if number[c] else v if v in claims.VERDICTS else "")
            for c, v in zip(frame, values)
        ]
        if links:
            cells[0] = f'<td><a href="#{html.escape(values[0])}">{html.escape(values[0])}</a></td>'
        rows.append("".join(cells))
    return '<div class="table"><table>' + "".join(f"<tr>{row}</tr>\n" for row in rows) + "</table></div>"


def _metrics(file: Path) -> str:
    """A run's `metrics.csv`; what is the same in every row is said once, above."""
    frame = pd.read_csv(file, keep_default_na=False, dtype=str).drop(columns="run")
    same = {c: frame[c].iloc[0] for c in frame if frame[c].nunique() == 1 and c != "value"}
    said = ", ".join(f"{c} {v}" for c, v in same.items() if v)
    for column in {"value", "std"} & set(frame):
        frame[column] = [f"{float(v):.1f}" if v else "" for v in frame[column]]
    rest = table(frame.drop(columns=list(same)))
    return f'<div class="metrics"><p>{len(frame)} measurements: {html.escape(said)}</p>{rest}</div>'


def _figures(folder: Path) -> str:
    """A run's figures, two beside each other, those that are wide in a row of their own."""
    cells = []
    for file in sorted((folder / "figures").glob("*.png")):
        caption = html.escape(file.stem.replace("_", " "))
        link = f"{quote(folder.name)}/figures/{quote(file.name)}"
        picture = f'<a href="{link}"><img src="{link}" alt="{caption}" loading="lazy"></a>'
        with Image.open(file, formats=images.FORMATS) as image:
            whole = ' class="whole"' if image.width > 2.5 * image.height else ""
        cells.append(f"<figure{whole}>{picture}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="figures">{"".join(cells)}</div>' if cells else ""


def _run(folder: Path, facts: dict) -> str:
    name, here = html.escape(folder.name), quote(folder.name)
    source = Path(os.path.relpath(paths.NOTEBOOKS / facts["notebook"], folder.parent)).as_posix()
    parts = [
        f'<h2 id="{name}">{name}</h2>',
        f'<p><a href="{quote(source)}">{html.escape(facts["notebook"])}</a> at commit '
        f"{html.escape(facts['commit'][:10] or 'none')}{' with changes' if facts['dirty'] else ''}, "
        f"{facts['seconds']:.0f} s, {facts['peak_memory_bytes'] / 2**30:.1f} GiB at most. "
        f'<a href="{here}/params.yaml">parameters</a>, <a href="{here}/run.json">run.json</a>; the notebook as it was '
        f"run is kept beside them as notebook.ipynb and is not committed.</p>",
    ]
    if (claims := folder / "claims.csv").exists():
        parts.append(table(pd.read_csv(claims, keep_default_na=False, dtype=str)))
    if (metrics := folder / "metrics.csv").exists():
        parts.append(_metrics(metrics))
    return "\n".join([*parts, _figures(folder)])


def _runs(day: Path) -> list[Path]:
    return sorted(file.parent for file in day.glob("[!.]*/run.json"))


def _encoder(run: Path) -> str:
    """Its backbone, if its parameters name one."""
    file = run / "params.yaml"
    values = yaml.safe_load(file.read_text()) if file.exists() else None
    return (values or {}).get("backbone", "")


def _stamp(day: Path) -> str:
    """What a page of these runs carries, so that an older one is known."""
    facts = [file.read_bytes() for run in _runs(day) if (file := run / "run.json").is_file()]
    return hashlib.sha256(b"".join(facts)).hexdigest()[:16]


def write(day: Path) -> Path:
    """Write the page of a day's folder, which has at least one complete run, and return its path."""
    rows, bodies = [], []
    blank = dict.fromkeys(["run", "notebook", "encoder", "status", "seconds", *claims.VERDICTS], "")
    for run in _runs(day):
        try:
            if why := paths.damage(run):
                raise ValueError(why)
            facts = json.loads((run / "run.json").read_text())
            body = _run(run, facts)
            known = {
                "notebook": facts["notebook"].removesuffix(".ipynb"),
                "encoder": _encoder(run),
                "status": "complete",
                "seconds": f"{facts['seconds']:.0f}",
                **verdicts(run),
            }
        except Exception as error:  # one damaged run hides no other
            known, body = (
                {"status": f"damaged: {error}"},
                f'<h2 id="{html.escape(run.name)}">{html.escape(run.name)}</h2>',
            )
        rows.append(blank | {"run": run.name} | known)
        bodies.append(body)
    rows += [blank | {"run": paths.name_of(left), "status": "not complete"} for left in sorted(day.glob(".partial-*"))]
    said = (
        "<p>A claim holds when the 95 % interval of a paired bootstrap lies above its margin, fails when below, is "
        "equal when the whole interval lies within a point of the margin, else it is undecided.</p>"
    )
    body = "\n".join([said, table(pd.DataFrame(rows), links=True), *bodies])
    head = f'<meta name="runs" content="{_stamp(day)}">'
    paths.write(day / "index.html", page(f"runs of {day.name}", body, head))
    return day / "index.html"


def page(title: str, body: str, head: str = "") -> bytes:
    """A page of its own: the title is escaped, `body` and `head` are HTML."""
    said = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>upclose, {said}</title>'
        f'<meta name="viewport" content="width=device-width">{head}<style>{_STYLE}</style>'
        f"<h1>CLIP, up close: {said}</h1>\n{body}</html>\n"
    ).encode()


def refresh(root: Path) -> None:
    """Write the page of every day below a results folder that has complete runs and no page of just these."""
    for day in sorted({file.parents[1] for file in root.glob("*/[!.]*/run.json")}):
        page = day / "index.html"
        try:
            if not page.exists() or f'name="runs" content="{_stamp(day)}"'.encode() not in page.read_bytes():
                write(day)
        except OSError as error:
            warnings.warn(f"the page {page} cannot be written: {error}", stacklevel=2)


def collect(root: Path) -> pd.DataFrame:
    """The rows of `metrics.csv` of every complete run below a results folder, the oldest first: see `compare.versus`.

    Raises:
        FileNotFoundError: there is none
    """
    if not (tables := _collect(root, "metrics.csv", read)):
        raise FileNotFoundError(f"no complete run with metrics in {root}: start one with upclose run params/...yaml")
    return pd.concat(tables, ignore_index=True)


def matrix(root: Path) -> pd.DataFrame:
    """Every method against every other, from the `pairs.csv` of every complete run below a results folder.

    Of two runs with the same data set, backbone and setting the newer counts.

    Returns:
        As `claims.matrix`, and "same sign": on how many backbones the difference has one sign
    """
    tables = _collect(root, "pairs.csv", _tested)
    frame = pd.concat(tables, ignore_index=True) if tables else claims.pairs({}, **dict.fromkeys(_FACTS, ""))
    pair = frame[["method", "rival"]]
    one = frame[[*_FACTS]].assign(first=pair.min(axis=1), second=pair.max(axis=1))  # "A, B" and "B, A" are one test
    found = frame[~one.duplicated(keep="last")].reset_index(drop=True)
    return found.assign(**{"same sign": claims.same_sign(found)}) if len(found) else found


_FACTS = ("dataset", "backbone", "setting")


def _tested(file: Path) -> pd.DataFrame:
    """A run's `pairs.csv`, tested.

    Raises:
        ValueError: a column is missing, or a line is no paired test
    """
    frame = pd.read_csv(file, keep_default_na=False, dtype=str)
    if lost := {*_FACTS, "method", "rival", "gaps"} - set(frame):
        raise ValueError(f"{file.name} has no column {sorted(lost)[0]!r}")
    return claims.matrix(frame)


def _collect(root: Path, name: str, read: Callable[[Path], T]) -> list[T]:
    """A file of every complete run that has it, the oldest first; one that is damaged is left out with a warning."""
    runs = sorted(root.glob("*/[!.]*/run.json"), key=lambda file: (file.parts[-3], file.stat().st_mtime))
    found = []
    for run in (file.parent for file in runs):
        try:
            if why := paths.damage(run):
                raise ValueError(why)
            if (file := run / name).exists():
                found.append(read(file))
        except (OSError, ValueError) as error:  # one damaged run hides no other
            warnings.warn(f"{run} is left out: {error}", stacklevel=3)
    return found


def read(file: Path) -> pd.DataFrame:
    """A run's `metrics.csv`.

    Raises:
        ValueError: a column is missing, or a value is no number
    """
    frame = compare.read(file)
    if lost := {*compare.KEYS, "value", "std", "n", "run"} - set(frame):
        raise ValueError(f"{file.name} has no column {sorted(lost)[0]!r}")
    if frame.value.isna().any():
        raise ValueError(f"{file.name} has a value that is no number")
    return frame


def tables(measured: pd.DataFrame, folder: Path) -> list[Path]:
    """Write paper versus ours, one table a paper, as `<paper>.csv` and `<paper>.html` (everything escaped).

    Args:
        measured: rows of `metrics.csv`
        folder: is made if need be

    Returns:
        The files
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for paper, name in compare.papers().items():
        beside = compare.versus(measured, paper).drop(columns=["paper"])
        written += [folder / f"{name}.csv", folder / f"{name}.html"]
        paths.write(written[-2], beside.map(paths.cell).to_csv(index=False).encode())
        body = beside.to_html(index=False, na_rep="", float_format="{:.2f}".format, escape=True)
        title = f"<title>{html.escape(paper)}: paper versus ours</title>"
        paths.write(written[-1], f'<!doctype html>\n<meta charset="utf-8">{title}\n{body}\n'.encode())
    return written


def matrices(tested: pd.DataFrame, folder: Path) -> list[Path]:
    """Write every method against every other, as `methods.csv` (a line a pair) and `methods.html` (squares).

    Args:
        tested: from `matrix`
        folder: is made if need be

    Returns:
        The files; none where nothing was tested
    """
    if tested.empty:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "methods.csv", folder / "methods.html"]
    paths.write(written[0], tested.map(paths.cell).to_csv(index=False, float_format="%.4f").encode())
    squares = []
    for facts, lines in tested.groupby([*_FACTS], sort=False):
        gaps = claims.square(lines).map(lambda gap: f"{gap:+.1f}" if gap == gap else "")
        stands = claims.square(lines, "p after Holm") < 0.05
        square = (gaps + stands.replace({True: "*", False: ""})).to_html(escape=True)
        squares.append(f"<h2>{html.escape(', '.join(filter(None, facts)))}: {int(lines.n.iloc[0])} images</h2>{square}")
    said = (
        "<p>Row minus column in points, paired. A star: the difference stands at 5 % after Holm's correction over its "
        "table.</p>"
    )
    paths.write(written[1], page("method against method", "\n".join([said, *squares])))
    return written


def pareto(root: Path) -> list[Path]:
    """Copy accuracy against cost, as the newest complete run that drew it below a results folder did, to `pareto.png`.

    Returns:
        The file; none where no run drew it
    """
    if not (drawn := _collect(root, "figures/pareto.png", Path.read_bytes)):
        return []
    paths.write(root / "pareto.png", drawn[-1])
    return [root / "pareto.png"]


def shown(frame: pd.DataFrame) -> pd.DataFrame:
    """Of a table of `reproduced` what tells the rows apart, the numbers, rounded, and the verdict."""
    row = [name for name in _ROW if name in ("method", "dataset") or frame[name].nunique() > 1]
    numbers = [name for name in ("published", "ours", "difference", "tolerance") if name in frame]
    said = frame[numbers].map(lambda x: "" if x != x else f"{x:.2f}")
    return pd.concat([frame[row], said, frame[["verdict"]]], axis=1)


def reproduced(
    folder: Path, name: str, parts: Mapping[str, pd.DataFrame], runs: Mapping[Path, str], notes: Iterable[str]
) -> Path:
    """Write `<name>.csv` and `<name>.html`: some published tables with ours beside, and the runs below.

    Args:
        folder: is made if need be
        name: of the files
        parts: {title: rows of `compare.variants`, with "published" and "verdict" for value and status}
        runs: {folder: what became of it}
        notes: sentences that stand above

    Returns:
        the page
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths.write(folder / f"{name}.csv", pd.concat(parts, names=["part", "row"]).map(paths.cell).to_csv().encode())
    body = [f"<p>{html.escape(note)}</p>" for note in notes]
    for title, frame in parts.items():
        count = ", ".join(f"{n} {kind}" for kind, n in compare.kinds(frame.verdict).value_counts().items())
        body += [f"<h2>{html.escape(title)}</h2>", f"<p>{len(frame)} values: {html.escape(count)}.</p>"]
        body.append(table(shown(frame)))
    for run, said in runs.items():
        where = quote(Path(os.path.relpath(run, folder)).as_posix())
        body.append(f'<p><a href="{where}">{html.escape(run.name)}</a>: {html.escape(said)}</p>')
    paths.write(folder / f"{name}.html", page(f"{name}, reproduced", "\n".join(body)))
    return folder / f"{name}.html"
