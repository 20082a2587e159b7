import errno
import json
import os
import re

import pandas as pd
import pytest
from PIL import Image

from upclose import compare, metrics, paths, report

FACTS = {"notebook": "01_lgca.ipynb", "commit": "c" * 40, "dirty": True, "seconds": 12.3, "peak_memory_bytes": 2**30}
METRICS = {"paper": "LGCA", "method": ["CLIP", "<b>WCA</b>"], "value": [25.6667, 30.0], "std": ["", 0.5], "n": 300}


@pytest.fixture
def day(tmp_path):
    """A day with one complete run, as it would stand in the repository."""
    run = tmp_path / "2026-01-02" / "01_lgca-0123456789"
    (run / "figures").mkdir(parents=True)
    Image.new("RGB", (300, 100)).save(run / "figures" / "wide_one.png")
    Image.new("RGB", (100, 100)).save(run / "figures" / "square.png")
    pd.DataFrame(METRICS | {"run": run.name}).to_csv(run / "metrics.csv", index=False)
    (run / "claims.csv").write_text(
        'claim,text,verdict,difference,margin,n\nC1,"<i>A</i> beats B",holds,"+2.0 [+1.0, +3.0]",0.0,9\n'
        'C2,C beats D,fails,"-2.0 [-3.0, -1.0]",0.0,9\nC3,E beats F,fails,"-2.0 [-3.0, -1.0]",0.0,9\n'
    )
    (run / "run.json").write_text(json.dumps(FACTS))
    return run.parent


def rows(page, which):
    """The cells of a table of the page, row by row."""
    table = page.split("<table>")[1 + which].split("</table>")[0]
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]


def test_the_first_table_has_a_row_a_run(day):
    (day / ".partial-02_lazsl-abc").mkdir()
    (day / "01_lgca-0123456789" / "params.yaml").write_text("backbone: RN50\n")
    page = report.write(day).read_text()
    link = '<a href="#01_lgca-0123456789">01_lgca-0123456789</a>'
    assert rows(page, 0) == [
        ["run", "notebook", "encoder", "status", "seconds", "holds", "fails", "equal", "undecided"],
        [link, "01_lgca", "RN50", "complete", "12", "1", "2", "0", "0"],
        ['<a href="#02_lazsl-abc">02_lazsl-abc</a>', "", "", "not complete", "", "", "", "", ""],
    ]


def test_claims_and_metrics_are_tables_and_escaped(day):
    page = report.write(day).read_text()
    claims, metrics = rows(page, 1), rows(page, 2)
    assert claims[1] == ["C1", "&lt;i&gt;A&lt;/i&gt; beats B", "holds", "+2.0 [+1.0, +3.0]", "0.0", "9"]
    assert metrics == [["method", "value", "std"], ["CLIP", "25.7", ""], ["&lt;b&gt;WCA&lt;/b&gt;", "30.0", "0.5"]]
    assert "2 measurements: paper LGCA, n 300" in page  # what is the same in all rows
    assert "<b>" not in page
    assert "<i>" not in page
    assert page.count('<td class="fails">') == 2


def test_every_link_of_a_page_exists_where_it_is_committed(day, monkeypatch):
    monkeypatch.setattr(paths, "NOTEBOOKS", day.parent / "notebooks")
    paths.NOTEBOOKS.mkdir()
    (paths.NOTEBOOKS / "01_lgca.ipynb").write_text("{}")
    (day / "01_lgca-0123456789" / "params.yaml").write_text("")
    page = report.write(day).read_text()
    links = re.findall(r'(?:href|src)="([^"]+)"', page)
    assert "../notebooks/01_lgca.ipynb" in links
    assert not [link for link in links if link.endswith("notebook.ipynb")]  # git does not keep the executed ones
    for link in links:
        assert f'id="{link[1:]}"' in page if link.startswith("#") else (day / link).resolve().exists(), link


def test_wide_figures_have_a_row_of_their_own(day):
    page = report.write(day).read_text()
    assert re.findall(r"<figure( class=.whole.)?>", page) == ["", ' class="whole"']  # square, wide one
    assert "<figcaption>wide one</figcaption>" in page


def test_pages_that_are_lacking_or_old_are_written_and_others_left(day):
    root, page = day.parent, day / "index.html"
    (root / "2026-01-03").mkdir()  # a day on which nothing was finished
    report.refresh(root)
    assert page.exists()
    assert not (root / "2026-01-03" / "index.html").exists()
    page.write_text(page.read_text() + "<!-- by hand -->")
    report.refresh(root)
    assert "by hand" in page.read_text()
    (day / "01_lgca-0123456789" / "run.json").write_text(json.dumps(FACTS | {"seconds": 99}))  # run again, by force
    report.refresh(root)
    assert "by hand" not in page.read_text()
    assert ">99<" in page.read_text()
    other = day / "02_lazsl-1"
    other.mkdir()
    (other / "run.json").write_text(json.dumps(FACTS))
    report.refresh(root)
    assert '<h2 id="02_lazsl-1">' in page.read_text()


def test_a_damaged_run_hides_no_other(day):
    for name, content in (("a-cut", "{"), ("b-list", "[]"), ("c-lacking", "{}")):
        (day / name).mkdir()
        (day / name / "run.json").write_text(content)
    (day / "d-folder" / "run.json").mkdir(parents=True)
    page = report.write(day).read_text()
    table = rows(page, 0)
    assert [row[3].split(":")[0] for row in table[1:]] == ["complete", *["damaged"] * 4]
    assert "C1" in page
    report.refresh(day.parent)


@pytest.mark.parametrize(
    ("what", "instead"), [('"dirty": false', '"dirty": true'), ('"files"', '"filed"'), ("12.5", "2.5")]
)
def test_a_fact_that_was_changed_is_named(tmp_path, what, instead):
    (tmp_path / "metrics.csv").write_text("value\n1\n")
    facts = {"dirty": False, "seconds": 12.5, "files": paths.checksums(tmp_path)}
    paths.write(tmp_path / "run.json", paths.seal(facts))
    assert paths.damage(tmp_path) == ""
    content = (tmp_path / "run.json").read_text()
    (tmp_path / "run.json").write_text(content.replace(what, instead))
    assert paths.damage(tmp_path) == "run.json is not what the run wrote"
    (tmp_path / "run.json").write_text("[" * 100_000)
    assert "cannot be read" in paths.damage(tmp_path)
    (tmp_path / "run.json").write_text('{"seconds": 12.5}')  # an earlier release's lists nothing
    assert paths.damage(tmp_path) == ""


MEASURED = ",".join(metrics.COLUMNS) + "\nLGCA,Table 1,CLIP,cub,ViT-B/32,zero-shot,top1,50.0,,10,fine\n"


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("metrics.csv", b"paper,table\nLGCA,Table 1\n", "metrics.csv has no column"),
        ("metrics.csv", MEASURED.replace("50.0", "fifty").encode(), "a value that is no number"),
        ("metrics.csv", MEASURED.replace("CLIP", "M\xf6we").encode("latin-1"), "utf-8"),
        ("metrics.csv", b"", "No columns"),
        ("metrics.csv", None, "Is a directory"),
        ("run.json", None, "run.json cannot be read"),
        ("run.json", b"[]", "run.json cannot be read"),
    ],
)
def test_what_cannot_be_read_of_an_old_run_is_named_and_hides_no_other(tmp_path, file, content, why):
    for name in ("fine", "damaged"):
        folder = tmp_path / "2026-01-01" / name
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(MEASURED)
        (folder / "run.json").write_text(json.dumps(FACTS))
    (folder / file).unlink()
    (folder / file).mkdir() if content is None else (folder / file).write_bytes(content)
    with pytest.warns(UserWarning, match=f"damaged is left out: .*{why}"):
        assert report.collect(tmp_path).method.tolist() == ["CLIP"]
    report.refresh(tmp_path)
    page = (tmp_path / "2026-01-01" / "index.html").read_text()
    assert "50.0" in page
    assert '<h2 id="damaged">' in page


def test_a_full_disk_leaves_the_old_tables_and_is_named(tmp_path, monkeypatch):
    measured = compare.published("LGCA").assign(n=100.0)
    file, _ = report.tables(measured, tmp_path)[:2]
    before = file.read_text()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{file}'"):
        report.tables(measured.assign(value=0.0), tmp_path)
    assert file.read_text() == before
    assert not list(tmp_path.glob("*.partial-*"))


def test_the_front_is_the_newest_complete_runs_own_figure(tmp_path):
    assert report.pareto(tmp_path) == []
    for date, content in (("2026-01-01", b"old"), ("2026-01-02", b"new"), ("2026-01-03", None)):
        run = tmp_path / date / "06_head_to_head"
        (run / "figures").mkdir(parents=True)
        (run / "run.json").write_text(json.dumps(FACTS))
        if content:
            (run / "figures" / "pareto.png").write_bytes(content)
    (file,) = report.pareto(tmp_path)
    assert file == tmp_path / "pareto.png"
    assert file.read_bytes() == b"new"
