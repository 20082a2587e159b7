"""Paper versus ours: the published values, joined with what was measured."""

from __future__ import annotations

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
    ours = ours.drop_duplicates(KEYS, keep="last").astype({"ours": float, "ours_std": float, "n": float})
    frame = published(paper, table).merge(ours, on=KEYS, how="left")
    frame["difference"] = frame.ours - frame.value
    frame["tolerance"] = [
        tolerance(o, n, s, p) if o == o else np.nan
        for o, n, s, p in zip(frame.ours, frame.n, frame.ours_std, frame["std"])
    ]
    frame["status"] = [_status(line) for line in frame.itertuples()]
    return frame


def _status(line) -> str:
    if line.method.split(" ")[0] in CITED or "CODER" in line.method:
        return "cited, not run"
    if line.note:
        return "inconsistent in print"
    if line.ours != line.ours:
        return "not run here"
    return "reproduced" if abs(line.difference) <= line.tolerance else f"off by {line.difference:+.1f}"
