"""The page of a day: `results/<date>/index.html` shows every complete run with its numbers and figures."""

from __future__ import annotations

import html
import json
import os
from pathlib import Path
from urllib.parse import quote

import pandas as pd

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; font-size: .85rem }
th, td { padding: .2rem .7rem; text-align: left; border-bottom: 1px solid #eee }
td:nth-child(n+8) { text-align: right }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; vertical-align: top }
img { max-width: 33rem; border: 1px solid #eee } p, figcaption { color: #555; font-size: .85rem }
"""


def _run(folder: Path) -> str:
    facts = json.loads((folder / "run.json").read_text())
    name = html.escape(folder.name)
    here = quote(folder.name)
    parts = [
        f'<h2 id="{name}">{name}</h2>',
        f"<p>{html.escape(facts['notebook'])}, commit {html.escape(facts['commit'][:10] or 'none')}"
        f"{' with changes' if facts['dirty'] else ''}, {facts['seconds']:.0f} s, "
        f'{facts["peak_memory_bytes"] / 2**30:.1f} GiB at most. <a href="{here}/notebook.ipynb">notebook</a>, '
        f'<a href="{here}/params.yaml">parameters</a>, <a href="{here}/run.json">run.json</a></p>',
    ]
    if (metrics := folder / "metrics.csv").exists():
        frame = pd.read_csv(metrics, keep_default_na=False).drop(columns="run")
        parts.append(frame.to_html(index=False, escape=True, border=0))
    for figure in sorted((folder / "figures").glob("*.png")):
        caption = html.escape(figure.stem.replace("_", " "))
        parts.append(
            f'<figure><img src="{here}/figures/{quote(figure.name)}" alt="{caption}" loading="lazy">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return "\n".join(parts)


def write(day: Path) -> Path:
    """Write the page of a day's folder and return its path."""
    runs = sorted(file.parent for file in day.glob("*/run.json"))
    links = "".join(f'<li><a href="#{html.escape(run.name)}">{html.escape(run.name)}</a></li>' for run in runs)
    body = "\n".join(_run(run) for run in runs)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>upclose, {html.escape(day.name)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
        f"<h1>CLIP, up close: runs of {html.escape(day.name)}</h1><ul>{links}</ul>{body}</html>\n"
    )
    new = day / ".index.html.new"
    new.write_text(page)
    os.replace(new, day / "index.html")
    return day / "index.html"
