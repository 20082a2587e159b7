"""The book: what its hooks do to docstrings and notebooks, and a build where the extra `site` is installed."""

import importlib.util
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from upclose import costs, doctor, explorer, paths

pytest.importorskip("sphinx", reason="the extra `site` is not installed")
pytest.importorskip("myst_nb", reason="the extra `site` is not installed")
bs4 = pytest.importorskip("bs4", reason="the extra `site` is not installed")
PAGES = ("index", "00_start_here", "02_lazsl", "guide", "pages/what_holds", "generated/lgca", "reference/upclose.crops")
PAGES += ("pages/reproduce_a_table",)


@pytest.fixture(scope="module")
def conf():
    spec = importlib.util.spec_from_file_location("conf", paths.NOTEBOOKS / "conf.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_source_and_deviates_are_fields_and_legends_keep_their_columns(conf):
    lines = ["A method.", "", "    f  (B, D)  image", "    y  (C, D)  label", "", "Source: a paper,", "eq. 4."]
    conf.docstring(None, "module", "upclose.transport", None, None, lines)
    text = "\n".join(lines)
    assert "::\n\n    f  (B, D)  image\n    y  (C, D)  label" in text
    assert ":Source: a paper, eq. 4." in text


def test_a_list_stands_alone(conf):
    lines = ["It is silent about", "- alpha: 0.9,", "  which is large;", "- beta.", "As there."]
    assert conf._lists(lines) == [
        "It is silent about", "", "- alpha: 0.9,", "  which is large;", "- beta.", "", "As there.",
    ]  # fmt: skip


def test_a_notebook_with_an_error_in_its_outputs_stops_the_build(conf, tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    error = {"output_type": "error", "ename": "ValueError"}
    (tmp_path / "notebooks" / "bad.ipynb").write_text(json.dumps({"cells": [{}, {"outputs": [error]}]}))
    monkeypatch.setattr(conf, "ROOT", tmp_path)
    with pytest.raises(conf.ExtensionError, match=r"bad\.ipynb, cell 1: its output is an error, ValueError"):
        conf.check_outputs(SimpleNamespace())


def test_the_prices_of_all_tables_name_the_constants_they_rest_on(conf, tmp_path):
    (tmp_path / "generated").mkdir()
    conf.prices(SimpleNamespace(srcdir=tmp_path))
    page = (tmp_path / "generated" / "prices.md").read_text()
    assert page.startswith("Estimates, not measurements. A card: 100 TFLOP/s")
    assert "20.3 crops a second of ViT-B/32" in page
    assert re.findall(r"<tr>\s*<td>.*</td>\s*<td>(.*)</td>", page) == [*doctor.sheets()]
    lare = page.split("<td>lare-table2</td>")[1].split("</tr>")[0]
    each = 60_000 * costs.gflops(costs.Backbone("coca_ViT-L-14", "laion2b_s13b_b90k")) / 3600
    assert f"<td>{each / (20.3 * 8.82):.0f}</td>" in lare
    assert "<td>&lt; 0.1</td>" in lare


@pytest.mark.parametrize(
    ("known", "remote", "expected"),
    [
        ("a/b", "", "https://github.com/a/b"),
        ("", "https://github.com/a-1/b.c.git\n", "https://github.com/a-1/b.c"),
        ("", "git@github.com:a/b.git", "https://github.com/a/b"),
        ("", "/srv/git/upclose.git", ""),
        ("", "https://example.org/a/b", ""),
        ("", "https://github.com/a/b'; rm -r x", ""),
        ("", "", ""),
    ],
)
def test_the_public_address_is_githubs_or_none(conf, known, remote, expected):
    assert conf.address(known, remote) == expected


@pytest.mark.slow
def test_colabs_line_makes_a_notebook_run(conf, tmp_path):
    """The line as it is, with a local repository, pip installing without its dependencies."""
    assert conf.colab("https://github.com/a/b") == (
        "!git clone --depth 1 https://github.com/a/b && pip install -q -e './b[notebooks]'"
    )
    line = conf.colab(f"file://{paths.ROOT}").removeprefix("!")
    pip = f"{sys.executable} -m pip install --no-deps --no-build-isolation --target {tmp_path}/installed"
    line = line.replace("pip install -q", pip).replace("-e ", "")
    subprocess.run(line, shell=True, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "installed" / "upclose" / "__init__.py").is_file()
    assert (tmp_path / paths.ROOT.name / "notebooks" / "00_start_here.ipynb").is_file()


@pytest.fixture(scope="module")
def deck():
    spec = importlib.util.spec_from_file_location("deck", paths.NOTEBOOKS / "slides.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_a_slide_is_a_section_with_its_equation_and_its_first_figure(deck):
    cells = [
        {"cell_type": "markdown", "source": "# T\n\nOne. Two."},
        {"cell_type": "markdown", "source": "Before.\n\n## 1. A <b>\n\nWhy $x<y$ *so*.\n\n$$ s = 1 $$"},
        {"cell_type": "code", "source": "", "outputs": [{"data": {}}, {"data": {"image/png": "AAA"}}]},
        {"cell_type": "code", "source": "", "outputs": [{"data": {"image/png": "CCC"}}]},
        {"cell_type": "markdown", "source": "## Exercises\n\n1. Do."},
    ]  # fmt: skip
    assert deck.kinds(cells) == ["slide", "slide", "-", "skip", "skip"]
    cells = [c | {"metadata": {"slideshow": {"slide_type": k}}} for c, k in zip(cells, deck.kinds(cells))]
    first, second = deck.slides(cells)
    assert first == ("T", "One. Two.", "")
    assert second == ("1. A <b>", "Why $x<y$ *so*.\n\n$$ s = 1 $$", "data:image/png;base64,AAA")
    page = deck.page("n", cells)
    assert "1. A &lt;b&gt;" in page
    assert "$x&lt;y$ <em>so</em>" in page


@pytest.mark.parametrize("path", sorted(paths.NOTEBOOKS.glob("0*.ipynb")), ids=lambda p: p.stem)
def test_a_notebooks_slides_are_few_and_tagged(deck, path):
    cells = json.loads(path.read_text())["cells"]
    kinds = [cell["metadata"].get("slideshow", {}).get("slide_type") for cell in cells]
    assert kinds == deck.kinds(cells), "its cells have changed: run `python notebooks/slides.py --tag`"
    assert 5 <= kinds.count("slide") <= 15


def test_a_long_text_ends_with_a_sentence(deck):
    text = " ".join(f"Sentence {k} has five words." for k in range(40))
    short = deck.shorten(text)
    assert short.endswith("words.")
    assert len(short.split()) <= deck.WORDS


@pytest.mark.browser
@pytest.mark.parametrize(("width", "height"), [(1280, 720), (390, 844)])
def test_slides_fit_the_screen(browser, deck, tmp_path, width, height):
    deck.main(tmp_path)
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for file in sorted(tmp_path.glob("*.html")):
        browser.get(file.as_uri())
        sizes = browser.execute_script(
            "return [...document.querySelectorAll('section')].map((s) => [s.scrollHeight, s.clientHeight])"
        )
        assert 5 <= len(sizes) <= deck.MOST, file.name
        assert all(needed <= there + 1 for needed, there in sizes), (file.name, sizes)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.browser
def test_a_slide_passes_axe(complaints, deck, tmp_path):
    deck.main(tmp_path)
    assert not complaints((tmp_path / "02_lazsl.html").as_uri())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", out.parent / "trees", "-b", "html"]
    done = subprocess.run([*command, paths.NOTEBOOKS, out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def test_the_book_is_whole_small_and_asks_no_other_host(site):
    assert all((site / f"{page}.html").is_file() for page in (*PAGES, "search"))
    asked = re.compile(
        r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"https?://(?!arxiv)[^\"]+\.(?:js|css|woff2?|png)"
    )
    assert not [page.name for page in site.rglob("*.html") if asked.search(page.read_text(encoding="utf-8"))]
    assert sum(file.stat().st_size for file in site.rglob("*") if file.is_file()) < 60 * 2**20
    page = (site / "02_lazsl.html").read_text(encoding="utf-8")
    needed = set(re.findall(r'(?:src|href)="([^":#?]+\.(?:png|jpg|css|js|woff2))', (site / "index.html").read_text()))
    assert sum((site / name).stat().st_size for name in needed if (site / name).is_file()) < 3 * 2**19
    assert not re.search(r'<img[^>]*alt=""', page.split("<article")[1])


def test_every_notebook_links_each_term_of_the_glossary_where_it_is_first_used(site):
    def read(page):
        return bs4.BeautifulSoup((site / page).read_text(encoding="utf-8"), "html.parser")

    label = {term.find(string=True).strip(): term["id"] for term in read("guide.html").select("dl.glossary dt")}
    word = re.compile(rf"(?<![\w-])({'|'.join(sorted(label, key=len, reverse=True))})s?\b", re.IGNORECASE)
    used = set()
    for path in paths.NOTEBOOKS.rglob("*.ipynb"):
        name, first = path.relative_to(paths.NOTEBOOKS).with_suffix(".html").as_posix(), {}
        for text in read(name).select_one("article").find_all(string=word):
            link = text.find_parent("a")
            if not text.find_parent("p") or text.find_parent(["code", "pre"]) or text.find_parent(class_="math"):
                continue
            if link and "#term-" not in link["href"]:
                continue
            for match in word.finditer(text):
                first.setdefault(match[1].lower(), (link and link["href"].rpartition("guide.html#")[2], text))
        assert not {term: text for term, (to, text) in first.items() if to != label[term]}, name
        used |= {*first}
    assert used == {*label}


def test_the_explorers_stops_lead_to_sections_of_the_book(site):
    for *_, link in explorer.STOPS:
        page, _, section = link.partition("#")
        assert f'id="{section}"' in (site / page).read_text(encoding="utf-8")


@pytest.mark.browser
@pytest.mark.parametrize("page", PAGES)
def test_pages_pass_axe_and_fit_a_telephone(complaints, site, page):
    assert not complaints((site / f"{page}.html").as_uri())
