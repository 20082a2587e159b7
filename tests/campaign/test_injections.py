"""Text that would command a browser, a shell, Python or LaTeX: in names, sentences and parameters it stays text."""

import csv
import json
import warnings
from html.parser import HTMLParser
from urllib.parse import unquote

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
import yaml
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from PIL import Image

from bank_world import PLAN, FakeDataset, FakeEncoder
from tally import Tally, tree
from test_bank_faults import one_thread  # noqa: F401
from upclose import bank, claims, cli, datasets, explorer, metrics, params, paths, plots, prompts, record, report

MARK = "touched"
PAYLOADS = [  # 12, each into 5 kinds of places
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</td></table></script><iframe src=javascript:alert(1)>",
    "javascript:alert(1)//';alert(1);",
    r"$\input{/etc/passwd}$ \write18{touch touched}",
    "$x [a](javascript:alert(1)) ![b](http://x/y.png) $",
    f"$(touch {MARK}); `touch {MARK}`| touch {MARK}",
    '"+__import__("os").system("touch touched")+"',
    "{0.__class__.__mro__} %s %(x)s {name!r}",
    "=cmd|' /C calc'!A0",
    f"../../../{MARK}",
    "\x1b]0;owned\x07\x1b[2J two\nlines\\",
]

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Skeleton(HTMLParser):
    """The elements of a page with the names of their attributes; nothing may be called or fetched from elsewhere."""

    def __init__(self, page):
        super().__init__()
        self.elements = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, [name for name, _ in attrs]))
        for name, value in attrs:
            assert not name.startswith("on")
            assert name not in ("href", "src") or value.startswith("#") or ":" not in value.split("/")[0]


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name in ("RESULTS", "BANK", "CACHE", "DATA"):
        monkeypatch.setenv(f"UPCLOSE_{name}", str(tmp_path / name.lower()))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def campaign(name, place, attempt):
    """`attempt(payload, folder)` uses a payload in a folder of its own and asserts that it stays text."""
    tally = Tally(f"injections into {name}")
    for k, payload in enumerate(PAYLOADS):
        folder = place / str(k)
        folder.mkdir()
        before = tree(place)
        try:
            attempt(payload, folder)
            strays = [path for path in tree(place) if path not in before and not path.is_relative_to(folder)]
            outcome = f"written: {strays}" if strays else "harmless"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"[:500]
        tally.add(payload, outcome)
        plt.close("all")
    assert not any(path.is_file() for path in place.rglob(MARK))
    tally.close(len(PAYLOADS))


def named(payload):
    """A payload as a file's name may hold it."""
    return payload.replace("/", "\u2215").lstrip(".")


def script(file):
    """The values that one of the explorer's scripts passes on."""
    content = file.read_text()
    assert "<" not in content
    return json.loads("[" + content.partition("(")[2].rpartition(");")[0] + "]")


def draw(text):
    figure, axes = plt.subplots(1, 2)
    plots.picture(axes[0], np.zeros((3, 8, 8), np.uint8), {text: (0, 0, 4, 4)}, title=text)
    plots.plan(axes[1], np.eye(2), [text, "b"], ["a", text], title=text)
    figure.canvas.draw()
    return figure


def complete(folder, name, text):
    """A complete run of this name whose metrics, claims and figures hold a text."""
    run = folder / "2026-01-01" / name
    (run / "figures").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UPCLOSE_RUN", str(run))
        hits = torch.arange(9) > 3
        rows = [metrics.row(method, hits, dataset=text, backbone="x") for method in (text, "b")]
        record.metrics(rows)
        record.claims([claims.check("C1", text, hits, ~hits)])
        record.facts(note=text)
    Image.new("RGB", (4, 4)).save(run / "figures" / f"{named(text)}.png")
    facts = json.loads((run / "facts.json").read_text())
    assert facts == {"note": text}
    (run / "facts.json").unlink()
    facts |= {"notebook": "small.ipynb", "commit": text, "dirty": False, "seconds": 1, "peak_memory_bytes": 1}
    paths.write(run / "run.json", paths.seal(facts | {"files": paths.checksums(run)}))
    for file in ("metrics.csv", "claims.csv"):
        with (run / file).open(newline="") as opened:
            for row in csv.reader(opened):
                assert all(cell[:1] not in ("=", "@") and cell.isprintable() for cell in row)
    return run


def page(folder):
    return report.write(folder / "2026-01-01").read_text()


def test_class_names(place):
    def attempt(payload, folder):
        assert prompts.load("clip", "x", "test", [payload, "b"])[payload] == [f"a photo of a {payload}."]
        assert all(payload in row for row in prompts.load("waffle", "x", "test", [payload, "b"])[payload])
        draw(payload)
        facts = {"classes": [{"name": payload}, {"name": "b"}], "why": payload}
        explorer.write(folder / "page", [explorer.Case("a", torch.zeros(3, 4, 4, dtype=torch.uint8), facts)])
        assert script(folder / "page" / "data" / "a.js")[1]["classes"][0]["name"] == payload
        assert payload in script(folder / "page" / "data" / "index.js")[0]["pictures"][0]["alt"]
        data = FakeDataset(8)
        data.name, data.class_names = payload, [payload, "b", "c"]
        held = bank.build(data, FakeEncoder(), PLAN, folder / "bank", shard=8)
        assert held.folder.path.startswith(f"{folder}/bank/")
        complete(folder, "small-0123456789", payload)
        complete(folder / "plain", "small-0123456789", "plain")
        assert Skeleton(page(folder)).elements == Skeleton(page(folder / "plain")).elements

    campaign("class names", place, attempt)


def test_file_names(place, capsys):
    def attempt(payload, folder):
        name = named(payload)
        for label in (name, "other"):
            (folder / "data" / label).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "data" / label / f"{name}.png")
        (folder / "data" / "other" / f"{name}2.png").write_bytes(b"no picture")
        data = datasets.load(f"imagefolder:{folder / 'data'}")
        assert len(data) == 3
        assert len(data.class_names) == 2
        held = bank.build(data, FakeEncoder(), PLAN, folder / "bank", on_error="skip", shard=8)
        assert [row["key"] for row in held.errors] == [f"other/{name}2.png"]
        assert cli.main(["bank", "build", f"imagefolder:{folder / 'data'}", "--root", str(folder / "bank2")]) == 2
        assert cli.main(["bank", "ls", "--root", str(folder / "bank")]) == 0
        said = capsys.readouterr()
        assert (said.out + said.err).replace("\n", "").replace("\r", "").isprintable()

    campaign("file names", place, attempt)


def test_descriptions(place):
    def attempt(payload, folder):
        file = folder / "own.json"
        file.write_text(json.dumps({"a tern": [payload, "a beak"]}))
        for source in ("clip-d", "lazsl", "dnd", "cupl"):
            (rows,) = prompts.load(source, "x", "test", ["a tern"], file=file).values()
            assert all(row.isprintable() and "a photo" not in row[1:].replace("a photo of", "", 1) for row in rows)
            assert any("a beak" in row for row in rows)
        facts = {"classes": [{"name": "a tern", "sentence": [payload]}], "why": payload}
        explorer.write(folder / "page", [explorer.Case("a", torch.zeros(3, 4, 4, dtype=torch.uint8), facts)])
        assert script(folder / "page" / "data" / "a.js")[1]["classes"][0]["sentence"] == [payload]
        draw(payload)

    campaign("descriptions", place, attempt)


@pytest.fixture
def notebook(place, monkeypatch):
    """A notebook with a parameter of text."""
    (place / "notebooks").mkdir()
    monkeypatch.setattr(paths, "NOTEBOOKS", place / "notebooks")
    cell = 'setting: str = "x"  # any text\nimages: int = 20  # how many\n'
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell, metadata={"tags": ["parameters"]})],
        metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}},
    )
    nbformat.write(book, place / "notebooks" / "small.ipynb")
    return load_notebook_node(str(place / "notebooks" / "small.ipynb"))


def test_parameters(place, notebook):
    def attempt(payload, folder):
        file = folder / "small.yaml"
        file.write_text(yaml.safe_dump({"notebook": "small", "grid": {"setting": [payload, "b"]}}))
        job, other = params.jobs(file)
        assert (job.values, other.values["setting"]) == ({"setting": payload, "images": 20}, "b")
        assert yaml.safe_load(yaml.safe_dump(job.values)) == job.values
        scope = {}
        for cell in parameterize_notebook(notebook, job.values).cells:
            exec(cell["source"], scope)
        assert scope["setting"] == payload
        assert (folder / job.name).parent == folder
        assert not job.name.startswith((".", "-"))

    campaign("parameters", place, attempt)


def test_run_names(place, notebook):
    def attempt(payload, folder):
        file = folder / f"{named(payload)}.yaml"
        file.write_text("notebook: small\n")
        (job,) = params.jobs(file)
        assert job.name.isprintable()
        assert (folder / job.name).parent == folder
        for where, name in (("made", job.name), ("renamed", named(payload)), ("plain", "plain")):
            complete(folder / where, name, "plain")
        found = [Skeleton(page(folder / where)).elements for where in ("made", "renamed", "plain")]
        assert found[0] == found[1] == found[2]
        link = page(folder / "renamed").split('href="')
        assert any(unquote(part.split('"')[0]) == f"{named(payload)}/params.yaml" for part in link)
        report.refresh(folder / "renamed")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(report.collect(folder / "renamed")) == 2
        report.tables(report.collect(folder / "renamed"), folder / "tables")

    campaign("run names", place, attempt)


def test_links_that_lead_out_are_not_followed(place, notebook):
    (place / "elsewhere.ipynb").write_text((place / "notebooks" / "small.ipynb").read_text())
    (place / "notebooks" / "linked.ipynb").symlink_to(place / "elsewhere.ipynb")
    (place / "notebooks" / "up").symlink_to(place)
    for k, name in enumerate(("linked", "up/elsewhere", "../elsewhere", str(place / "elsewhere"))):
        (place / f"{k}.yaml").write_text(f"notebook: {name}\n")
        with pytest.raises(params.ParameterError, match="is not in"):
            params.jobs(place / f"{k}.yaml")
