import json
import os
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pandas as pd
import pytest

from upclose import cli, params, paths, run
from upclose.params import ParameterError

CELL = 'dataset: str = "birdlets"  # which\nimages: int = 20  # how many\nseed: int = 0  # of it\n'
BODY = """
import pandas as pd, torch
from upclose import metrics, run
metrics.save([metrics.row("CLIP <b>", torch.ones(images, dtype=bool), dataset=dataset, backbone="none")])
run.record(note="kept")
print(images)
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A folder with notebooks and a results root; gives a maker of plans."""
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setenv("UPCLOSE_RESULTS", str(tmp_path / "results"))

    def make(body=BODY, text="notebook: small\n"):
        cells = [nbformat.v4.new_code_cell(CELL, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(body)]
        kernel = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
        book = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
        nbformat.write(book, tmp_path / "notebooks" / "small.ipynb")
        file = tmp_path / "small.yaml"
        file.write_text(text)
        return file

    make.root = tmp_path / "results"
    return make


def test_a_run_writes_everything_and_is_not_run_again(lab):
    jobs = params.jobs(lab(), {"images": 3})
    (outcome,) = run.execute(run.plan(jobs))
    assert outcome.status == "done"
    folder = outcome.folder
    assert {p.name for p in folder.iterdir()} == {"notebook.ipynb", "params.yaml", "metrics.csv", "run.json"}
    facts = json.loads((folder / "run.json").read_text())
    assert facts["note"] == "kept"
    assert facts["seeds"] == {"seed": 0}
    assert facts["peak_memory_bytes"] > 2**20
    assert {"commit", "dirty", "packages", "hashes", "seconds"} <= set(facts)
    line = pd.read_csv(folder / "metrics.csv").iloc[0]
    assert (line.value, line.n, line.run) == (100.0, 3, folder.name)
    page = (folder.parent / "index.html").read_text()
    assert "CLIP &lt;b&gt;" in page
    assert "<b>" not in page.split("<table")[1]

    (again,) = run.execute(run.plan(jobs))
    assert (again.status, again.folder) == ("complete", folder)
    (other,) = run.plan(params.jobs(lab(), {"images": 4}))
    assert other.complete is None
    assert run.plan(params.jobs(lab(BODY + "1\n"), {"images": 3}))[0].complete is None  # other code
    assert run.plan(params.jobs(lab(), {"images": 3}), force=True)[0].complete is None


def test_a_notebook_that_fails_is_not_complete_and_others_go_on(lab, capsys):
    file = lab("if images == 1:\n    raise RuntimeError('no luck')\n", "notebook: small\ngrid: {images: [1, 2]}\n")
    assert cli.main(["run", str(file)]) == 1
    said = capsys.readouterr()
    assert "RuntimeError: no luck" in said.err
    finished = [p.parent.name for p in lab.root.glob("*/*/run.json")]
    assert len(finished) == 1
    assert finished[0].startswith("small-2-")
    assert run.plan(params.jobs(file))[0].complete is None


def test_a_kernel_that_dies_fails_its_run_only(lab):
    file = lab("import os\nif images == 1:\n    os._exit(9)\n", "notebook: small\ngrid: {images: [1, 2]}\n")
    first, second = run.execute(run.plan(params.jobs(file)))
    assert (first.status, second.status) == ("failed", "done")
    assert "Kernel died" in first.error
    assert not (first.folder / "run.json").exists()


def test_dry_run_computes_and_writes_nothing(lab, capsys):
    assert cli.main(["run", str(lab()), "--dry-run"]) == 0
    assert "would run" in capsys.readouterr().out
    assert not lab.root.exists()


def test_what_is_missing_is_said_before_any_work(lab):
    file = lab()
    with pytest.raises(ParameterError, match="no data set 'birdlet'"):
        run.execute(run.plan(params.jobs(file, {"dataset": "birdlet"})))
    assert not lab.root.exists()


def test_missing_training_data_are_said_too(monkeypatch, tmp_path):
    monkeypatch.setenv("UPCLOSE_DATA", str(tmp_path))
    (job, *_) = params.jobs(params.paths.PARAMS / "papers" / "lare-table1.yaml")
    (item,) = run.plan([job])
    assert "cub-painting (official) test is not at" in item.missing
    assert "cub (official) train is not at" in item.missing


@pytest.mark.parametrize("arguments", [["-p", "images=0"], ["-p", "imges=3"], ["-p", "images=x"]])
def test_bad_parameters_end_with_one_sentence(lab, capsys, arguments):
    assert cli.main(["run", str(lab()), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("upclose run: ")
    assert said.count("\n") == 1
    assert not lab.root.exists()


def test_an_unwritable_results_folder(lab, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["run", str(lab()), "--results", str(tmp_path / "file" / "results")]) == 2
    assert "cannot write results" in capsys.readouterr().err


def test_a_full_results_folder(lab, monkeypatch, capsys):
    usage = run.shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: usage)
    assert cli.main(["run", str(lab())]) == 2
    assert "MiB are free" in capsys.readouterr().err


def test_interrupted_runs_are_not_complete_and_the_next_call_goes_on(lab, tmp_path):
    body = "import time, pathlib\nif images == 2 and not pathlib.Path(r'%s').exists():\n    time.sleep(600)\n"
    file = lab(body % (tmp_path / "go"), "notebook: small\ngrid: {images: [1, 2]}\n")
    code = (
        "import sys, pathlib; from upclose import paths, cli; "
        f"paths.NOTEBOOKS = pathlib.Path(r'{tmp_path / 'notebooks'}'); sys.exit(cli.main(['run', r'{file}']))"
    )
    started = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.PIPE)
    deadline = time.time() + 120
    while not list(lab.root.glob("*/.partial-small-2*/params.yaml")) and time.time() < deadline:
        time.sleep(0.2)
    time.sleep(1)
    os.killpg(started.pid, signal.SIGINT)
    assert started.wait(60) != 0
    assert [p.parent.name[:7] for p in lab.root.glob("*/*/run.json")] == ["small-1"]
    (tmp_path / "go").write_text("")
    outcomes = run.execute(run.plan(params.jobs(file)))
    assert [outcome.status for outcome in outcomes] == ["complete", "done"]


def test_another_ensemble_or_word_list_is_another_run(tmp_path, monkeypatch):
    shutil.copytree(paths.PUBLISHED, tmp_path / "published")
    monkeypatch.setattr(paths, "PUBLISHED", tmp_path / "published")
    before = run._prompts.__wrapped__()
    assert run._prompts.__wrapped__() == before
    for name in ("templates.json", "words.txt"):
        with (tmp_path / "published" / name).open("a") as file:
            file.write(" ")
        assert run._prompts.__wrapped__() != before
        before = run._prompts.__wrapped__()
