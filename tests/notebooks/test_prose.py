"""Prose says what was measured: its decimals are compared with the recorded tables, or with the notebook's outputs.

In a notebook a reading begins with a date in bold, "**On Birdlets (recorded run, 2026-11-25, 300 photos)**", and goes
on to the next one or to the end of its cell. Its decimals are values of `metrics.csv` or differences of `claims.csv` of
the run that was recorded on that date, or are shown by the notebook; at "this notebook's default size" the latter. On
the page of claims every difference names its claim.
"""

import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml

from upclose import paths

DECIMAL = re.compile(r"(?<![\w.-])[+-]?\d+\.\d+(?!\.?\d)")
READING = re.compile(r"\*\*[^*]*?(recorded run|default size)[^*]*?(\d{4}-\d\d-\d\d)", re.I)
PAGE = paths.NOTEBOOKS / "pages" / "what_holds.md"
BOOKS = [
    p for p in sorted(paths.NOTEBOOKS.rglob("*.ipynb")) if p.parent.name in ("notebooks", "ablations", "complexity")
]


def readings(text: str) -> list[tuple[str, str, str]]:
    """(what was run, its date, what is said of it) of every dated reading of a cell."""
    starts = [*READING.finditer(text)]
    ends = [*(m.start() for m in starts[1:]), len(text)]
    return [(m[1].lower(), m[2], text[m.start() : end]) for m, end in zip(starts, ends)]


def lacking(text: str, known: list[float]) -> list[str]:
    """The decimals of a text that no known number is, in size and rounded as they are."""
    said = DECIMAL.findall(text)
    return [
        s for s in said if not any(abs(abs(float(s)) - abs(x)) <= 0.5001 * 10.0 ** -len(s.split(".")[1]) for x in known)
    ]


def numbers(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"[+-]?\d+\.?\d*", text)]


def measured(run: Path) -> list[float]:
    """The values and standard deviations of a run's metrics, and the differences of its claims with their ends."""
    found = pd.read_csv(run / "metrics.csv")[["value", "std"]].to_numpy().ravel().tolist()
    claims = run / "claims.csv"
    return found + (numbers(" ".join(pd.read_csv(claims).difference)) if claims.exists() else [])


def printed(book: Path) -> list[float]:
    """The numbers that a notebook prints or shows in tables, and those of its parameters."""
    cells = nbformat.read(book, 4).cells
    texts = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    for output in (output for cell in cells for output in cell.get("outputs", [])):
        data = output.get("data", {})
        texts += [
            output.get("text", ""),
            data.get("text/plain", ""),
            *re.findall(r"<td>(.*?)</td>", data.get("text/html", "")),
        ]
    return numbers(" ".join(texts))


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.stem)
def test_dated_readings_say_what_was_measured(book):
    for cell in nbformat.read(book, 4).cells:
        for kind, date, text in readings(cell.source) if cell.cell_type == "markdown" else ():
            runs = [*(paths.ROOT / "results" / date).glob(f"{book.stem}-*")]
            assert kind == "default size" or runs, f"no run of {book.stem} is recorded on {date}"
            assert lacking(text, [*printed(book), *(x for run in runs for x in measured(run))]) == [], text


def test_a_number_that_was_not_measured_is_found():
    text = "Before 9.9. **On Birdlets (recorded run, 2026-11-25):** 3.1 points, -0.25. "
    text += "**This notebook's default size, 2026-11-29** 7.0"
    (first, second) = readings(text)
    assert first[:2] == ("recorded run", "2026-11-25")
    assert second == ("default size", "2026-11-29", "**This notebook's default size, 2026-11-29** 7.0")
    assert lacking(first[2], [3.14, 0.25]) == []
    assert lacking(first[2], [3.16, -0.254]) == ["3.1"]
    assert lacking(second[2], [6.9]) == ["7.0"]


# ------------------------------------------------------------------------------------------------- the page of claims


def recorded(book: str) -> list[Path]:
    """The runs of a notebook on the newest date that has one, birdlets-tiny's first."""
    runs = [*(paths.ROOT / "results").glob(f"*/{Path(book).name}-*/")]
    newest = max(run.parent.name for run in runs)
    return sorted((run for run in runs if run.parent.name == newest), key=encoder_of)


def encoder_of(run: Path) -> str:
    return yaml.safe_load((run / "params.yaml").read_text())["backbone"]


def ledger(run: Path) -> pd.DataFrame:
    """The claims of a run; those that name its encoder, "C1 birdlets-tiny-2", are called by birdlets-tiny's name."""
    claims = pd.read_csv(run / "claims.csv")
    return claims.assign(claim=claims.claim.str.replace(rf" {encoder_of(run)}$", " birdlets-tiny", regex=True))


def claims_of(cell: str) -> list[dict[str, tuple[str, str]]]:
    """{claim: (verdict, difference)} of the notebooks of a row, an encoder each: as recorded, or as they show them."""
    tables = []
    for book in re.findall(r"`([\w/]+)`", cell):
        if "default size" in cell:
            tables.append([t for t in shown(paths.NOTEBOOKS / f"{book}.ipynb") if "verdict" in t])
        else:
            tables.append([ledger(run) for run in recorded(book)])
    return [
        {line.claim: (line.verdict, line.difference.split(" ")[0]) for t in of for line in t.itertuples()}
        for of in zip(*tables)
    ]


def shown(book: Path) -> list[pd.DataFrame]:
    """The tables that a notebook shows."""
    outputs = [output for cell in nbformat.read(book, 4).cells for output in cell.get("outputs", [])]
    pages = [output.get("data", {}).get("text/html", "") for output in outputs]
    rows = [[re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in page.split("<tr")[1:]] for page in pages]
    return [pd.DataFrame(lines[1:], columns=lines[0]) for lines in rows if lines and len({*map(len, lines)}) == 1]


def page_rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("row", page_rows(), ids=lambda row: row[0][:40])
def test_every_difference_of_the_page_is_that_of_its_claim(row):
    _, books, said, names = row
    known, *others = claims_of(books)
    claims = [known[name] for name in names.split("; ")]
    assert re.findall(r"[+-]\d+\.\d", said) == [difference for _, difference in claims]
    assert {verdict for verdict, _ in claims} <= {*re.findall(r"holds|fails|undecided|equal", said)}
    alike = 1 + sum(all(one[name][0] == known[name][0] for name in names.split("; ")) for one in others)
    assert re.findall(r"on (\d) of (\d) encoders", said) == ([(str(alike), str(1 + len(others)))] if others else [])


def test_the_page_readme_and_guide_say_no_other_decimal():
    rest = "\n".join(line for line in PAGE.read_text().splitlines() if not line.startswith("|"))
    assert lacking(rest, [x for run in recorded("00_start_here") for x in measured(run)]) == []
    readme = (paths.ROOT / "README.md").read_text().split("## What holds")[1].split("\n## ")[0]
    assert lacking(readme, numbers(PAGE.read_text())) == []
    guide = (paths.NOTEBOOKS / "guide.md").read_text()
    assert lacking("\n".join(re.findall("<details>.*?</details>", guide, re.S)), numbers(PAGE.read_text())) == []
