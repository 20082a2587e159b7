"""Slides of the numbered notebooks: `make slides` writes them into site/slides/ beside the book, whose MathJax they use.

A slide is a section of a notebook: its title, its first equations and sentences, and its first figure. What is said
and shown is the notebook's, so that there is nothing to keep up to date.
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
WORDS = 55
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
html {{ scroll-snap-type: y mandatory; color-scheme: light dark; }}
body {{ margin: 0; font: 2.6vmin/1.45 system-ui, sans-serif; }}
section {{ box-sizing: border-box; height: 100vh; overflow: hidden; padding: 4vmin 8vmin; scroll-snap-align: start;
  display: flex; flex-direction: column; gap: 1.2vmin; }}
h1 {{ font-size: 4.4vmin; line-height: 1.15; margin: 0; }}
p {{ margin: 0; max-width: 120vmin; }}
figure {{ margin: 0; flex: 1; min-height: 0; }}
img {{ width: 100%; height: 100%; object-fit: contain; object-position: left top; background: #fff; }}
footer {{ font-size: 1.8vmin; opacity: .7; margin-top: auto; }}
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
</script></head><body>
{slides}
</body></html>
"""


class Slide(NamedTuple):
    """A section: its title, the text below it, and its first figure as base64 PNG or JPEG ("" for none)."""

    title: str
    text: str
    figure: str = ""


def slides(cells: list[dict]) -> list[Slide]:
    """The sections of a notebook, at most `MOST` of them; exercises and deviations are not shown."""
    found: list[Slide] = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            for part in re.split(r"^(?=#{1,2} )", source, flags=re.MULTILINE):
                if heading := re.match(r"#{1,2} +(.*)\n*", part):
                    found.append(Slide(heading[1], shorten(part[heading.end() :])))
        elif found and not found[-1].figure:
            found[-1] = found[-1]._replace(figure=_figure(cell))
    left_out = ("Exercises", "Known deviations")
    return [slide for slide in found if slide.title not in left_out and (slide.text or slide.figure)][:MOST]


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


def main(folder: Path) -> None:
    """Write the slides of every numbered notebook into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(__file__).parent.glob("0*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        (folder / f"{path.stem}.html").write_text(page(path.stem, cells), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
