"""A published table in one call: its plan, its price, its runs on miniature trees, its page."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import trees
from upclose import bank, cli, compare, costs, datasets, devices, identity, paths, prompts, reproduce, run
from upclose.encode import published
from upclose.params import ParameterError

pytestmark = pytest.mark.filterwarnings("ignore::upclose.datasets.CountWarning")
B32, B16 = (costs.Backbone(f"ViT-B-{patch}-quickgelu", "openai") for patch in (32, 16))


# ------------------------------------------------------------------------------------------------------------ the cells


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("lgca-table1", ["lgca-table1"]),
        ("LaZSL-Table1.yaml", ["lazsl-table1"]),
        ("D&D", ["dnd-few-shot", "dnd-test-time", "dnd-zero-shot"]),
        ("dnd", ["dnd-few-shot", "dnd-test-time", "dnd-zero-shot"]),
        ("lare", ["lare-fig4", "lare-table1", "lare-table2", "lare-table3"]),
    ],
)
def test_a_table_or_a_paper_in_any_case(name, found):
    assert reproduce.tables(name) == found


def test_an_unknown_name_lists_the_known_ones(capsys):
    assert cli.main(["reproduce", "lgca-table7"]) == 2
    said = capsys.readouterr().err
    assert "no published table 'lgca-table7'" in said
    assert "fair-table10" in said
    assert "LaZSL" in said


@pytest.mark.parametrize(
    ("table", "only", "sets"),
    [
        ("lgca-table1", ["CUB", "pets"], {"cub", "oxford-pets"}),
        ("lazsl-table2", ["imagenet-v2"], {"imagenet-v2"}),
        ("lazsl-fig5", ["imagenet"], {"imagenet"}),
        ("lgca-table1", [], {"oxford-pets", "cub", "dtd", "food101", "places365"}),
    ],
)
def test_only_some_data_sets(table, only, sets):
    assert {cell.values["dataset"] for cell in reproduce.cells([table], only)} == sets


@pytest.mark.parametrize(("only", "why"), [("cifar", "there are oxford-pets, cub"), ("d", "it may be oxford-pets or")])
def test_a_data_set_that_is_not_there_or_may_be_several(only, why):
    with pytest.raises(ParameterError, match=why):
        reproduce.cells(["lgca-table1"], [only])


def test_a_table_has_its_data_sets():
    with pytest.raises(ParameterError, match="dataset=birdlets: a table has its data sets; --only chooses among them"):
        reproduce.cells(["lgca-table1"], fixed={"dataset": "birdlets"})


@pytest.mark.parametrize("paper", ["lgca", "lazsl", "dnd", "fair", "lare"])
def test_the_runs_of_a_paper_are_the_cells_of_its_sheets_under_different_names(paper):
    found = reproduce.cells(reproduce.tables(paper))
    jobs = [cell.job.name for cell in found]
    assert len(set(jobs)) == len(jobs)
    assert all(cell.values.items() <= cell.job.values.items() for cell in found)


def test_who_builds_a_bank_goes_before_who_reads_it():
    found = reproduce.cells(["lazsl-fig5"])
    readers = costs.readers(cell.work for cell in found)
    builders = {by[0] for by in readers.values()}
    assert builders == set(range(len(builders)))  # of 32 runs the 18 that build stand first
    assert len(found) == 32
    assert len(builders) == 18


# ------------------------------------------------------------------------------------------------------------ the price


def test_the_price_of_one_gpu_is_the_sum_and_that_of_many_the_longest_way():
    found = reproduce.cells(["lgca-table1"], ["dtd"])  # four runs, no bank in common
    each = 3 * 1880 * 601
    rate = {B32: each / 3600, B16: each / 7200}  # one and two hours a run
    assert costs.hours([cell.work for cell in found], rate, 1) == pytest.approx((6, 6))
    assert costs.hours([cell.work for cell in found], rate, 4) == pytest.approx((6, 2))
    whole, last = costs.hours([cell.work for cell in found], rate, 2)
    assert whole == pytest.approx(6)
    assert 3 <= last <= 4


def test_a_shared_bank_is_paid_once():
    rate = {costs.Backbone("RN50-quickgelu", "openai"): 1.0}
    zero, few, both = (
        costs.hours([cell.work for cell in reproduce.cells(sheets, ["dtd"])], rate)[0] * 3600
        for sheets in (["dnd-zero-shot"], ["dnd-few-shot"], ["dnd-zero-shot", "dnd-few-shot"])
    )
    assert zero + few - both == pytest.approx(10 * 1692)


def test_the_dry_run_prices_what_is_missing_and_writes_nothing(tmp_path, monkeypatch, capsys):
    for name in ("CACHE", "DATA", "RESULTS"):
        monkeypatch.setenv(f"UPCLOSE_{name}", str(tmp_path / name.lower()))
    monkeypatch.setattr(published, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(costs, "rate", lambda backbone, device, precision, seconds: 1880 * 601 / 3600)
    trees.make(tmp_path / "data", "dtd")
    assert cli.main(["reproduce", "LGCA", "--only", "dtd,cub", "--device", "cpu", "--dry-run"]) == 1
    said = capsys.readouterr().out
    assert "lgca-table1: 8 runs" in said
    assert re.search(r"weights  to be fetched: ViT-B/16, .*https://huggingface.co/", said)
    assert "data     here: dtd (official)" in said
    assert re.search(
        r"data     to be fetched: cub \(official\), 1\.1 GiB: .*`upclose data get cub` gets CUB_200_2011.tgz", said
    )
    assert re.search(r"prompts  to be fetched: cupl of dtd, \d+\.\d KiB", said)
    assert re.search(
        r"dtd test, ViT-B/32, 100 crops, alpha 0\.5, beta 0\.9, tau 1\.1, seeds 0 1 2: 1,880 pictures, 3,389,640 "
        r"encodings, 3\.3 GiB; read by lgca-table1-dtd-ViT-B-32-quickgelu-1\.1\n",
        said,
    )
    assert f"price    {4 * 3 * (1 + 5794 / 1880):.1f} h of encoding; nothing else is counted" in said
    assert not (tmp_path / "results").exists()


def test_a_rate_is_measured_in_the_time_that_is_given():
    assert costs.rate(costs.Backbone("birdlets-tiny", ""), "cpu", seconds=0.3) > 10


# ------------------------------------------------------------------------------------------------------------- the runs


@pytest.fixture
def tiny(lab, tmp_path, monkeypatch):
    """A machine with small models, and a maker of data sets with their sentences."""
    for backbone in (B32, B16):
        lab(*backbone, trees.CLIP)
    plain = prompts.published
    monkeypatch.setattr(prompts, "published", lambda: tuple(file._replace(sha256="") for file in plain()))
    startup = tmp_path / "ipython" / "profile_default" / "startup" / "01.py"
    startup.write_text(
        "from upclose import prompts\nplain = prompts.published\n"
        "prompts.published = lambda: tuple(file._replace(sha256='') for file in plain())\n"
    )

    def make(name, each=1):
        trees.make(paths.data(), name, each=each)
        classes = datasets.load(name).class_names
        for source, said in (("cupl", "It is {}, number {}."), ("clip-d", "{}, number {}")):
            file = prompts.local(prompts.find(source, name))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({c: [said.format(c, k) for k in range(2)] for c in classes}))
            file.with_name(f"{file.name}.sha256").write_text(prompts.pooch.file_hash(file))

    return make


EXECUTE = run._execute


def measuring(item, partial, tick):
    """In place of a notebook: CLIP is right in half of 100 pictures, LGCA at tau 1.1 in 60 and at 1.25 in 70."""
    values = item.job.values
    partial.mkdir(parents=True)
    found = {"CLIP": 50.0, "LGCA": 60.0 if values["tau"] == 1.1 else 70.0}
    facts = {
        "paper": "LGCA",
        "table": "Table 1",
        "dataset": values["dataset"],
        "setting": "zero-shot",
        "metric": "top-1",
    }
    facts["metric"] = compare.published("LGCA").metric[0]
    label = compare.backbone_label(values["backbone"], values["pretrained"])
    rows = [facts | {"method": m, "backbone": label, "value": v, "std": "", "n": 100} for m, v in found.items()]
    pd.DataFrame(rows).assign(run=item.run).to_csv(partial / "metrics.csv", index=False)
    return 1.0, 1


@pytest.fixture
def measured(tiny, monkeypatch):
    """`tiny`, where notebooks are measured in a moment."""
    monkeypatch.setattr(run, "_run_notebook", measuring)

    def locally(todo, day, places):
        tiny.places = places
        return ((item, run._execute(item, run._partial(item, day))) for item in todo)

    monkeypatch.setattr(run, "_locally", locally)
    return tiny


def test_a_table_is_run_compared_and_written_and_the_next_call_does_nothing_again(measured, capsys, monkeypatch):
    measured("dtd")
    call = ["reproduce", "lgca-table1", "--only", "dtd", "--device", "cpu", "-p", "crops=4"]
    assert cli.main(call) == 0
    said = capsys.readouterr().out
    printed = compare.published("LGCA", "Table 1").query("method == 'LGCA' and dataset == 'dtd'")
    for line in printed.itertuples():
        for tau, ours in ((1.1, 60), (1.25, 70)):
            numbers = rf"{line.value:.2f} +{ours}.00 +{ours - line.value:.2f} "
            shown = rf"tau {tau} +LGCA +dtd +{re.escape(line.backbone)} +{numbers}"
            assert re.search(shown, said), said
    page = paths.results() / "reproduce" / "lgca-table1.html"
    assert said.endswith(f"page: {page}\n")
    text = page.read_text()
    assert "Not as in the sheets: precision = fp32" in text
    assert "Not as in the sheets: crops = 4" in text
    table = pd.read_csv(page.with_suffix(".csv"), keep_default_na=False)
    assert set(table.variant) == {"tau 1.1", "tau 1.25"}
    assert set(table.dataset) == {"dtd"}  # of the five that the table prints
    assert len(table[table.ours != ""]) == 2 * 2 * 2  # methods, backbones, taus
    for link in re.findall(r'<a href="([^"]+)"', text):
        assert (page.parent / link / "run.json").is_file()

    monkeypatch.setattr(run, "_run_notebook", None)
    shutil.rmtree(paths.cache() / "prompts")  # what is complete needs nothing
    assert cli.main(call) == 0
    assert capsys.readouterr().out.split("banks")[1] == said.split("banks")[1]
    monkeypatch.setattr(costs, "rate", None)
    assert cli.main([*call, "--dry-run"]) == 0
    assert "all runs are complete" in capsys.readouterr().out


@pytest.fixture
def cluster(monkeypatch):
    """Ray with two processors on this machine, whose workers import the tests' modules; ask for it after `tiny`."""
    ray = pytest.importorskip("ray", reason='needs Ray: pip install "upclose[cluster]"')
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
    yield ray
    ray.shutdown()


def elsewhere(item, partial):
    """A run in a worker of Ray: measured in a moment, but for one whose worker is lost."""
    if item.job.name.endswith("ViT-B-32-quickgelu-1.25"):
        os.kill(os.getpid(), signal.SIGKILL)
    run._run_notebook = measuring
    return EXECUTE(item, partial)


def test_a_cluster_runs_a_table_names_what_it_lost_and_the_next_call_does_that(measured, cluster, capsys, monkeypatch):
    measured("dtd")
    call = ["reproduce", "lgca-table1", "--only", "dtd", "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(run, "_execute", elsewhere)
        assert cli.main([*call, "--ray", "local"]) == 1
    assert not cluster.is_initialized()
    assert "lgca-table1-dtd-ViT-B-32-quickgelu-1.25: " in capsys.readouterr().err
    done = {file: file.read_bytes() for file in paths.results().glob("*/*/run.json")}
    assert len(done) == 3
    table = pd.read_csv(paths.results() / "reproduce" / "lgca-table1.csv", keep_default_na=False)
    ours = table[(table.ours != "") & (table.method == "LGCA")]
    assert sorted(zip(ours.backbone, ours.variant, ours.ours.astype(float))) == [
        ("ViT-B/16", "tau 1.1", 60), ("ViT-B/16", "tau 1.25", 70), ("ViT-B/32", "tau 1.1", 60),
    ]  # fmt: skip
    assert cli.main(call) == 0
    assert len(list(paths.results().glob("*/*/run.json"))) == 4
    assert {file: file.read_bytes() for file in done} == done


@pytest.mark.parametrize(("device", "places"), [("cuda", ["0", "3"]), ("cuda:1", [""]), (None, ["0", "3"])])
def test_cuda_is_every_gpu_and_a_number_that_one(measured, monkeypatch, device, places):
    measured("dtd")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "gpus", lambda: ["0", "3"])
    monkeypatch.setattr(identity, "_arithmetic", lambda *_: None)
    assert cli.main(["reproduce", "lgca-table1", "--only", "dtd", *(["--device", device] if device else [])]) == 0
    assert measured.places == places
    assert "Not as in the sheets" not in (paths.results() / "reproduce" / "lgca-table1.html").read_text()
    assert len(list(paths.results().glob("*/*/run.json"))) == 4


def test_without_a_gpu_a_plan_for_one_has_no_price(measured, capsys):
    measured("dtd")
    cli.main(["reproduce", "lgca-table1", "--only", "dtd", "--device", "cuda", "--dry-run"])
    said = capsys.readouterr().out
    assert "price    not known: this machine has no GPU" in said
    assert "of banks" in said


def test_a_run_that_fails_is_named_and_the_others_are_compared(measured, capsys, monkeypatch):
    measured("dtd")

    def failing(item, partial, tick):
        if item.job.values["tau"] == 1.1:
            partial.mkdir(parents=True)
            raise RuntimeError("no <luck>")
        return measuring(item, partial, tick)

    monkeypatch.setattr(run, "_run_notebook", failing)
    assert cli.main(["reproduce", "lgca-table1", "--only", "dtd", "--device", "cpu"]) == 1
    said = capsys.readouterr()
    assert "lgca-table1-dtd-ViT-B-16-quickgelu-1.1: RuntimeError: no <luck>" in said.err
    assert "70.00" in said.out
    text = (paths.results() / "reproduce" / "lgca-table1.html").read_text()
    assert "no &lt;luck&gt;" in text
    monkeypatch.setattr(run, "_run_notebook", lambda *_: 1 / 0)
    assert cli.main(["reproduce", "lgca-table1", "--only", "dtd", "--device", "cpu", "-p", "crops=5"]) == 1
    assert "70.00" not in capsys.readouterr().out  # what other parameters have measured is not this call's


def unreachable(*_):
    raise ConnectionError("no network")


def test_what_lacks_something_is_named_before_any_work_and_left_out(measured, capsys, monkeypatch):
    measured("dtd")
    call = ["reproduce", "lgca-table1", "--device", "cpu", "--only"]
    monkeypatch.setattr(prompts, "fetch", lambda file: None)
    monkeypatch.setattr(datasets, "download", unreachable)
    assert cli.main([*call, "cub", "--yes"]) == 2
    said = capsys.readouterr().err
    assert "data cub (official): no network" in said
    assert "lgca-table1-cub-ViT-B-32-quickgelu-1.1: cub (official) test is not at" in said
    assert "4 of 4 runs lack something" in said
    assert not list(paths.results().glob("*/*/run.json"))
    assert cli.main([*call, "cub,dtd", "--yes"]) == 1
    said = capsys.readouterr()
    assert "lgca-table1-cub-ViT-B-32-quickgelu-1.1: cub (official) test is not at" in said.err
    assert len(list(paths.results().glob("*/*/run.json"))) == 4
    assert "page: " in said.out


def ctrl_d(_):
    raise EOFError


def test_nothing_is_fetched_unasked(measured, capsys, monkeypatch):
    measured("dtd")
    trees.make(paths.data(), "oxford-pets")
    fetched = []
    monkeypatch.setattr(prompts, "fetch", fetched.append)
    call = ["reproduce", "lgca-table1", "--only", "pets", "--device", "cpu"]
    assert cli.main(call) == 2
    assert "nobody can be asked whether to fetch 2 things (74.3 KiB): add --yes" in capsys.readouterr().err
    monkeypatch.setattr(reproduce.sys, "stdin", SimpleNamespace(isatty=lambda: True))
    for answer in (lambda _: "", ctrl_d):
        monkeypatch.setattr("builtins.input", answer)
        assert cli.main(call) == 2
        assert "nothing was fetched" in capsys.readouterr().err
    assert not fetched
    monkeypatch.setattr("builtins.input", lambda _: "Y")
    assert cli.main(call) == 2  # they are still missing
    assert [file.source for file in fetched] == ["clip-d", "cupl"]


def test_data_are_fetched_by_the_function_of_data_get_and_the_runs_go_on(measured, capsys, monkeypatch):
    measured("dtd")  # and its sentences
    shutil.rmtree(paths.data())
    got = []
    monkeypatch.setattr(datasets, "download", lambda *given: (got.append(given), trees.make(paths.data(), given[0])))
    call = ["reproduce", "lgca-table1", "--only", "dtd", "--device", "cpu"]
    assert cli.main(call) == 2
    assert "nobody can be asked whether to fetch 1 thing (596.3 MiB): add --yes" in capsys.readouterr().err
    assert cli.main([*call, "--yes"]) == 0
    assert got == [("dtd", None, "official")]
    assert "page: " in capsys.readouterr().out


def test_a_runs_name_does_not_change_with_what_it_does_not_use(measured):
    measured("dtd")
    (cell, *_) = reproduce.cells(["lgca-table1"], ["dtd"], {"device": "cpu", "precision": "fp32"})
    (before,) = run.prepare([cell.job])
    assert not before.missing
    measured("cub")
    measured("oxford-pets")
    identity._data.cache_clear()
    (after,) = run.prepare([cell.job])
    assert (after.hash, after.hashes) == (before.hash, before.hashes)
    trees.picture(paths.data() / "dtd" / "dtd" / "images" / "kind_001" / "more.jpg")
    identity._data.cache_clear()
    assert run.prepare([cell.job])[0].hash == before.hash  # no list names it


@pytest.mark.slow
def test_lgcas_first_table_from_an_empty_folder_to_its_page(tiny, capsys):
    tiny("dtd")
    small = {"crops": 4, "crop_seeds": [0, 1], "tau": 1.25}
    given = [part for name, value in small.items() for part in ("-p", f"{name}={value}")]
    assert cli.main(["reproduce", "lgca-table1", "--only", "dtd", "--device", "cpu", *given]) == 0
    assert "lgca-table1: 2 runs" in capsys.readouterr().out
    table = pd.read_csv(paths.results() / "reproduce" / "lgca-table1.csv", keep_default_na=False)
    ours = table[table.ours != ""]
    assert len(ours) == 7 * 2  # rows of the table, backbones
    assert ours.verdict.str.fullmatch(r"reproduced|off by [+-]\d+\.\d").all()
    assert set(ours.n) == {47}

    cells = reproduce.cells(["lgca-table1"], ["dtd"], small | {"device": "cpu"})
    planned = {(b.dataset, b.split, b.seed, b.views) for cell in cells for b in cell.work.banks}
    built = [row["identity"] for row in bank.ls()]
    ladders = [facts for facts in built if facts["plan"]["steps"] > 1]  # the others are the notebook's controls
    assert len(ladders) == 2 * len(planned)  # of each backbone
    found = {
        (*[facts["dataset"][k] for k in ("name", "split")], plan["seed"], 1 + plan["n"] * plan["steps"])
        for facts in ladders
        for plan in [facts["plan"]]
    }
    assert found == planned
