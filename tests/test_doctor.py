import json

import pytest

import trees
from upclose import compare, doctor, prompts


@pytest.fixture(autouse=True)
def empty_machine(tmp_path, monkeypatch):
    for name in ("CACHE", "DATA", "RESULTS"):
        monkeypatch.setenv(f"UPCLOSE_{name}", str(tmp_path / name.lower()))
    monkeypatch.setattr(doctor, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(doctor, "throughput", lambda: 100.0)


def test_plain_page(capsys):
    assert doctor.main() == 0
    page = capsys.readouterr().out
    assert "torch " in page
    assert "CUB_200_2011.tgz by hand" in page
    assert "drawn by the program" in page
    assert "LGCA Table 1" not in page


def test_json_of_the_tables(capsys):
    assert doctor.main(tables=True, as_json=True) == 0
    facts = json.loads(capsys.readouterr().out)
    lines = {line["file"]: line for line in facts["tables"]}
    table = lines["lgca-table1"]
    assert table["runs"] == 20
    assert not table["ready"]
    assert any("weights of ViT-B/16" in what for what in table["missing"])
    assert any(what.startswith("places365 (official)") for what in table["missing"])
    assert any("cupl of dtd" in what for what in table["missing"])
    assert table["command"] == "upclose run params/papers/lgca-table1.yaml"
    assert all(line["hours"] > 0 for line in lines.values())
    assert sum(facts["published_values"].values()) == len(compare.published())


def test_what_is_there_is_not_missing(tmp_path, monkeypatch):
    assert doctor.missing_data("oxford-pets", "test")
    trees.make(tmp_path / "data", "oxford-pets")
    assert doctor.missing_data("oxford-pets", "test") == ""
    assert doctor.missing_weights("ViT-B-32-quickgelu", "openai").startswith("weights of ViT-B/32: https://")
    monkeypatch.setattr(doctor, "try_to_load_from_cache", lambda *_: "/somewhere")
    assert doctor.missing_weights("ViT-B-32-quickgelu", "openai") == ""
    assert doctor.missing_weights("birdlets-tiny", "") == ""
    file = prompts.local(prompts.find("cupl", "dtd"))
    assert doctor.missing_prompts(["CuPL"], "dtd")
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    assert doctor.missing_prompts(["CuPL"], "dtd") == []
    assert doctor.missing_prompts(["CLIP"], "dtd") == []


def test_encodings_are_counted():
    pets = {"dataset": "oxford-pets", "crops": 100, "alpha": 0.5, "beta": 0.9, "crop_seeds": [0, 1], "backbone": "x"}
    assert doctor.encodings("02_lazsl", pets)[0] == 3669 * 201
    assert doctor.encodings("01_lgca", {**pets, "tau": 1.1})[0] == 3669 * 1201
    fair = {"epochs": 15, "crops": 16, "seeds": [0], "methods": ["CLIP", "FAIR"], "table": "Table 1"}
    assert doctor.encodings("04_fair", {**pets, **fair})[0] == 3680 * 15 * 20 + 3669
