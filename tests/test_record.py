import json
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from upclose import claims, metrics, record


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a run that is not complete yet."""
    there = tmp_path / ".partial-start-abc.1234"
    there.mkdir()
    monkeypatch.setenv("UPCLOSE_RUN", str(there))
    return there


@pytest.fixture
def drawn():
    figure, _ = plt.subplots()
    yield figure
    plt.close(figure)


ROW = metrics.row("CLIP", torch.tensor([True, False, False, True]), dataset="birdlets", backbone="birdlets-tiny")
CLAIM = claims.check("C1", "a beats b", torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool))


def test_metrics_carry_the_name_of_the_run(folder):
    frame = record.metrics([ROW | {"part": "more than the columns"}])
    assert list(frame.columns) == metrics.COLUMNS
    assert (frame.value[0], frame.n[0], frame.run[0]) == (50.0, 4, "start-abc")
    header, line = (folder / "metrics.csv").read_text().splitlines()
    assert header == ",".join(metrics.COLUMNS)
    assert line == ",,CLIP,birdlets,birdlets-tiny,zero-shot,top1,50.0000,,4,start-abc"


def test_no_rows_are_a_table_with_its_columns(folder):
    assert record.metrics([]).empty
    assert (folder / "metrics.csv").read_text() == ",".join(metrics.COLUMNS) + "\n"


def test_no_cell_is_a_formula_or_commands_a_terminal(folder):
    names = {"method": "=cmd|'/c calc'!A1", "setting": "-2+3+A1", "dataset": "\x1b[31mred\x07", "table": "-0.5 [+1, 2]"}
    record.metrics([ROW | names])
    line = pd.read_csv(folder / "metrics.csv").iloc[0]
    assert (line.method, line.setting) == ("'=cmd|'/c calc'!A1", "'-2+3+A1")
    assert (line.dataset, line.table) == ("red", "-0.5 [+1, 2]")


def test_claims_are_their_table(folder):
    frame = record.claims([CLAIM], unit="seed")
    pd.testing.assert_frame_equal(frame, claims.table([CLAIM], "seed"))
    assert pd.read_csv(folder / "claims.csv", dtype=frame.dtypes.to_dict()).equals(frame)


def test_facts_are_added_and_reduced_to_what_can_be_written(folder):
    encoder = SimpleNamespace(fingerprint="f00", device=torch.device("cpu"), precision="fp32")
    data = SimpleNamespace(fingerprint="da7a", class_names=["a", "b"], split="test")
    record.facts(note="first", dataset=data)
    record.facts(note="last", encoder=encoder)
    known = json.loads((folder / "facts.json").read_text())
    order = known.pop("class_order")
    assert order == record.facts(dataset=data)["class_order"]
    assert known == {
        "note": "last",
        "dataset_fingerprint": "da7a",
        "split": "test",
        "weights": "f00",
        "device": "cpu",
        "precision": "fp32",
    }
    data.class_names = ["b", "a"]
    assert record.facts(dataset=data)["class_order"] != order


def test_the_same_figure_is_the_same_file(folder, drawn):
    record.figure(drawn, "one")
    first = (folder / "figures" / "one.png").read_bytes()
    assert plt.imread(folder / "figures" / "one.png").ndim == 3
    record.figure(drawn, "one")
    assert (folder / "figures" / "one.png").read_bytes() == first  # no date, no version in it


def test_outside_a_run_nothing_is_written(tmp_path, monkeypatch, drawn):
    monkeypatch.delenv("UPCLOSE_RUN", raising=False)
    monkeypatch.chdir(tmp_path)
    assert record.metrics([ROW]).run[0] == ""
    assert record.facts(note="said") == {"note": "said"}
    record.claims([CLAIM])
    record.figure(drawn, "two")
    assert not list(tmp_path.iterdir())
