"""Every published value has a run that fills it, or a reason in one place."""

import hashlib
import json
from pathlib import Path

import pytest

from upclose import compare, doctor, params, paths
from upclose.datasets import registry

SHEETS = doctor.sheets()
TABLES = {"lgca": 1, "lazsl": 4, "dnd": 3, "fair": 10, "lare": 4}


def test_one_file_a_table():
    found = [name.partition("-")[0] for name in SHEETS]
    assert {paper: found.count(paper) for paper in TABLES} == TABLES


@pytest.mark.parametrize("name", SHEETS)
def test_cells_name_data_sets_protocols_and_backbones_that_exist(name):
    sheet = SHEETS[name]
    cells = [values for _, values in params.cells(sheet)]
    assert cells
    for values in cells:
        entry = registry.entry(values["dataset"], values.get("protocol"))
        assert entry.test
        if sheet.notebook == "04_fair":
            assert entry.train
        label = compare.backbone_label(values["backbone"], values["pretrained"])
        assert label != values["backbone"], "not a backbone of the papers"
        assert values.get("alpha", 0) <= values.get("beta", 1)
        assert values.get("top_k", 0) <= values.get("crops", 99)
        if paper := params.about(sheet.notebook).paper:
            assert sheet.reproduces == f"{paper} {values['table']}"
    head = (paths.PARAMS / "papers" / f"{name}.yaml").read_text()
    assert head.startswith(f"# upclose run params/papers/{name}.yaml -p device=cuda\n")
    assert "Not run here." in head


@pytest.mark.parametrize("name", SHEETS)
def test_notebooks_take_these_parameters(name):
    if not (paths.NOTEBOOKS / f"{SHEETS[name].notebook}.ipynb").is_file():
        pytest.skip(f"notebook {SHEETS[name].notebook} is not there yet")
    jobs = params.jobs(paths.PARAMS / "papers" / f"{name}.yaml")
    assert len(jobs) == len(list(params.cells(SHEETS[name])))


def test_the_values_of_all_runs_are_those_that_were_written_out_once():
    """`resolved_papers.json` was made when every sheet still held all of its values."""
    found = {}
    for name, sheet in SHEETS.items():
        runs = sorted(json.dumps(values, sort_keys=True) for _, values in params.cells(sheet))
        digest = hashlib.sha256(json.dumps([sheet.notebook, sheet.reproduces, runs]).encode()).hexdigest()
        found[name] = {"notebook": sheet.notebook, "runs": len(runs), "sha256": digest}
    assert found == json.loads(Path(__file__).with_name("resolved_papers.json").read_text())


def test_the_papers_exceptions():
    alpha = {v["dataset"]: v["alpha"] for _, v in params.cells(SHEETS["lgca-table1"])}
    assert alpha == {"oxford-pets": 0.5, "cub": 0.5, "dtd": 0.5, "food101": 0.5, "places365": 0.7}
    rate = {v["dataset"]: v["learning_rate"] for _, v in params.cells(SHEETS["fair-table1"])}
    assert {name for name, value in rate.items() if value == 1e-6} == {"food101", "sun397"}
    assert set(rate.values()) == {1e-4, 1e-6}
    samples = {v["dataset"]: v["samples"] for _, v in params.cells(SHEETS["lare-table1"])}
    assert samples == {"cub-painting": 5, "domainnet-40": 40}
    assert {v["samples"] for _, v in params.cells(SHEETS["lare-table2"])} == {3}
    lare = [v for name, sheet in SHEETS.items() if name.startswith("lare") for _, v in params.cells(sheet)]
    assert {v["batch_size"] for v in lare} == {512}


def test_the_head_to_head_is_of_no_paper_and_asks_only_for_sentences_that_were_published():
    assert {*SHEETS} - {*doctor.published()} == {"head-to-head"}
    found = doctor.needs("06_head_to_head", [values for _, values in params.cells(SHEETS["head-to-head"])])
    words = [need for need in found if need.kind == "prompts"]
    assert len({need.name for need in found if need.kind == "data"}) == 9
    assert len(words) > 15
    assert not any(need.get.startswith("not published") for need in words)


def test_every_published_value_is_accounted_for():
    frame = compare.account(doctor.covered())
    counts = frame.account.value_counts().to_dict()
    print(f"published values: {len(frame)} = " + " + ".join(f"{n} {what}" for what, n in sorted(counts.items())))
    left = frame[frame.account == ""]
    assert left.empty, left[compare.KEYS].to_string()
    assert set(counts) == {"runnable", "cited only", "inconsistent"}
    assert sum(counts.values()) == len(frame) == len(compare.published())


def test_a_value_without_a_run_would_be_noticed():
    lost = doctor.covered().query("not (paper == 'LGCA' and dataset == 'cub')")
    frame = compare.account(lost)
    assert len(frame[(frame.account == "") & (frame.dataset == "cub")]) == 14
