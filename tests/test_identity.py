import json
import shutil

import nbformat
import pytest

import trees
from upclose import identity, params, paths, programs, prompts

CELL = 'dataset: str = "imagefolder:mine"  # which\nsplit: str = "test"  # of it\n'


@pytest.fixture
def hashes(tmp_path, monkeypatch):
    """A maker of a run's hashes, in a package of its own copy and a working directory with pictures."""
    shutil.copytree(paths.PACKAGE, tmp_path / "upclose", ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    monkeypatch.setattr(programs, "PACKAGE", tmp_path / "upclose")
    monkeypatch.setenv("UPCLOSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for split in ("train", "validation", "test"):
        trees.folders(tmp_path / "mine" / split, ["owl"], 1)
    file = tmp_path / "small.ipynb"

    def make(body="from upclose.methods import wca\n", cell=CELL, **values):
        cells = [nbformat.v4.new_code_cell(cell, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(body)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), file)
        for known in (identity._code, identity._data, programs.digest, programs._imported_by):
            known.cache_clear()
        found, missing = identity.ingredients(
            params.Job("small", file, {"dataset": "imagefolder:mine", "split": "test"} | values)
        )
        assert not missing
        return found

    return make


def add(file, text):
    with file.open("a") as opened:
        opened.write(text)


def test_what_a_run_does_not_use_is_not_in_its_hash(hashes, tmp_path):
    before = hashes()
    add(tmp_path / "upclose" / "methods" / "fair.py", "\nMORE = 1\n")  # not imported
    add(tmp_path / "upclose" / "cli.py", "\nMORE = 1\n")
    add(tmp_path / "upclose" / "methods" / "wca.py", "\n# a remark\n")
    wca = tmp_path / "upclose" / "methods" / "wca.py"
    wca.write_text(wca.read_text().replace('"""', '"""Well: ', 1))
    fetched = tmp_path / "cache" / "prompts" / "o--r" / "0000000000" / "x.json"
    fetched.parent.mkdir(parents=True)
    fetched.write_text("{}")
    assert hashes() == before
    assert hashes("from upclose.methods import wca  # WCA\n", CELL.replace("which", "whose")) == before


def test_what_a_run_uses_is_in_its_hash(hashes, tmp_path):
    before = hashes()
    assert hashes("from upclose.methods import wca\nprint(1)\n")["notebook"] != before["notebook"]
    add(tmp_path / "upclose" / "features.py", "\nMORE = 1\n")  # wca imports it
    after = hashes()
    assert {key for key in after if after[key] != before[key]} == {"code"}


def test_data_of_every_split_that_the_notebook_names_count(hashes, tmp_path):
    body = 'held = "validation"\nsplits = [split, held, "train"]\n%matplotlib inline\n'
    before = hashes(body)
    assert {"data", "data (train)", "data (validation)"} <= set(before)
    assert "data (train)" not in hashes()
    trees.picture(tmp_path / "mine" / "train" / "owl" / "more.jpg")
    after = hashes(body)
    assert {key for key in after if after[key] != before[key]} == {"data (train)"}


def test_sentences_of_the_runs_data_set_count_and_no_others(tmp_path, monkeypatch):
    before = {name: prompts.identity(name) for name in ("birdlets", "cub", "dtd")}
    shutil.copytree(paths.PUBLISHED, tmp_path / "published")
    monkeypatch.setattr(paths, "PUBLISHED", tmp_path / "published")
    file = tmp_path / "published" / "templates.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"dtd": ["a {}."]}))
    assert {name for name in before if prompts.identity(name) != before[name]} == {"dtd"}
    add(tmp_path / "published" / "words.txt", "more")
    assert {name for name in before if prompts.identity(name) != before[name]} == {"birdlets", "cub", "dtd"}


def test_a_notebook_imports_nothing_of_the_office():
    cells = json.loads((paths.NOTEBOOKS / "00_start_here.ipynb").read_text())["cells"]
    code = tuple("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    found = set(programs.used("\n".join(identity._python(code))))
    assert not {"upclose.run", "upclose.params", "upclose.cli", "upclose.doctor"} & found
    assert {"upclose.datasets.loading", "upclose.birdlets.pictures", "upclose.methods.clip"} <= found
