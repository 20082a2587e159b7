"""A method of ten lines and a notebook with a sheet: files are added, none is edited."""

import json
import os
import shutil
import subprocess
import sys

import nbformat
import pandas as pd
import pytest

from upclose import compare, doctor, methods, params, paths, plots

METHOD = '''"""Medoid: the crop that is most like the whole image speaks for it."""

from upclose.features import Text, Views
from upclose.methods.entry import Method


def scores(views: Views, text: Text):
    """The cosine of that crop with the mean description, (B, C)."""
    best = (views.crop @ views.image[..., None]).argmax(1)  # (B, 1)
    return views.crop.take_along_dim(best[..., None], 1)[:, 0] @ text.mean().mT


METHODS = (Method("Medoid", scores, ("crops", "descriptions"), "#123456"),)
'''
PARAMETERS = """dataset: str = "birdlets"  # the registry's name
backbone: str = "birdlets-tiny"  # or any open_clip name
pretrained: str = ""  # open_clip's tag
table: str = "Table 1"  # of the paper
methods: list[str] = ["CLIP-D", "Medoid"]  # rows of it
source: str = "clip-d"  # of the descriptions
images: int = 24  # that are scored
crops: int = 2  # an image
sharpness: float = 1.0  # a name that no other notebook has"""
BODY = """import matplotlib.pyplot as plt

from upclose import bank, claims, datasets, encode, metrics, plots, prompts, record
from upclose.features import Plan, Text
from upclose.methods import REGISTRY

encoder, data = encode.load(backbone, pretrained or None), datasets.load(dataset, "test", limit=images)
record.facts(encoder=encoder, dataset=data)
said = prompts.load(source, dataset, "test", data.class_names)
label = encoder.encode_text([f"a photo of a {name}." for name in data.class_names])
text = Text.from_lists(label, [encoder.encode_text(said[name]) for name in data.class_names])
views, truth, index = bank.build(data, encoder, Plan(n=crops)).read()
hits = {name: metrics.correct(REGISTRY[name].function(views, text), truth) for name in methods}
facts = dict(dataset=dataset, backbone=backbone, paper="MEDOID", table=table)
record.metrics([metrics.row(name, hit, **facts) for name, hit in hits.items()])
record.claims([claims.check("C1", "it beats CLIP-D", hits["Medoid"], hits["CLIP-D"])])
figure, ax = plt.subplots()
ax.bar(list(hits), [hit.double().mean() for hit in hits.values()], color=[plots.colour(name) for name in hits])
record.figure(figure, "accuracy")
"""
SHEET = """notebook: 08_medoid
reproduces: Medoid on Birdlets
about:
  paper: MEDOID
  takes:
    methods: {among: [CLIP-D, Medoid]}
    table: {among: [Table 1]}
"""
PAPER = """# upclose run params/papers/medoid-table1.yaml -p device=cuda
notebook: 08_medoid
reproduces: MEDOID Table 1
parameters: {table: Table 1, backbone: ViT-B-32-quickgelu, pretrained: openai, methods: [CLIP-D, Medoid], crops: 9}
grid: {dataset: [dtd, oxford-pets]}
"""
PRINTED = """paper,table,method,dataset,backbone,setting,metric,value,std,title,note
MEDOID,Table 1,CLIP-D,dtd,ViT-B/32,zero-shot,top1,45.0,,DTD,
MEDOID,Table 1,Medoid,dtd,ViT-B/32,zero-shot,top1,47.0,,DTD,
MEDOID,Table 1,Medoid,birdlets,birdlets-tiny,zero-shot,top1,20.0,,Birdlets,
"""


def notebook(path):
    tagged = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    book = nbformat.v4.new_notebook(cells=[tagged, nbformat.v4.new_code_cell(BODY)], metadata=kernel)
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, path)


def sheets(folder):
    for name, text in (("birdlets/08_medoid", SHEET), ("papers/medoid-table1", PAPER)):
        file = folder / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return file


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The new files on the places where the package looks; gives the paper's sheet."""
    (tmp_path / "medoid.py").write_text(METHOD)
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "medoid.csv").write_text(PRINTED)
    for kept in ("backbones.csv", "cited.txt"):
        shutil.copy(paths.PUBLISHED / kept, tmp_path / "published")
    notebook(tmp_path / "notebooks" / "08_medoid.ipynb")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    monkeypatch.setattr(compare, "PUBLISHED", tmp_path / "published")
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(paths, "PARAMS", tmp_path / "params")
    caches = (methods._collect, compare.papers)
    for cached in caches:
        cached.cache_clear()
    yield sheets(tmp_path / "params")
    sys.modules.pop("upclose.methods.medoid", None)
    for cached in caches:
        cached.cache_clear()


def test_registry_figures_parameters_tables_and_doctor_know_it(added):
    assert methods.find("Medoid (N=9)") is methods.get("Medoid")
    assert plots.colour("Medoid") == "#123456"
    jobs = params.jobs(added)
    assert [job.values["dataset"] for job in jobs] == ["dtd", "oxford-pets"]
    with pytest.raises(params.ParameterError, match="'CLIP-D' or 'Medoid'"):
        params.check(jobs[0].notebook, {"methods": ["medoids"]})
    with pytest.raises(params.ParameterError, match="sharpness"):
        params.check(jobs[0].notebook, {"sharpness": -1.0})
    (line,) = doctor.paper_tables(100.0)
    assert line["encodings"] == (1880 + 3669) * (9 + 1)
    assert list(line["needs"]["prompts"]) == ["clip-d of dtd", "clip-d of oxford-pets"]
    assert compare.papers() == {"MEDOID": "medoid"}
    assert compare.account(doctor.covered()).account.tolist() == ["runnable", "runnable", ""]


@pytest.mark.slow
def test_in_a_copy_of_the_repository_every_command_takes_it(tmp_path):
    copy = tmp_path / "copy"
    leave = shutil.ignore_patterns("__pycache__", "*.ipynb", "results")
    for folder in ("lib", "params", "tests"):
        shutil.copytree(paths.ROOT / folder, copy / folder, ignore=leave)
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(paths.ROOT / file, copy / file)
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}
    (copy / "lib" / "upclose" / "methods" / "medoid.py").write_text(METHOD)
    (copy / "lib" / "upclose" / "published" / "medoid.csv").write_text(PRINTED)
    notebook(copy / "notebooks" / "08_medoid.ipynb")
    sheets(copy / "params")
    here = {"PYTHONPATH": str(copy / "lib"), "UPCLOSE_BANK": str(tmp_path / "bank")}
    here |= {"UPCLOSE_RESULTS": str(copy / "results"), "UPCLOSE_DATA": str(tmp_path / "data")}

    def call(*command):
        done = subprocess.run(command, cwd=copy, env=os.environ | here, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    call(sys.executable, "-m", "upclose.shipped")
    before.pop(copy / "lib" / "upclose" / "shipped.sha256")
    upclose = (sys.executable, "-m", "upclose.cli")
    binaries = os.path.dirname(sys.executable)
    assert "MEDOID Table 1: not ready" in call(*upclose, "doctor", "--tables")
    assert "done" in call(*upclose, "run", "params/birdlets/08_medoid.yaml")
    (run,) = (copy / "results").glob("*/08_medoid-*/run.json")
    assert set(json.loads(run.read_text())["files"]) >= {"metrics.csv", "claims.csv", "figures/accuracy.png"}
    page = (run.parents[1] / "index.html").read_text()
    assert "Medoid" in page
    assert "it beats CLIP-D" in page
    assert "MEDOID" in call(*upclose, "compare")
    table = pd.read_csv(copy / "results" / "compare" / "medoid.csv")
    assert table.ours.notna().sum() == 1
    call(os.path.join(binaries, "lint-imports"))
    call(os.path.join(binaries, "ruff"), "check", "lib", "notebooks")
    call(sys.executable, "-m", "pytest", "tests/methods/test_registry.py")
    assert all(file.read_bytes() == content for file, content in before.items() if "__pycache__" not in file.parts)


def test_what_is_added_is_ten_lines():
    assert len(list(filter(None, METHOD.splitlines()))) <= 10
