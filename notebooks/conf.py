"""The book: `make site` builds it from the notebooks as they are committed, without running them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from docutils import nodes
from PIL import Image
from sphinx.errors import ExtensionError

ROOT = Path(__file__).resolve().parent.parent

project, author, language = "CLIP, up close", "the authors of upclose", "en"
copyright = "the authors of upclose, MIT licence"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.apidoc",
    "sphinx.ext.viewcode",
    "sphinx.ext.githubpages",
    "sphinxcontrib.bibtex",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["**.ipynb_checkpoints", "generated/prices.md"]  # which a page includes
bibtex_bibfiles = ["references.bib"]
nitpicky = False
default_role = "code"
suppress_warnings = ["ref.python"]  # a package shows what its modules define: one name, two places

apidoc_modules = [
    {
        "path": "../lib/upclose",
        "destination": "reference/",
        "separate_modules": True,
        "module_first": True,
        "automodule_options": {"members"},
    }
]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_use_ivar = True
napoleon_use_rtype = False

nb_execution_mode = "off"
nb_ipywidgets_js = {}  # nothing is asked of another host
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "dollarmath", "deflist"]
myst_heading_anchors = 3

html_theme = "sphinx_book_theme"
html_title = project
html_copy_source = False
html_show_sphinx = False
html_static_path = ["_static"]
templates_path = ["_templates"]
html_sidebars = {"**": ["home.html", "search-button-field.html", "sbt-sidebar-nav.html"]}
html_css_files = ["book.css"]
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "home_page_in_toc": True,
    "navbar_persistent": [],
}


def address(known: str, remote: str) -> str:
    """The repository's public address on GitHub, "" where none is known.

    Args:
        known: owner/name, as GitHub's workflows say it in GITHUB_REPOSITORY
        remote: the URL of git's remote "origin"
    """
    match = re.fullmatch(r"(?:https://|git@|ssh://git@)github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?", remote.strip())
    name = known or (match[1] if match else "")
    return f"https://github.com/{name}" if name else ""


def colab(public: str) -> str:
    """The line that makes Colab ready for a notebook: the library is installed where the notebooks lie."""
    folder = public.rsplit("/", 1)[1]
    return f"!git clone --depth 1 {public} && pip install -q -e './{folder}[notebooks]'"


PUBLIC = address(
    os.environ.get("GITHUB_REPOSITORY", ""),
    subprocess.run(["git", "-C", ROOT, "remote", "get-url", "origin"], capture_output=True, text=True).stdout,
)
if PUBLIC:  # buttons that open a notebook on Binder (environment.yml) or Colab
    html_theme_options |= {
        "repository_url": PUBLIC,
        "repository_branch": os.environ.get("GITHUB_REF_NAME", "main"),
        "path_to_docs": "notebooks",
        "launch_buttons": {
            "binderhub_url": "https://mybinder.org",
            "colab_url": "https://colab.research.google.com",
            "notebook_interface": "jupyterlab",
        },
    }


def notebooks() -> list[Path]:
    """The notebooks of the book."""
    return sorted(p for p in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def check_outputs(app) -> None:
    """Stop where a committed notebook was not run to its end or holds an error."""
    for path in notebooks():
        for place, cell in enumerate(json.loads(path.read_text())["cells"]):
            for output in cell.get("outputs", []):
                if output["output_type"] == "error":
                    name = path.relative_to(ROOT)
                    raise ExtensionError(
                        f"{name}, cell {place}: its output is an error, {output['ename']}; run it again"
                    )


def tables(app) -> None:
    """Write the pages of the papers' tables, with ours beside, and of the days that have results."""
    from upclose import compare, report

    folder = Path(app.srcdir) / "generated"
    folder.mkdir(exist_ok=True)
    measured = report.collect(ROOT / "results")
    for paper, name in compare.papers().items():
        parts = [f"# {paper}: paper versus ours\n"]
        for table, lines in compare.versus(measured, paper).groupby("table", sort=False):
            status = ", ".join(f"{n} {kind}" for kind, n in lines.status.value_counts().items())
            title = f"{lines.title.iloc[0]}. " if lines.title.nunique() == 1 else ""
            parts += [f"## {table}\n", f"{title}{len(lines)} values: {status}.\n", _html(lines)]
        (folder / f"{name}.md").write_text("\n".join(parts), encoding="utf-8")
    days = sorted((p.parent for p in (ROOT / "results").glob("*/index.html")), reverse=True)
    rows = [
        f'<li><a href="../results/{d.name}/index.html">{d.name}</a>: '
        f"{', '.join(sorted(run.name.rsplit('-', 1)[0] for run in d.iterdir() if (run / 'run.json').exists()))}</li>"
        for d in days
    ]
    (folder / "days.html").write_text(f"<ul>{''.join(rows)}</ul>\n", encoding="utf-8")


def pareto(app) -> None:
    """Write the recorded figure of accuracy by encodings for the start page, in 64 colours."""
    with Image.open(ROOT / "results" / "pareto.png") as picture:
        picture.convert("RGB").quantize(64).save(Path(app.srcdir) / "generated" / "pareto.png")


CARD = 100_000  # GFLOP/s, assumed: a third of the 312 TFLOP/s (bf16) in an A100's data sheet
CORES = 20.3  # crops a second of ViT-B/32 in float32, measured on two cores: results/benchmarks.md


def prices(app) -> None:
    """Write the table of what every published table costs, reckoned from its parameter file."""
    import pandas as pd

    from upclose import costs, doctor

    cores = CORES * costs.gflops(costs.Backbone("ViT-B-32-quickgelu", "openai"))
    rows = [
        {
            "table": line["reproduces"],
            "upclose reproduce": line["file"],
            "runs": line["runs"],
            "encodings, millions": f"{line['encodings'] / 1e6:,.2f}",
            "banks, GiB": f"{line['disk_gib']:,.1f}",
            "hours on a card": _hours(line["hours"] / CARD),
            "hours on two cores": _hours(line["hours"] / cores),
        }
        for line in doctor.paper_tables(1.0)
    ]
    page = pd.DataFrame(rows).to_html(index=False, escape=True, border=0)
    said = (
        f"Estimates, not measurements. A card: {CARD / 1000:.0f} TFLOP/s, a third of the 312 (bf16, dense) of an A100's "
        f"data sheet, an assumption. Two cores: {cores:.0f} GFLOP/s, from {CORES} crops a second of ViT-B/32 in float32, "
        "measured ([benchmarks](../pages/results.md))."
    )
    (Path(app.srcdir) / "generated" / "prices.md").write_text(
        f"{said}\n\n```{{raw}} html\n<div class='wide' tabindex='0'>{page}</div>\n```\n", encoding="utf-8"
    )


def _hours(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}" if number >= 0.1 else "< 0.1"


def _html(lines) -> str:
    """A published table as HTML: a row a method, a column a data set, ours below the paper's value where there is one."""
    said = [
        f"{line.value:g}" if line.ours != line.ours else f"{line.value:g} (ours {line.ours:.1f}: {line.status})"
        for line in lines.itertuples()
    ]
    rows = [c for c in ("method", "backbone", "setting", "metric") if lines[c].nunique() > 1] or ["method"]
    wide = lines.assign(said=said).pivot_table(
        index=rows, columns="dataset", values="said", aggfunc=" / ".join, sort=False, fill_value=""
    )
    page = wide.reset_index().rename_axis(columns=None).to_html(index=False, escape=True, border=0)
    return f"```{{raw}} html\n<div class='wide' tabindex='0'>{page}</div>\n```\n"


def docstring(app, what, name, obj, options, lines) -> None:
    """Docstrings are written to be read in an editor: make of them what Sphinx reads.

    A legend (an indented block of a module's docstring) keeps its columns; `Source:` and `Deviates:` are fields; each
    method names the notebook that shows it.
    """
    if what == "data" and lines and (type(obj).__doc__ or "").startswith(lines[0]):
        lines.clear()  # a variable without a docstring has its type's
    lines[:] = _lists(lines)
    if what == "module":
        lines[:] = _legends(lines)
        paper = name.removeprefix("upclose.methods.")
        shown = [
            p.stem
            for p in notebooks()
            if f"methods.{paper}" in p.read_text() or re.search(rf"methods import [^\\]*\b{paper}\b", p.read_text())
        ]
        main = [stem for stem in shown if stem[0].isdigit() and (ROOT / "notebooks" / f"{stem}.ipynb").exists()]
        if paper != name and main:
            lines += ["", "Shown in " + ", ".join(f":doc:`/{stem}`" for stem in dict.fromkeys(main)) + ".", ""]
    text = "\n".join(lines).replace("|", r"\|") if what != "module" else "\n".join(lines)
    text = re.sub(
        r"^(Source|Deviates): +(\S.*(?:\n[ ]*\S.*)*?)(?=\n\s*\n|\n(?:Source|Deviates):|\Z)",
        _field,
        text,
        flags=re.MULTILINE,
    )
    lines[:] = text.split("\n")


def _field(match: re.Match) -> str:
    return f"\n:{match[1]}: " + " ".join(match[2].split()) + "\n"


def _lists(lines: list[str]) -> list[str]:
    """The lines with an empty one before and after every list, which reStructuredText asks for."""
    out: list[str] = []
    inside = None  # the indent of the list that is being read
    for line in lines:
        indent = len(line) - len(line.lstrip())
        item = line.lstrip().startswith("- ")
        if item and inside is None and out and out[-1].strip():
            out.append("")
        if not item and inside is not None and line.strip() and indent <= inside:
            out += [""] if out[-1].strip() else []
            inside = None
        if item and (inside is None or indent <= inside):
            inside = indent
        out.append(line)
    return out


def _legends(lines: list[str]) -> list[str]:
    """The lines with every block that is indented by four made a literal one."""
    out: list[str] = []
    for line, before in zip(lines, ["", *lines]):
        if line.startswith("    ") and not before.strip():
            out += ["::", ""]
        out.append(line)
    return out


def times(app, doctree) -> None:
    """Say below a notebook's title how long its last recorded run took, and what Colab needs first."""
    if not str(app.env.doc2path(app.env.docname)).endswith(".ipynb"):
        return
    if PUBLIC:
        line = nodes.literal("", colab(PUBLIC))
        _below_title(
            doctree, nodes.paragraph("", "", nodes.Text("On Colab, run this in a cell of its own first: "), line)
        )
    name = Path(app.env.docname).name
    runs = sorted((ROOT / "results").glob(f"*/{name}-*/run.json"))
    if runs and "solutions" not in app.env.docname:
        facts = json.loads(runs[-1].read_text())
        said = (
            f"Its recorded run of {runs[-1].parts[-3]} took {facts['seconds']:.0f} s on {facts.get('device', 'cpu')}."
        )
        _below_title(doctree, nodes.paragraph("", "", nodes.emphasis("", said)))


def _below_title(doctree, paragraph) -> None:
    title = next(iter(doctree.findall(nodes.title)))
    title.parent.insert(title.parent.index(title) + 1, paragraph)


def captions(app, doctree, docname) -> None:
    """Give every figure of a notebook the text that stands above it as its description."""
    for image in doctree.findall(nodes.image):
        if not image.get("alt", "").strip() or re.fullmatch(r"[_./\w-]*\.(png|jpe?g)", image["alt"]):
            image["alt"] = _above(image)


def _above(node: nodes.Node) -> str:
    """The section's title, and the first sentence of the last paragraph before a node."""
    section = next((p for p in _parents(node) if isinstance(p, nodes.section)), None)
    if section is None:
        return "figure"
    said = [p.astext() for p in section.findall(nodes.paragraph) if p.line and node.line and p.line <= node.line]
    first = re.split(r"(?<=[.:])\s", " ".join(said[-1].split()))[0] if said else ""
    return f"{section.next_node(nodes.title).astext()}. {first}".strip()


def _parents(node: nodes.Node):
    while node.parent is not None:
        node = node.parent
        yield node


NOT_PROSE = (nodes.reference, nodes.literal, nodes.math, nodes.raw)


def glossary(app, doctree, docname) -> None:
    """Link the first use of each term of the guide's glossary in the paragraphs of a notebook's page."""
    if not str(app.env.doc2path(docname)).endswith(".ipynb"):
        return
    terms = {name: to for (kind, name), to in app.env.get_domain("std").objects.items() if kind == "term"}
    longest_first = "|".join(map(re.escape, sorted(terms, key=len, reverse=True)))
    pattern = re.compile(rf"(?<![\w-])({longest_first})s?\b", re.IGNORECASE)
    for text in list(doctree.findall(nodes.Text)):
        above = [*_parents(text)]
        if any(isinstance(node, NOT_PROSE) for node in above):
            continue
        if not any(isinstance(node, nodes.paragraph) for node in above):
            continue
        parts, end = [], 0
        for match in pattern.finditer(text):
            if to := terms.pop(match[1].lower(), None):
                page, label = to
                link = nodes.reference("", match[0], internal=True)
                link["refuri"] = f"{app.builder.get_relative_uri(docname, page)}#{label}"
                parts += [nodes.Text(text[end : match.start()]), link]
                end = match.end()
        if parts:
            text.parent.replace(text, [*parts, nodes.Text(text[end:])])


def finish(app, error) -> None:
    """Beside the pages, the dated results; of MathJax and icons only what a page needs."""
    if error is not None:
        return
    out = Path(app.outdir)
    shutil.copytree(
        ROOT / "results", out / "results", ignore=shutil.ignore_patterns(".*", "notebook.ipynb"), dirs_exist_ok=True
    )
    shutil.rmtree(out.parent / "jupyter_execute", ignore_errors=True)  # myst-nb's copy of the notebooks
    (out / "_static" / "scripts" / "fontawesome.js").write_text("")  # 1.5 MB; the style sheet has the icons as a font
    mathjax = out / "_static" / "mathjax"
    kept = {"tex-chtml.js", "output", "input"}
    for path in mathjax.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def setup(app) -> None:
    """Sphinx's hook."""
    app.connect("builder-inited", check_outputs)
    app.connect("builder-inited", tables)
    app.connect("builder-inited", pareto)
    app.connect("builder-inited", prices)
    app.connect("autodoc-process-docstring", docstring)
    app.connect("doctree-read", times)
    app.connect("doctree-resolved", captions)
    app.connect("doctree-resolved", glossary)
    app.connect("build-finished", finish)
