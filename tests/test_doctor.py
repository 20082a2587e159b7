import json

import pytest

import trees
from upclose import compare, doctor, params, prompts
from upclose.encode import published


@pytest.fixture(autouse=True)
def empty_machine(tmp_path, monkeypatch):
    for name in ("CACHE", "DATA", "RESULTS"):
        monkeypatch.setenv(f"UPCLOSE_{name}", str(tmp_path / name.lower()))
    monkeypatch.setattr(published, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(doctor, "throughput", lambda: 100.0)


def test_plain_page(capsys):
    assert doctor.main() == 0
    page = capsys.readouterr().out
    assert "torch " in page
    assert "/CUB_200_2011: `upclose data get cub` gets CUB_200_2011.tgz" in page
    assert "get ImageNet-Sketch.zip by hand from https://github.com/" in page
    assert "drawn by the program" in page
    assert "LGCA Table 1" not in page


def test_json_of_the_tables(capsys):
    assert doctor.main(tables=True, as_json=True) == 0
    facts = json.loads(capsys.readouterr().out)
    lines = {line["file"]: line for line in facts["tables"]}
    table = lines["lgca-table1"]
    assert table["runs"] == 20
    assert not table["ready"]
    assert set(table["needs"]) == {"weights", "data", "prompts", "notebook"}
    assert set(table["needs"]["weights"]) == {"ViT-B/32", "ViT-B/16"}
    assert len(table["needs"]["data"]) == 5
    assert "huggingface.co" in table["needs"]["weights"]["ViT-B/16"]
    assert any(what.startswith("data places365 (official): ") for what in table["missing"])
    assert any(what.startswith("prompts cupl of dtd: https://") for what in table["missing"])
    assert table["command"] == "upclose run params/papers/lgca-table1.yaml -p device=cuda"
    assert all(line["hours"] > 0 for line in lines.values())
    assert sum(facts["published_values"].values()) == len(compare.published())


def test_the_page_of_the_tables_names_each_with_its_command(capsys, tmp_path):
    trees.make(tmp_path / "data", "dtd")
    assert doctor.main(tables=True) == 0
    page = capsys.readouterr().out
    for name, sheet in doctor.sheets().items():
        assert f"\n{sheet.reproduces}: not ready\n  upclose run params/papers/{name}.yaml -p device=cuda\n" in page
    lgca = page.split("\nLGCA Table 1")[1].split("\n\n")[0]
    assert "data     here: dtd (official)\n" in lgca
    assert "data     missing: oxford-pets (official), cub (official), food101" in lgca
    assert "20 runs" in lgca
    fewshot = page.split("\nD&D Table 3")[1].split("\n\n")[0]
    assert "prompts  not published: clip-d of caltech101, clip-d of sun397, clip-d of ucf101" in fewshot
    assert max(map(len, page.splitlines())) < 400


def test_a_folder_without_coops_split_file_is_not_its_data_set(tmp_path):
    trees.make(tmp_path / "data", "food101")
    assert doctor.missing_data("food101") == ""
    assert "split_zhou_Food101.json" in doctor.missing_data("food101", "coop")
    trees.make(tmp_path / "data", "dtd", "coop")
    assert doctor.missing_data("dtd", "coop") == ""


def prompt_files(sources, dataset):
    return {need.name: need.get for need in doctor._prompts(sources, dataset)}


def test_what_is_there_is_not_missing(tmp_path, monkeypatch):
    assert doctor.missing_data("oxford-pets")
    trees.make(tmp_path / "data", "oxford-pets")
    assert doctor.missing_data("oxford-pets") == ""
    assert doctor.missing_weights("ViT-B-32-quickgelu", "openai").startswith("https://huggingface.co/")
    monkeypatch.setattr(published, "try_to_load_from_cache", lambda *_, **__: "/somewhere")
    assert doctor.missing_weights("ViT-B-32-quickgelu", "openai") == ""
    assert doctor.missing_weights("birdlets-tiny", "") == ""
    file = prompts.local(prompts.find("cupl", "dtd"))
    assert "github.com" in prompt_files(["cupl"], "dtd")["cupl of dtd"]
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    assert prompt_files(["cupl"], "dtd") == {"cupl of dtd": ""}
    assert prompt_files(["clip", "clip-e", "waffle"], "dtd") == {}
    assert list(prompt_files(["lazsl", "clip-d"], "dtd")) == ["clip-d of dtd"]


def test_sentences_are_a_methods_own_or_the_cells_or_the_notebooks():
    about = params.About(source="dnd")
    assert doctor._sources(about, {"methods": ["CLIP", "zero-shot", "linear probe", "TransCLIP-ZS"]}) == set()
    assert doctor._sources(about, {"methods": ["CuPL", "Baseline+OT", "WCA"]}) == {"cupl", "lazsl", "dnd"}
    assert doctor._sources(about, {"methods": ["WCA"], "source": "clip-d"}) == {"clip-d"}
