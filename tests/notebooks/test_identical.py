"""A notebook run twice on one machine, each time into an empty bank, gives the same results to the last byte."""

import papermill
import pytest

from upclose import paths

SMALL = {"images": 40, "crops": 4, "sweep_images": 8}


def execute(folder, monkeypatch):
    """What a run of `00_start_here` leaves in its folder besides the notebook: file -> bytes."""
    folder.mkdir()
    (folder / "run").mkdir()
    monkeypatch.setenv("UPCLOSE_RUN", str(folder / "run"))
    monkeypatch.setenv("UPCLOSE_BANK", str(folder / "bank"))
    papermill.execute_notebook(
        str(paths.NOTEBOOKS / "00_start_here.ipynb"),
        str(folder / "notebook.ipynb"),
        parameters=SMALL,
        kernel_name="python3",
        progress_bar=False,
        cwd=str(paths.NOTEBOOKS),
    )
    files = [p for p in (folder / "run").rglob("*") if p.is_file()]
    return {p.relative_to(folder / "run").as_posix(): p.read_bytes() for p in files}


@pytest.mark.slow
def test_two_runs_give_identical_results(tmp_path, monkeypatch):
    one, two = (execute(tmp_path / name, monkeypatch) for name in ("one", "two"))
    assert {"metrics.csv", "claims.csv", "facts.json", "figures/accuracy.png"} <= set(one)
    assert one == two
