import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import psutil
import pytest
import torch
from papermill.parameterize import parameterize_path
from safetensors.torch import save_file

from upclose import claims, cli, devices, identity, params, paths, report, run
from upclose.params import ParameterError

CELL = 'dataset: str = "birdlets"  # which\nimages: int = 20  # how many\nseed: int = 0  # of it\n'
BODY = """
import pandas as pd, torch
from upclose import metrics, record
record.metrics([metrics.row("CLIP <b>", torch.ones(images, dtype=bool), dataset=dataset, backbone="none")])
record.facts(note="kept")
print(images)
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A folder with notebooks and a results root; gives a maker of sheets."""
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setenv("UPCLOSE_RESULTS", str(tmp_path / "results"))

    def make(body=BODY, text="notebook: small\n", cell=CELL):
        cells = [nbformat.v4.new_code_cell(cell, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(body)]
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
    (outcome,) = run.execute(run.prepare(jobs))
    assert outcome.status == "done"
    folder = outcome.folder
    assert {p.name for p in folder.iterdir()} == {"notebook.ipynb", "params.yaml", "metrics.csv", "run.json"}
    facts = json.loads((folder / "run.json").read_text())
    assert facts["note"] == "kept"
    assert facts["seeds"] == {"seed": 0}
    assert {"commit", "dirty", "packages", "hashes", "seconds"} <= set(facts)
    line = pd.read_csv(folder / "metrics.csv").iloc[0]
    assert (line.value, line.n, line.run) == (100.0, 3, folder.name)
    page = (folder.parent / "index.html").read_text()
    assert "CLIP &lt;b&gt;" in page
    assert "<b>" not in page.split("<table")[1]

    (again,) = run.execute(run.prepare(jobs))
    assert (again.status, again.folder) == ("complete", folder)
    sweep = lab(text="notebook: small\ngrid: {images: [3, 4]}\n")  # which has another name
    assert [item.complete for item in run.prepare(params.jobs(sweep))] == [folder, None]
    (other,) = run.prepare(params.jobs(lab(), {"images": 4}))
    assert other.complete is None
    assert run.prepare(params.jobs(lab(BODY + "1\n"), {"images": 3}))[0].complete is None  # other code
    assert run.prepare(params.jobs(lab(), {"images": 3}), force=True)[0].complete is None


def test_a_notebook_that_fails_is_not_complete_and_others_go_on(lab, capsys):
    file = lab("if images == 1:\n    raise RuntimeError('no luck')\n", "notebook: small\ngrid: {images: [1, 2]}\n")
    assert cli.main(["run", str(file)]) == 1
    said = capsys.readouterr()
    assert "RuntimeError: no luck" in said.err
    finished = [p.parent.name for p in lab.root.glob("*/*/run.json")]
    assert len(finished) == 1
    assert finished[0].startswith("small-2-")
    assert run.prepare(params.jobs(file))[0].complete is None


def test_a_kernel_that_dies_fails_its_run_only(lab):
    file = lab("import os\nif images == 1:\n    os._exit(9)\n", "notebook: small\ngrid: {images: [1, 2]}\n")
    first, second = run.execute(run.prepare(params.jobs(file)))
    assert (first.status, second.status) == ("failed", "done")
    assert "Kernel died" in first.error
    assert not (first.folder / "run.json").exists()


def test_whatever_a_run_meets_is_its_own_failure(lab):
    body = (
        "import os, shutil, signal, upclose\nballast = bytearray(b'x') * (300 * 2**20)\n"
        "if images == 1:\n    os.kill(os.getppid(), signal.SIGKILL)\n"  # as the system does when memory is short
        "if images == 2:\n    shutil.rmtree(os.environ['UPCLOSE_RUN'])\n"  # then nothing can be written any more
    )
    file = lab(body, "notebook: small\ngrid: {images: [1, 2, 3]}\n")
    items = run.prepare(params.jobs(file))
    killed, cut, fine = run.execute(items)
    assert [killed.status, cut.status, fine.status] == ["failed", "failed", "done"]
    assert "killed" in killed.error
    assert "FileNotFoundError" in cut.error
    assert [outcome.job.name for outcome in (killed, cut, fine)] == ["small-1", "small-2", "small-3"]
    peak = json.loads((fine.folder / "run.json").read_text())["peak_memory_bytes"]
    assert (
        300 * 2**20 < peak < 600 * 2**20
    )  # of the kernel: the process that starts it has imported torch, which is more
    assert items[2].run in (fine.folder.parent / "index.html").read_text()


def test_equal_names_are_told_apart_and_the_same_run_is_planned_once(lab, tmp_path):
    one = lab(text="notebook: small\nparameters: {images: 1}\n")
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / one.name
    other.write_text("notebook: small\nparameters: {images: 2}\n")
    items = run.prepare([job for file in (one, other, one) for job in params.jobs(file)])
    assert [(item.job.name, item.job.values["images"]) for item in items] == [("small", 1), ("small", 2)]
    for k, item in enumerate(items):  # both complete, at different dates
        folder = lab.root / f"2026-01-0{k + 1}" / item.run
        folder.mkdir(parents=True)
        facts = {"notebook": "small.ipynb", "commit": "", "dirty": False, "seconds": 1, "peak_memory_bytes": 1}
        (folder / "run.json").write_text(json.dumps(facts))
    outcomes = run.execute(run.prepare([item.job for item in items]))
    assert [outcome.folder.parent.name for outcome in outcomes] == ["2026-01-01", "2026-01-02"]
    assert all((outcome.folder.parent / "index.html").is_file() for outcome in outcomes)  # pages that were lacking


def test_the_summary_counts_verdicts(tmp_path):
    (tmp_path / "claims.csv").write_text("claim,text,verdict\nC1,a,holds\nC2,b,fails\nC3,c,holds\n")
    job = params.Job("small", tmp_path, {})
    (line,) = run.summary([run.Outcome(job, "done", tmp_path, 3.0)]).to_dict("records")
    assert [line[verdict] for verdict in claims.VERDICTS] == [2, 1, 0, 0]
    (line,) = run.summary([run.Outcome(job, "failed", tmp_path / "none")]).to_dict("records")
    assert [line[verdict] for verdict in claims.VERDICTS] == ["", "", "", ""]


def test_dry_run_computes_and_writes_nothing(lab, capsys):
    assert cli.main(["run", str(lab()), "--dry-run"]) == 0
    assert "would run" in capsys.readouterr().out
    assert cli.main(["run", str(lab()), "--dry-run", "-p", "dataset=cub"]) == 1
    assert "missing: cub (official) test is not at" in capsys.readouterr().out
    assert not lab.root.exists()


def test_what_is_missing_is_said_before_any_work(lab):
    file = lab()
    with pytest.raises(ParameterError, match="no data set 'birdlet'"):
        run.execute(run.prepare(params.jobs(file, {"dataset": "birdlet"})))
    assert not lab.root.exists()


def test_without_papermill_the_extra_is_named(lab, monkeypatch):
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    with pytest.raises(ParameterError, match=r"upclose\[notebooks\]"):
        run.execute([])
    assert not lab.root.exists()


def test_missing_training_data_are_said_too(monkeypatch, tmp_path):
    monkeypatch.setenv("UPCLOSE_DATA", str(tmp_path))
    (job, *_) = params.jobs(params.paths.PARAMS / "papers" / "lare-table1.yaml")
    (item,) = run.prepare([job])
    assert "'fp16' is for GPUs" in item.missing
    assert "cub-painting (official) test is not at" in item.missing
    assert "cub (official) train is not at" in item.missing


WIDE = """dataset: str = "birdlets"  # which
split: str = "test"  # of it
backbone: str = "birdlets-tiny"  # model
second_backbone: str = "birdlets-tiny-whole"  # beside it
pretrained: str = ""  # tag or file
device: str = "cpu"  # where
precision: str = "fp32"  # arithmetic
domain: str = "photo"  # of Birdlets
source: str = "clip-d"  # of the sentences
description_file: str = ""  # own sentences
images: int = 20  # how many
crops: int = 4  # N
alpha: float = 0.5  # smallest
beta: float = 0.9  # largest
epsilon: float = 0.1  # temperature of the plan
"""


def broken(tmp_path):
    """Weights that are cut short, and weights of another model."""
    whole = paths.WEIGHTS / "birdlets-tiny.safetensors"
    for name, content in (("cut", whole.read_bytes()[:5000]), ("text", b"not weights")):
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    for name in ("cut", "text", "other"):
        shutil.copy(whole.with_suffix(".json"), tmp_path / f"{name}.json")
    (tmp_path / "words.json").write_text("[1, 2]")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("imges=3", "no parameter 'imges'; did you mean 'images'?"),
        ("images=x", "images='x': input should be a valid integer"),
        ("images=[1", "-p 'images=[1': the value is not YAML"),
        ("images", "not of the form name=value"),
        ("images=0", "images=0"),
        ("crops=0", "crops=0"),
        ("alpha=0.95", "alpha=0.95 is above beta=0.9"),
        ("epsilon=-0.1", "epsilon=-0.1: input should be greater than 0"),
        ("dataset=birdlet", "no data set 'birdlet'; did you mean 'birdlets'?"),
        ("dataset=imagefolder:nowhere", "no folder nowhere"),
        ("split=train", "birdlets has no split 'train'; there are validation, test"),
        ("domain=oil", "domain='oil': there are photo, painting, sketch, clipart"),
        ("domain=photo+oil", "domain='photo+oil': there are photo"),
        ("source=nope", "source='nope': input should be 'clip', 'clip-e'"),
        ("description_file=nowhere.json", "no description file nowhere.json"),
        ("description_file={tmp}/words.json", "it must map class names to lists of sentences"),
        ("device=tpu", "device='tpu': there are cpu, cuda"),
        ("precision=fp16", "'fp16' is for GPUs"),
        ("backbone=birdlets-tinny", "unknown model 'birdlets-tinny': nearest: birdlets-tiny"),
        ("backbone=ViT-B-32", "'ViT-B-32' without pretrained has random weights; tags: openai"),
        ("pretrained={tmp}/none.safetensors", "there is no checkpoint"),
        ("pretrained={tmp}/cut.safetensors", "cut.safetensors"),
        ("pretrained={tmp}/text.safetensors", "text.safetensors"),
        ("pretrained={tmp}/other.safetensors", "other.safetensors"),
    ],
)
def test_bad_input_ends_with_one_sentence_before_any_work(lab, capsys, tmp_path, given, words):
    broken(tmp_path)
    assert cli.main(["run", str(lab(cell=WIDE)), "-p", given.format(tmp=tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("upclose run: ")
    assert words in said
    assert said.count("\n") == 1
    assert "Traceback" not in said
    assert not lab.root.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["params/nowhere.yaml"], "no parameter file params/nowhere.yaml"),
        (["{tmp}"], "it is a folder of 1, such as small.yaml"),
        (["{tmp}/text.safetensors"], "holds a str; it must map"),
        (["{tmp}/cut.safetensors"], "is not YAML"),
    ],
)
def test_bad_files_end_with_one_sentence(lab, capsys, tmp_path, arguments, words):
    lab()
    broken(tmp_path)
    assert cli.main(["run", *(text.format(tmp=tmp_path) for text in arguments)]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not lab.root.exists()


@pytest.mark.parametrize("workers", ["0", "-1", "x"])
def test_workers_are_at_least_one(lab, capsys, workers):
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", str(lab()), "--workers", workers])
    assert stop.value.code == 2
    assert "--workers" in capsys.readouterr().err
    assert not lab.root.exists()


def test_a_device_must_be_on_the_machine_that_runs(lab, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    jobs = params.jobs(lab(cell=WIDE), {"device": "cuda:99"})
    assert "device 'cuda:99'" in run.prepare(jobs)[0].missing
    assert run.prepare(jobs, here=False)[0].missing == ""  # a cluster's nodes have their own


def test_the_second_backbone_does_not_take_the_first_ones_tag(lab):
    (item,) = run.prepare(params.jobs(lab(cell=WIDE), {"backbone": "ViT-B-32-quickgelu", "pretrained": "openai"}))
    assert item.missing == ""
    assert item.hashes["weights ViT-B-32-quickgelu"] == "ViT-B-32-quickgelu:openai"
    assert len(item.hashes["weights birdlets-tiny-whole"]) == 32


def test_own_sentences_are_read_from_where_the_caller_stands_and_make_another_run(lab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.json").write_text('{"a tern": ["a hooked beak"]}')
    body = "from pathlib import Path\nassert Path(description_file).is_file()\n"
    jobs = params.jobs(lab(body, cell=WIDE), {"description_file": "own.json"})
    (first,) = run.prepare(jobs)
    (outcome,) = run.execute([first], tmp_path / "elsewhere")
    assert (outcome.status, outcome.error) == ("done", "")
    (tmp_path / "own.json").write_text('{"a tern": ["a straight beak"]}')
    identity._sentences.cache_clear()
    assert run.prepare(jobs)[0].hash != first.hash


def test_an_unwritable_results_folder(lab, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["run", str(lab()), "--results", str(tmp_path / "file" / "results")]) == 2
    assert "cannot write results" in capsys.readouterr().err


def test_a_results_folder_that_cannot_be_written(lab, monkeypatch, capsys):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(
        run.tempfile, "TemporaryFile", refuse
    )  # root may write anywhere, so no mode of a folder will do
    assert cli.main(["run", str(lab())]) == 2
    assert "Permission denied; set UPCLOSE_RESULTS" in capsys.readouterr().err
    assert not list(lab.root.iterdir())


def test_a_full_results_folder(lab, monkeypatch, capsys):
    usage = run.shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: usage)
    assert cli.main(["run", str(lab())]) == 2
    assert "MiB are free" in capsys.readouterr().err


def start(lab, tmp_path, file, *options):
    """`upclose run` in a process of its own."""
    code = (
        "import signal, sys, pathlib; from upclose import paths, cli; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # a shell's background jobs inherit it ignored
        f"paths.NOTEBOOKS = pathlib.Path(r'{tmp_path / 'notebooks'}'); "
        f"sys.exit(cli.main(['run', r'{file}', *{list(options)!r}]))"
    )
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.PIPE)


def wait_for(condition, seconds=300):
    deadline = time.time() + seconds
    while not condition() and time.time() < deadline:
        time.sleep(0.2)
    assert condition()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_call_leaves_no_process_and_the_next_one_completes(lab, tmp_path, number):
    pids = tmp_path / "pids"
    body = (
        "import os, time, pathlib\n"
        f"if not pathlib.Path(r'{pids}').exists():\n"
        f"    pathlib.Path(r'{pids}').write_text(f'{{os.getpid()}} {{os.getppid()}}')\n    time.sleep(600)\n"
    )
    file = lab(body)
    first = start(lab, tmp_path, file)
    wait_for(lambda: pids.exists() and pids.read_text())
    os.kill(first.pid, number)
    first.wait(60)
    wait_for(lambda: not any(psutil.pid_exists(int(pid)) for pid in pids.read_text().split()), 60)
    (outcome,) = run.execute(run.prepare(params.jobs(file)))
    assert outcome.status == "done"
    assert not paths.damage(outcome.folder)
    assert not list(lab.root.glob("*/.partial-*"))


def test_the_same_run_started_twice_is_run_once_and_whole(lab, tmp_path):
    file = lab("import time\ntime.sleep(3)\n" + BODY)
    calls = [start(lab, tmp_path, file) for _ in range(3)]
    assert [call.wait(180) for call in calls] == [0, 0, 0]
    (folder,) = (found.parent for found in lab.root.glob("*/*/run.json"))
    assert not paths.damage(folder)
    assert {"metrics.csv", "notebook.ipynb", "params.yaml"} <= set(
        json.loads((folder / "run.json").read_text())["files"]
    )


def test_a_damaged_run_is_named_and_run_again_on_request(lab, capsys):
    file = lab()
    (first,) = run.execute(run.prepare(params.jobs(file)))
    metrics = first.folder / "metrics.csv"
    whole = metrics.read_text()
    metrics.write_text(whole.replace("100.0", "10.0"))
    assert cli.main(["run", str(file)]) == 2
    assert "metrics.csv is not what the run wrote" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="is left out: metrics.csv"), pytest.raises(FileNotFoundError):
        report.collect(lab.root)
    assert "damaged: metrics.csv" in report.write(first.folder.parent).read_text()
    assert cli.main(["run", str(file), "--force"]) == 0
    assert metrics.read_text() == whole
    assert not list(lab.root.glob("*/.before-*"))


def test_a_forced_run_that_fails_keeps_the_earlier_one(lab, tmp_path):
    body = f"import pathlib\nif pathlib.Path(r'{tmp_path / 'bad'}').exists():\n    raise RuntimeError('no')\n"
    file = lab(body)
    (first,) = run.execute(run.prepare(params.jobs(file)))
    (tmp_path / "bad").write_text("")
    (second,) = run.execute(run.prepare(params.jobs(file), force=True))
    assert second.status == "failed"
    assert not paths.damage(first.folder)


@pytest.mark.parametrize("stop", [os.killpg, os.kill])  # Ctrl-C reaches every process, a scheduler's signal the first
def test_interrupted_runs_are_not_complete_and_the_next_call_goes_on(lab, tmp_path, stop):
    body = "import time, pathlib\nif images == 2 and not pathlib.Path(r'%s').exists():\n    time.sleep(600)\n"
    file = lab(body % (tmp_path / "go"), "notebook: small\ngrid: {images: [1, 2]}\n")
    started = start(lab, tmp_path, file)
    wait_for(lambda: list(lab.root.glob("*/.partial-small-2*/params.yaml")))
    time.sleep(1)
    stop(started.pid, signal.SIGINT)
    assert started.wait(90) == 130
    (complete,) = lab.root.glob("*/*/run.json")
    assert complete.parent.name.startswith("small-1")
    page = (complete.parents[1] / "index.html").read_text()
    assert f'<h2 id="{complete.parent.name}">' in page
    assert "not complete" in page
    (tmp_path / "go").write_text("")
    outcomes = run.execute(run.prepare(params.jobs(file)))
    assert [outcome.status for outcome in outcomes] == ["complete", "done"]


def planned(tmp_path, name="small", forced=False):
    """A run that is planned, of a notebook that is not there."""
    return run.Item(params.Job(name, tmp_path / "none.ipynb", {"seed": 0}), "0123456789", {}, None, "", forced)


def written(item, day):
    """The partial folder of a run whose notebook has ended."""
    partial = run._partial(item, day)
    partial.mkdir(parents=True)
    (partial / "metrics.csv").write_text("value\n")
    return partial


class Apart:
    """A context of `multiprocessing` whose processes are threads."""

    Pipe = staticmethod(multiprocessing.Pipe)

    @staticmethod
    def Process(target, args):
        *rest, send = args
        own = Connection(os.dup(send.fileno()), readable=False)  # as another process has it
        return threading.Thread(target=target, args=(*rest, own))


def test_a_long_name_of_the_temporary_folder_ends_no_run(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setattr(run.multiprocessing, "get_context", {"spawn": Apart}.__getitem__)
    monkeypatch.setattr(run, "_cells", lambda _: 2)

    def child(item, partial, threads, environment, send):
        for said in (run.TICK, run.TICK, run.Outcome(item.job, "done", partial)):
            send.send(said)

    monkeypatch.setattr(run, "_child", child)
    items = [planned(tmp_path, name) for name in ("a", "b")]
    found = {item.job.name: outcome.status for item, outcome in run._locally(items, tmp_path, ["", ""])}
    assert found == {"a": "done", "b": "done"}


def test_a_process_that_is_killed_is_said_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(run.multiprocessing, "get_context", lambda _: Apart)
    monkeypatch.setattr(run, "_cells", lambda _: 1)
    monkeypatch.setattr(run, "_child", lambda *arguments: arguments[-1].close())
    ((_, outcome),) = run._locally([planned(tmp_path)], tmp_path, [""])
    assert outcome.status == "failed"
    assert "its process was killed" in outcome.error


def test_each_gpu_has_one_notebook_at_a_time_and_none_is_idle(tmp_path, monkeypatch):
    monkeypatch.setattr(run.multiprocessing, "get_context", lambda _: Apart)
    monkeypatch.setattr(run, "_cells", lambda _: 1)
    busy, most, both = [], [], threading.Barrier(2, timeout=20)
    first = iter([both.wait, both.wait])  # the first waits until another one is busy too

    def child(item, partial, threads, environment, send):
        gpu = environment["CUDA_VISIBLE_DEVICES"]
        busy.append(gpu)
        most.append(sorted(busy))
        next(first, lambda: None)()
        busy.remove(gpu)
        send.send(run.Outcome(item.job, "done", partial))

    monkeypatch.setattr(run, "_child", child)
    items = [planned(tmp_path, name) for name in "abcde"]
    assert [outcome.status for _, outcome in run._locally(items, tmp_path, ["3", "7"])] == ["done"] * 5
    assert ["3", "7"] in most
    assert all(len(set(names)) == len(names) for names in most)


def test_a_notebook_sees_its_own_gpu_only(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.gpus() == ["3", "7"]
    monkeypatch.setattr(run, "_execute", lambda *_: os.environ["CUDA_VISIBLE_DEVICES"])
    monkeypatch.setattr(run, "_end_with_parent", lambda: None)
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    said = []
    run._child(None, None, 1, {**os.environ, "CUDA_VISIBLE_DEVICES": "7"}, SimpleNamespace(send=said.append))
    assert said == ["7"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert devices.gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert devices.gpus() == []


def test_braces_in_a_path_are_no_format(tmp_path):
    path = tmp_path / "{seed} {" / "notebook.ipynb"
    assert parameterize_path(run._literal(path), {"seed": 0}) == str(path)


def test_a_hidden_sheet_and_a_long_one_make_folders_that_are_seen(lab, tmp_path):
    sheet = lab()
    for name in (".mine.yaml", f"{'long ' * 45}.yaml", "....yaml"):
        shutil.copy(sheet, tmp_path / name)
    hidden, long, dots = (params.jobs(tmp_path / n)[0].name for n in (".mine.yaml", f"{'long ' * 45}.yaml", "....yaml"))
    assert (hidden, dots) == ("mine", "run")
    assert len(f".partial-{long}-0123456789.01234567") < 200


def test_a_run_belongs_to_the_day_on_which_its_call_began(tmp_path, monkeypatch):
    today = iter([date(2026, 1, 31), date(2026, 2, 1)])
    monkeypatch.setattr(run, "date", SimpleNamespace(today=lambda: next(today)))

    def locally(todo, day, places):
        for item in todo:
            monkeypatch.setattr(run, "_run_notebook", lambda item, partial, tick: written_here(partial))
            yield item, run._execute(item, run._partial(item, day))

    def written_here(partial):
        partial.mkdir(parents=True)
        next(today)  # midnight
        return -3.0, 1

    monkeypatch.setattr(run, "_locally", locally)
    (outcome,) = run.execute([planned(tmp_path)], tmp_path / "results")
    assert (outcome.status, outcome.folder.parent.name) == ("done", "2026-01-31")


def test_a_clock_that_goes_back_spoils_no_times(tmp_path, monkeypatch):
    later = iter(range(10**6, 0, -1000))
    monkeypatch.setattr(run.time, "time", lambda: next(later))
    item = planned(tmp_path)
    monkeypatch.setattr(run, "_run_notebook", lambda item, partial, tick: (written(item, partial.parent), (1.0, 1))[1])
    outcome = run._execute(item, tmp_path / "2026-01-02" / ".partial-x.1")
    assert outcome.seconds >= 0
    done = written(item, tmp_path / "2999-01-01")
    run._seal(item, done, 1.0, 1)
    assert run._complete(tmp_path, item.hash).parent.name == "2999-01-01"  # a day to come is as good as any


def test_links_are_replaced_and_what_they_lead_to_stays(tmp_path):
    item = planned(tmp_path, forced=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "run.json").write_text("{}")
    root = tmp_path / "results"
    root.symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "2026-01-01").mkdir(parents=True)
    for target in (elsewhere, tmp_path / "nowhere"):
        link = root / "2026-01-01" / item.run
        link.unlink(missing_ok=True) if link.is_symlink() else shutil.rmtree(link, ignore_errors=True)
        link.symlink_to(target)
        final = run._seal(item, written(item, root / "2026-01-01"), 1.0, 1)
        assert not final.is_symlink()
        assert not paths.damage(final)
    assert [file.name for file in elsewhere.iterdir()] == ["run.json"]
    assert sorted(file.name for file in final.parent.iterdir()) == [item.run]
    assert run._complete(root, item.hash) == final


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no second file system")
def test_results_may_lie_on_another_file_system(tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        final = run._seal(item := planned(tmp_path), written(item, Path(folder) / "2026-01-01"), 1.0, 1)
        assert not paths.damage(final)


def test_results_that_are_removed_while_a_run_writes_are_its_failure_alone(tmp_path, monkeypatch):
    root = tmp_path / "results"

    def removed(item, partial, tick):
        shutil.rmtree(root)
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(run, "_run_notebook", removed)
    monkeypatch.setattr(
        run, "_locally", lambda todo, day, _: ((i, run._execute(i, written(i, day))) for i in todo), raising=True
    )
    (outcome,) = run.execute([planned(tmp_path)], root)
    assert outcome.status == "failed"
    assert "is gone, somebody removed it while it ran" in outcome.error
    assert run.summary([outcome]).status[0] == "failed"


def test_the_summary_says_what_of_an_old_run_is_damaged(tmp_path):
    (tmp_path / "claims.csv").write_text("claim,text\nC1,a\n")
    (line,) = run.summary([run.Outcome(params.Job("old", tmp_path, {}), "complete", tmp_path)]).to_dict("records")
    assert line["status"] == "complete, damaged: 'verdict'"
