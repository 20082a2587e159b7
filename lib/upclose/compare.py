"""Paper versus ours: the published values, joined with what was measured."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from upclose import shipped

PUBLISHED = shipped.PACKAGE / "published"
KEYS = ["paper", "table", "method", "dataset", "backbone", "setting", "metric"]
ROW = [key for key in KEYS if key != "dataset"]
UNNAMED = "RN50"  # the backbone of a row that names none


def read(file: Path) -> pd.DataFrame:
    """A table in which an empty cell is an empty string, but in the columns of numbers."""
    frame = pd.read_csv(file, keep_default_na=False)
    for column in {"value", "std", "n"} & set(frame):
        frame[column] = pd.to_numeric(frame[column], errors="coerce")
    return frame


@cache
def papers() -> dict[str, str]:
    """The papers whose tables are here -> the names of their files."""
    found = {}
    for file in sorted(PUBLISHED.glob("*.csv")):
        if file.read_text(encoding="utf-8").startswith(",".join(KEYS)):
            found[read(file).paper[0]] = file.stem
    return found


@cache
def cited() -> frozenset[str]:
    """The rivals that the papers' tables print and that are not run here."""
    return frozenset(shipped.checked(PUBLISHED / "cited.txt").read_text(encoding="utf-8").split())


def published(paper: str | None = None, table: str | None = None) -> pd.DataFrame:
    """The numbers that a paper prints.

    Args:
        paper: one of `papers`; None for all
        table: "Table 1", ...; None for all

    Raises:
        ValueError: no such paper or table
    """
    files = [shipped.checked(PUBLISHED / f"{name}.csv") for name in papers().values()]
    frame = pd.concat([read(file) for file in files])
    for column, wanted in (("paper", paper), ("table", table)):
        if wanted is not None:
            if wanted not in set(frame[column]):
                raise ValueError(f"no published {column} {wanted!r}; there are {', '.join(sorted(set(frame[column])))}")
            frame = frame[frame[column] == wanted]
    return frame.reset_index(drop=True)


def sampling_variance(value: float, n: float) -> float:
    """The variance, in points squared, of an accuracy of `value` per cent over n images; 0 where n is not known."""
    return value * (100 - value) / n if n > 0 else 0.0


def tolerance(variance: float, std: float, published_std: float) -> float:
    """By how many points two honest measurements may differ: 1.96 standard errors, of the images and of the crop sets.

    Args:
        variance: see `sampling_variance`
        std: of our crop sets, NaN for a single one
        published_std: NaN where none is printed
    """
    return 1.96 * float(np.sqrt(variance + np.nan_to_num(std) ** 2 + np.nan_to_num(published_std) ** 2))


def averages(printed: pd.DataFrame, ours: pd.DataFrame) -> pd.DataFrame:
    """The average column of a table, from our cells.

    Args:
        printed: rows of `published`. A row's average is over the data sets that it prints; where it prints the average
            alone, its title says over how many ("Average of 6")
        ours: KEYS, ours, ours_std, n and variance, one line a cell

    Returns:
        A line for every printed average of which at least one cell was measured: KEYS, and
        ours: the plain mean over the data sets, NaN unless all of them were measured
        ours_std, variance: of that mean, the cells being independent
        n: images in all
        gap: "3 of 6 data sets" where some are missing, else ""
    """
    cells = dict(list(ours.groupby(ROW)))
    parts = {row: set(lines.dataset) for row, lines in printed[printed.dataset != "average"].groupby(ROW)}
    out = []
    for line in printed[printed.dataset == "average"].to_dict("records"):
        row = tuple(line[key] for key in ROW)
        found = cells.get(row, ours[:0])
        found = found[found.dataset.isin(parts.get(row, found.dataset))]
        wanted = len(parts[row]) if row in parts else int(re.search(r"\d+", line["title"])[0])
        if found.empty:
            continue
        whole = len(found) == wanted
        facts = {
            "ours": found.ours.mean() if whole else np.nan,
            "ours_std": np.sqrt((found.ours_std**2).sum(min_count=1)) / wanted if whole else np.nan,
            "n": found.n.sum() if whole else np.nan,
            "variance": found.variance.sum() / wanted**2,
            "gap": "" if whole else f"{len(found)} of {wanted} data sets",
        }
        out.append({key: line[key] for key in KEYS} | facts)
    return pd.DataFrame(out, columns=[*KEYS, "ours", "ours_std", "n", "variance", "gap"])


def versus(measured: pd.DataFrame, paper: str, table: str | None = None) -> pd.DataFrame:
    """Every published value of a table with ours beside it.

    Args:
        measured: rows of `metrics.csv`; of two rows for one cell the last counts
        paper: see `published`
        table: see `published`

    Returns:
        The published rows with columns ours, ours_std, n, difference, tolerance and status: "reproduced",
        "off by +1.2", "not run here", "incomplete: 3 of 6 data sets" (an average), "cited, not run" or
        "inconsistent in print".
    """
    printed = published(paper, table)
    ours = measured.rename(columns={"value": "ours", "std": "ours_std"})[[*KEYS, "ours", "ours_std", "n"]]
    ours = ours[ours.dataset != "average"]  # it is computed here, from cells that can be looked at
    unnamed = ours[ours.backbone == UNNAMED].assign(backbone="")
    ours = (
        pd.concat([ours, unnamed])
        .drop_duplicates(KEYS, keep="last")
        .astype({"ours": float, "ours_std": float, "n": float})
    )
    ours["variance"] = [sampling_variance(value, n) for value, n in zip(ours.ours, ours.n)]
    ours = pd.concat([ours.assign(gap=""), averages(printed, ours)])
    frame = printed.merge(ours, on=KEYS, how="left").fillna({"gap": ""})
    frame["difference"] = frame.ours - frame.value
    frame["tolerance"] = [
        tolerance(v, s, p) if o == o else np.nan
        for o, v, s, p in zip(frame.ours, frame.variance, frame.ours_std, frame["std"])
    ]
    frame["status"] = [_status(line) for line in frame.itertuples()]
    return frame.drop(columns=["variance", "gap"])


def variants(measured: pd.DataFrame, swept: Iterable[str], paper: str, table: str) -> pd.DataFrame:
    """`versus`, once for every value of what several runs of one published cell differ in.

    A paper that does not say with which value it measured leaves several answers to each of its cells.

    Args:
        measured: rows of `metrics.csv`, with a column for each of `swept`
        swept: parameters of which rows may have several values
        paper: see `published`
        table: "Table 1", ...; a figure that prints no numbers gives `unprinted`

    Returns:
        the rows, and in "variant" the values of those of `swept` that tell equal cells apart, as "tau 1.1"
    """
    differ = [name for name in swept if (measured.groupby(KEYS)[name].nunique() > 1).any()]
    printed, parts = table in set(published(paper).table), []
    for values, rows in measured.groupby(differ) if differ else [((), measured)]:
        variant = ", ".join(f"{name} {value}" for name, value in zip(differ, values))
        parts.append((versus(rows, paper, table) if printed else unprinted(rows, paper)).assign(variant=variant))
    return pd.concat(parts, ignore_index=True)


def kinds(status: pd.Series) -> pd.Series:
    """Each status without its number or what it lacks: "off by" and "incomplete" stand for all of theirs."""
    return status.str.extract("^(off by|incomplete)", expand=False).fillna(status)


def unprinted(measured: pd.DataFrame, paper: str) -> pd.DataFrame:
    """The measured rows that meet no cell of the paper's tables: other data sets, controls, averages.

    Args:
        measured: rows of `metrics.csv`; of two rows for one cell the last counts
        paper: see `published`

    Returns:
        In the columns of `versus` that both have: KEYS, value (NaN), ours, ours_std, n, difference (NaN) and
        status "no published value"
    """
    printed = set(published(paper)[KEYS].itertuples(index=False, name=None))
    rows = measured.drop_duplicates(KEYS, keep="last")
    digest = rows.assign(backbone="")  # as a row that names none
    met = [
        not printed.isdisjoint(pair)
        for pair in zip(*(frame[KEYS].itertuples(index=False, name=None) for frame in (rows, digest)))
    ]
    rows = rows[~np.array(met, bool)].rename(columns={"value": "ours", "std": "ours_std"})
    rows = rows.assign(value=np.nan, difference=np.nan, status="no published value")
    return rows[[*KEYS, "value", "ours", "ours_std", "n", "difference", "status"]].reset_index(drop=True)


def _cited(method: str) -> bool:
    return not cited().isdisjoint(re.split(r"[ ()]+", method))


def _status(line) -> str:
    if _cited(line.method):
        return "cited, not run"
    if line.note:
        return "inconsistent in print"
    if line.gap:
        return f"incomplete: {line.gap}"
    if line.ours != line.ours:
        return "not run here"
    return "reproduced" if abs(line.difference) <= line.tolerance else f"off by {line.difference:+.1f}"


@cache
def backbones() -> pd.DataFrame:
    """The papers' backbones: as printed, open_clip's name and tag, D, GFLOPs a picture.

    Source:
        open_clip's docs/model_profile.csv, column image_gflops; a multiply-add is two operations.
    """
    return pd.read_csv(shipped.checked(PUBLISHED / "backbones.csv"))


def backbone_label(name: str, pretrained: str = "") -> str:
    """A backbone as the papers print it: ("ViT-B-32-quickgelu", "openai") -> "ViT-B/32"; others keep their name."""
    for line in backbones().itertuples():
        if (line.name, line.pretrained) == (name.replace("/", "-"), pretrained):
            return line.backbone
    return name


def account(covered: pd.DataFrame) -> pd.DataFrame:
    """What becomes of every published value, in one place.

    Args:
        covered: rows of paper, table, method, dataset and backbone that the parameter files run

    Returns:
        `published()` with the column account: "cited only" (a rival that is not run), "inconsistent" (the paper
        disagrees with itself), "runnable", or "" where no file fills it. An average is runnable when all of
        its row's data sets are; a row that names no backbone is filled by any.
    """
    frame = published()
    have = {tuple(row) for row in covered[KEYS[:5]].itertuples(index=False)}
    parts: dict[tuple, set[str]] = {}
    for p, t, m, d, b in frame[KEYS[:5]].itertuples(index=False, name=None):
        parts.setdefault((p, t, m, b), set()).update({d} - {"average"})
    have |= {
        (p, t, m, "average", b)
        for p, t, m, _, b in have
        if all((p, t, m, d, b) in have for d in parts.get((p, t, m, b), ()))
    }
    have |= {(p, t, m, d, "") for p, t, m, d, b in have}
    frame["account"] = [
        "cited only" if _cited(line.method) else "inconsistent" if line.note else "runnable" if key in have else ""
        for line, key in zip(frame.itertuples(), frame[KEYS[:5]].itertuples(index=False, name=None))
    ]
    return frame
