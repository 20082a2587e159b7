"""Paper versus ours: the published values, joined with what was measured."""

from __future__ import annotations

import html
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from upclose import paths

PAPERS = {"LGCA": "lgca", "LaZSL": "lazsl", "D&D": "dnd", "FAIR": "fair", "LARE": "lare"}
KEYS = ["paper", "table", "method", "dataset", "backbone", "setting", "metric"]
CITED = (
    "UPL",
    "POUF",
    "LaFTer",
    "ReCLIP",
    "DPA",
    "TransCLIP-ZS",
    "CODER",
    "ProAPO",
    "CoOp",
    "CoCoOp",
    "TPT",
    "MaPLe",
    "ProGrad",
    "SaLS",
    "ArGue",
)


def published(paper: str | None = None, table: str | None = None) -> pd.DataFrame:
    """The numbers that a paper prints.

    Args:
        paper: "LGCA", "LaZSL", "D&D", "FAIR" or "LARE"; None for all
        table: "Table 1", ...; None for all

    Raises:
        ValueError: no such paper or table
    """
    files = [paths.PUBLISHED / f"{name}.csv" for name in PAPERS.values()]
    frame = pd.concat([pd.read_csv(file, keep_default_na=False) for file in files])
    for column in ("value", "std"):
        frame[column] = pd.to_numeric(frame[column], errors="coerce")
    for column, wanted in (("paper", paper), ("table", table)):
        if wanted is not None:
            if wanted not in set(frame[column]):
                raise ValueError(f"no published {column} {wanted!r}; there are {', '.join(sorted(set(frame[column])))}")
            frame = frame[frame[column] == wanted]
    return frame.reset_index(drop=True)


def tolerance(value: float, n: float, std: float, published_std: float) -> float:
    """By how many points two honest measurements may differ: 1.96 standard errors, of n images and of the crop sets."""
    sampling = value * (100 - value) / n if n > 0 else 0.0
    return 1.96 * float(np.sqrt(sampling + np.nan_to_num(std) ** 2 + np.nan_to_num(published_std) ** 2))


def versus(measured: pd.DataFrame, paper: str, table: str | None = None) -> pd.DataFrame:
    """Every published value of a table with ours beside it.

    Args:
        measured: rows of `metrics.csv`
        paper: see `published`
        table: see `published`

    Returns:
        The published rows with columns ours, ours_std, n, difference, tolerance and status: "reproduced",
        "off by +1.2", "not run here", "cited, not run" or "inconsistent in print".
    """
    ours = measured.rename(columns={"value": "ours", "std": "ours_std"})[[*KEYS, "ours", "ours_std", "n"]]
    unnamed = ours[(ours.paper == "D&D") & (ours.backbone == "RN50")].assign(backbone="")  # the digest names none
    ours = (
        pd.concat([ours, unnamed])
        .drop_duplicates(KEYS, keep="last")
        .astype({"ours": float, "ours_std": float, "n": float})
    )
    frame = published(paper, table).merge(ours, on=KEYS, how="left")
    frame["difference"] = frame.ours - frame.value
    frame["tolerance"] = [
        tolerance(o, n, s, p) if o == o else np.nan
        for o, n, s, p in zip(frame.ours, frame.n, frame.ours_std, frame["std"])
    ]
    frame["status"] = [_status(line) for line in frame.itertuples()]
    return frame


def _cited(method: str) -> bool:
    return method.split(" ")[0] in CITED or "CODER" in method


def _status(line) -> str:
    if _cited(line.method):
        return "cited, not run"
    if line.note:
        return "inconsistent in print"
    if line.ours != line.ours:
        return "not run here"
    return "reproduced" if abs(line.difference) <= line.tolerance else f"off by {line.difference:+.1f}"


@cache
def backbones() -> pd.DataFrame:
    """The papers' backbones: as printed, open_clip's name and tag, the hub's repository, D, GFLOPs a picture."""
    return pd.read_csv(paths.PUBLISHED / "backbones.csv")


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
        its row's data sets are; D&D's digest names no backbone, so any counts.
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
    have |= {(p, t, m, d, "") for p, t, m, d, b in have if p == "D&D"}
    frame["account"] = [
        "cited only" if _cited(line.method) else "inconsistent" if line.note else "runnable" if key in have else ""
        for line, key in zip(frame.itertuples(), frame[KEYS[:5]].itertuples(index=False, name=None))
    ]
    return frame


def write(measured: pd.DataFrame, folder: Path) -> list[Path]:
    """One table a paper, as `<paper>.csv` and `<paper>.html` (everything escaped).

    Args:
        measured: rows of `metrics.csv`
        folder: is made if need be
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for paper, name in PAPERS.items():
        table = versus(measured, paper).drop(columns=["paper"])
        written += [folder / f"{name}.csv", folder / f"{name}.html"]
        table.to_csv(written[-2], index=False)
        page = table.to_html(index=False, na_rep="", float_format="{:.2f}".format, escape=True)
        title = f"<title>{html.escape(paper)}: paper versus ours</title>"
        written[-1].write_text(f'<!doctype html>\n<meta charset="utf-8">{title}\n{page}\n', encoding="utf-8")
    return written
