"""The notebook's pen: what a notebook leaves in its run's folder, facts, metrics, claims, pairs and figures.

Outside a run nothing is written, and every function returns what it would return inside.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from upclose import paths
from upclose.claims import Claim, table
from upclose.metrics import COLUMNS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def facts(**known: Any) -> dict[str, Any]:
    """Facts for the run's `run.json`, added to those of earlier calls.

    Args:
        known: an encoder is reduced to its weights' hash, device and precision, a data set to its hash, the order of
            its classes and its split; everything else must be plain data

    Returns:
        The facts of this call, plain
    """
    plain = {}
    for name, value in known.items():
        if hasattr(value, "precision"):
            plain |= {"weights": value.fingerprint, "device": str(value.device), "precision": value.precision}
        elif hasattr(value, "class_names"):
            order = hashlib.sha256("\n".join(value.class_names).encode()).hexdigest()[:16]
            plain |= {f"{name}_fingerprint": value.fingerprint, "class_order": order, "split": value.split}
        else:
            plain[name] = value
    if (folder := paths.run_folder()) is not None:
        file = folder / "facts.json"
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(before | plain))
    return plain


def metrics(rows: Sequence[dict]) -> pd.DataFrame:
    """The run's `metrics.csv`.

    Args:
        rows: of `upclose.metrics.row`; what they say beyond its columns is left out

    Returns:
        The rows as a frame, with the run's name
    """
    return _table(pd.DataFrame(rows, columns=COLUMNS).assign(run=paths.run_name()), "metrics", float_format="%.4f")


def claims(tested: Sequence[Claim], unit: str = "crop set") -> pd.DataFrame:
    """The run's `claims.csv`, which is `upclose.claims.table` of the claims.

    Args:
        tested: all claims of the notebook
        unit: what each image was measured several times over, in the singular

    Returns:
        The table
    """
    return _table(table(tested, unit), "claims")


def pairs(frame: pd.DataFrame) -> pd.DataFrame:
    """The run's `pairs.csv`, from which `upclose compare` makes the matrix of every method against every other.

    Args:
        frame: from `upclose.claims.pairs`, with the columns dataset, backbone and setting

    Returns:
        The same frame
    """
    return _table(frame, "pairs")


def _table(frame: pd.DataFrame, name: str, **options: Any) -> pd.DataFrame:
    if (folder := paths.run_folder()) is not None:
        frame.map(paths.cell).to_csv(folder / f"{name}.csv", index=False, **options)
    return frame


def figure(drawn: Figure, name: str) -> None:
    """The run's `figures/name.png`."""
    if (folder := paths.run_folder()) is not None:
        (folder / "figures").mkdir(exist_ok=True)
        drawn.savefig(folder / "figures" / f"{name}.png", metadata={"Software": None})
