"""Slides of the numbered notebooks: `make slides` writes them into site/slides/ beside the book, whose MathJax they use.

A slide is a section of a notebook: its title, its first equations and sentences, and its first figure. What is said
and shown is the notebook's, so that there is nothing to keep up to date. The cells are tagged as RISE and nbconvert
read it (`jupyter nbconvert --to slides --no-input`): "slide" begins one, "-" is on it too, "skip" is not shown.

    python notebooks/slides.py FOLDER     the pages
    python notebooks/slides.py --tag      the tags, anew: cells that were added have none
"""

from __future__ import annotations

import html
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

MOST = 15
LEFT_OUT = ("Exercises", "Known deviations")
WORDS = 55
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
html {{ scroll-snap-type: y mandatory; color-scheme: light dark; }}
body {{ margin: 0; font: max(2.6vmin, 15px)/1.45 system-ui, sans-serif; }}
section {{ box-sizing: border-box; height: 100vh; overflow: hidden; padding: 4vmin 8vmin; scroll-snap-align: start;
  display: flex; flex-direction: column; gap: 1.2vmin; }}
h1 {{ font-size: 1.7em; line-height: 1.15; margin: 0; }}
p {{ margin: 0; max-width: 120vmin; }}
figure {{ margin: 0; flex: 1; min-height: 0; }}
img {{ width: 100%; height: 100%; object-fit: contain; object-position: left top; background: #fff; }}
footer {{ font-size: .7em; opacity: .7; margin-top: auto; }}
</style>
<script>MathJax = {{ tex: {{ inlineMath: [["$", "$"]] }} }};</script>
<script defer src="../_static/mathjax/tex-chtml.js"></script>
<script>
addEventListener("keydown", (event) => {{
  const step = {{ ArrowRight: 1, ArrowDown: 1, PageDown: 1, " ": 1, ArrowLeft: -1, ArrowUp: -1, PageUp: -1 }}[event.key];
  if (!step) return;
  event.preventDefault();
  const here = Math.round(scrollY / innerHeight) + step;
  document.querySelectorAll("section")[here]?.scrollIntoView();
}});
</script></head><body><main>
{slides}
</main></body></html>
"""


class Slide(NamedTuple):
    """A section: its title, the text below it, and its first figure as base64 PNG or JPEG ("" for none)."""

    title: str
    text: str
    figure: str = ""


def kinds(cells: list[dict]) -> list[str]:
    """For each cell how it is shown: a section's first text and its first figure are, for at most `MOST` sections."""
    found, count, open_ = [], 0, False
    for cell in cells:
        heading = cell["cell_type"] == "markdown" and re.search(r"^#{1,2} +(.*)", "".join(cell["source"]), re.M)
        if heading:
            open_ = heading[1] not in LEFT_OUT and count < MOST
            count += open_
            found.append("slide" if open_ else "skip")
        else:
            shown = open_ and bool(_figure(cell))
            found.append("-" if shown else "skip")
            open_ = open_ and not shown
    return found


def tag(path: Path) -> None:
    """Write the kinds of its cells into a notebook, and change nothing else."""
    book = json.loads(path.read_text(encoding="utf-8"))
    for cell, kind in zip(book["cells"], kinds(book["cells"])):
        cell["metadata"]["slideshow"] = {"slide_type": kind}
    path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def slides(cells: list[dict]) -> list[Slide]:
    """The slides of a notebook, by its cells' tags."""
    found: list[Slide] = []
    for cell in cells:
        kind = cell["metadata"].get("slideshow", {}).get("slide_type")
        if kind == "slide":
            _, title, text = re.split(r"^#{1,2} +(.*)\n*", "".join(cell["source"]), maxsplit=1, flags=re.M)
            found.append(Slide(title, shorten(re.split(r"^#{1,2} ", text, flags=re.M)[0])))
        elif kind == "-":
            found[-1] = found[-1]._replace(figure=_figure(cell))
    return found


def shorten(text: str) -> str:
    """The first paragraphs of a text, without its tables and lists, up to a sentence within `WORDS` words."""
    kept, words = [], 0
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if paragraph.startswith(("|", "-", "1.", "```", "<")):
            continue
        if paragraph.startswith("$$"):
            if len(kept) < 4:
                kept.append(" ".join(paragraph.split()))
            continue
        sentences = re.split(r"(?<=[.:?])\s+(?=[A-Z$*])", " ".join(paragraph.split()))
        short = []
        for sentence in sentences:
            words += len(sentence.split())
            if words > WORDS and (kept or short):
                break
            short.append(sentence)
        if short:
            kept.append(" ".join(short))
        if words > WORDS:
            break
    return "\n\n".join(kept)


def _figure(cell: dict) -> str:
    for output in cell.get("outputs", []):
        for kind in ("image/png", "image/jpeg"):
            if kind in output.get("data", {}):
                data = "".join(output["data"][kind]).replace("\n", "")
                return f"data:{kind};base64,{data}"
    return ""


def page(name: str, cells: list[dict]) -> str:
    """The slides of a notebook as one page."""
    render = MarkdownIt("commonmark", {"html": False}).render
    found = slides(cells)
    sections = []
    for place, (title, text, figure) in enumerate(found, 1):
        maths: list[str] = []

        def keep(match: re.Match, maths: list[str] = maths) -> str:
            maths.append(match[0])
            return f"MATH{len(maths) - 1}END"

        body = render(re.sub(r"\$\$.+?\$\$|\$[^$\n]+\$", keep, text))
        body = re.sub(r"MATH(\d+)END", lambda m, maths=maths: html.escape(maths[int(m[1])]), body)
        shown = f'<figure><img src="{figure}" alt="Figure of: {html.escape(title)}"></figure>' if figure else ""
        foot = f"<footer>{html.escape(name)}, {place} of {len(found)}</footer>"
        sections.append(f"<section><h1>{html.escape(title)}</h1>{body}{shown}{foot}</section>")
    return PAGE.format(title=html.escape(found[0].title), slides="\n".join(sections))


def main(folder: str) -> None:
    """Write the slides of every numbered notebook into a folder, or tag their cells."""
    for path in sorted(Path(__file__).parent.glob("0*.ipynb")):
        if folder == "--tag":
            tag(path)
            continue
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{path.stem}.html").write_text(page(path.stem, cells), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
