"""What every committed notebook must be: run, small, parameterised, in the order of the design."""

import ast
import re

import nbformat
import pytest

from upclose import params, paths

BOOKS = sorted(p for p in paths.NOTEBOOKS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
PAPERS = [p for p in BOOKS if p.parent == paths.NOTEBOOKS]
CALLED = [p for p in BOOKS if p.parent.name != "solutions"]


def name(path):
    return path.relative_to(paths.NOTEBOOKS).as_posix()


def words(text):
    """How many words a text has outside code, formulas, tables and links' targets."""
    text = re.sub(r"```.*?```|\$\$.*?\$\$", " ", text, flags=re.DOTALL)
    text = re.sub(r"`[^`\n]*`|\$[^$\n]*\$|^\|.*$|(?<=\])\([^)]*\)", " ", text, flags=re.MULTILINE)
    return len(re.findall(r"\w+(?:[-'.,]\w+)*", text))


def code(book):
    return [cell for cell in book.cells if cell.cell_type == "code" and cell.source.strip()]


@pytest.mark.parametrize("path", BOOKS, ids=name)
def test_committed_with_outputs_and_without_errors(path):
    book = nbformat.read(path, 4)
    assert path.stat().st_size < 1.5 * 2**20
    assert all(cell.execution_count for cell in code(book)), "some cell was never run"
    counts = [cell.execution_count for cell in code(book)]
    assert counts == sorted(counts)
    outputs = [output for cell in code(book) for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert any(output.output_type in ("stream", "execute_result", "display_data") for output in outputs)


@pytest.mark.parametrize("path", CALLED, ids=name)
def test_one_typed_parameters_cell_whose_lines_say_what_they_are(path):
    book = nbformat.read(path, 4)
    (cell,) = [c for c in book.cells if "parameters" in c.metadata.get("tags", [])]
    lines, said = cell.source.splitlines(), ast.parse(cell.source).body
    assert all(isinstance(line, ast.AnnAssign) for line in said)
    assert all("  # " in "\n".join(lines[line.lineno - 1 : line.end_lineno]) for line in said)
    params.check(path, {})


@pytest.mark.parametrize("path", CALLED, ids=name)
def test_a_parameter_file_runs_it(path):
    sheet = params.read(paths.PARAMS / "birdlets" / f"{name(path).removesuffix('.ipynb')}.yaml")
    assert params.notebook_path(sheet.notebook) == path


@pytest.mark.parametrize("path", PAPERS, ids=name)
def test_the_order_of_a_notebook(path):
    text = "\n".join(cell.source for cell in nbformat.read(path, 4).cells)
    markers = [
        "arXiv",
        "# which|: str =",
        "[Pp]aper versus ours",
        "record\\.claims",
        "## Exercises",
        "## Known deviations",
    ]
    places = [re.search(marker, text) for marker in markers]
    assert all(places), [m for m, p in zip(markers, places) if not p]
    starts = [place.start() for place in places]
    assert starts == sorted(starts)
    exercises = text.split("## Exercises")[1].split("## Known deviations")[0]
    assert len(re.findall(r"^\d+\. ", exercises, re.M)) >= 3
    assert (paths.NOTEBOOKS / "solutions" / path.name).exists()


@pytest.mark.parametrize("path", BOOKS, ids=name)
def test_no_path_of_a_machine_and_no_working_directory(path):
    source = "\n".join(cell.source for cell in nbformat.read(path, 4).cells)
    assert not re.search(r"os\.getcwd|%cd|/home/|/root/|\.cuda\(", source)


def test_words_are_counted_outside_code_formulas_tables_and_targets():
    assert words("We don't say +0.4, `a b` or $x + y$.\n\n$$\na = b\n$$\n\n| a | b |\n\n[the sweep](a/b.md) ends") == 8
    assert words("1,000 pictures-in-a-row") == 2


@pytest.mark.parametrize("path", BOOKS, ids=name)
def test_a_text_that_is_long_is_broken_by_a_figure_or_a_question(path):
    texts = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"]
    assert {cell.id: n for cell in texts if (n := words(cell.source)) > 120} == {}
