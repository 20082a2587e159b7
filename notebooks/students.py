"""Student versions of the solutions: `make students` writes them into students/, and the book offers them.

A cell of a solution that is tagged `gap` becomes two. In the first every name that it defines waits for the student; in
the second stand the solution's own checks, with what they print when the gap is filled well, so that
`pytest --nbval 00_start_here.ipynb` marks it. Texts are the exercises, with their difficulty and minutes.

    python notebooks/students.py FOLDER
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
INTRODUCTION = (
    "Fill the gaps: write your answer in the place of each `...` and each `raise`. The cell after a gap checks it; what is "
    "printed below that cell now is what a right answer prints, up to numbers that are measured. Run the cells from the top."
)


def exercises(cells: list[dict]) -> dict[str, str]:
    """The exercises of a notebook: number -> text."""
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    told = text.split("## Exercises")[1].split("\n## ")[0]
    return dict(re.findall(r"^(\d+)\. (.*)$", told, flags=re.MULTILINE))


def gap(source: str, exercise: str, used: set[str]) -> tuple[str, str]:
    """A cell's gap and its check.

    Functions, and those names that the cell's checks or later cells use, are left open; asserts and what prints are
    the check.
    """
    body = ast.parse(source).body
    checks = [statement for statement in body if _checks(statement)]
    used = used.union(*map(_names, checks))
    open_, names = [], {}
    for statement in body:
        if isinstance(statement, ast.FunctionDef):
            left = ast.FunctionDef(**vars(statement) | {"body": _unwritten(statement, exercise)})
            open_.append(f"{ast.unparse(left)}\n\n")
        elif statement not in checks:
            shape = re.search(r"  (# .*)$", source.splitlines()[statement.end_lineno - 1])
            bound = [name for name in _names(statement, ast.Store) if name in used]
            names |= dict.fromkeys(bound, shape[1] if shape else "# your answer")
    open_ += [f"{name} = ...  {said}" for name, said in names.items()]
    asked = [
        f'assert {name} is not ..., "exercise {exercise}: `{name}` is still a gap; write your answer in its place"'
        for name in names
    ]
    return "\n".join(open_).strip(), "\n".join(asked + [ast.get_source_segment(source, each) for each in checks])


def _names(node: ast.AST, context: type = ast.Load) -> list[str]:
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, context)]


def _checks(statement: ast.stmt) -> bool:
    prints = (n for n in ast.walk(statement) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print")
    asserts = (n for n in ast.walk(statement) if isinstance(n, ast.Assert))
    return not isinstance(statement, ast.FunctionDef) and (any(prints) or any(asserts))


def _unwritten(function: ast.FunctionDef, exercise: str) -> list[ast.stmt]:
    said = f"exercise {exercise}: `{function.name}` is still a gap; write its body"
    docstring = function.body[:1] if ast.get_docstring(function) else []
    return [*docstring, *ast.parse(f"raise NotImplementedError({said!r})").body]


def student(title: str, solution: dict, asked: dict[str, str]) -> dict:
    """The student version of a solutions notebook, for the exercises of its notebook."""
    cells, number = [], ""
    for place, cell in enumerate(solution["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            for number, heading in re.findall(r"^## (\d+)\. (.*)$", source, flags=re.MULTILINE):
                cells.append(_text(f"## Exercise {number}\n\n{asked[number]}" if number in asked else f"## {heading}"))
        elif "gap" in cell["metadata"].get("tags", []):
            later = ("".join(c["source"]) for c in solution["cells"][place + 1 :] if c["cell_type"] == "code")
            left, check = gap(source, number, set(_names(ast.parse("\n".join(later)))))
            tags = [tag for tag in cell["metadata"]["tags"] if tag != "gap"]
            empty = {"cell_type": "code", "metadata": {"tags": ["gap"]}, "source": left, "outputs": []}
            cells += [empty | {"execution_count": None}, cell | {"metadata": {"tags": tags}, "source": check}]
        else:
            cells.append(cell)
    cells.insert(0, _text(f"# {title}: exercises\n\n{INTRODUCTION}"))
    for place, cell in enumerate(cells):
        cells[place] = cell | {"id": f"cell-{place}"}
    return solution | {"cells": cells}


def _text(source: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def main(folder: Path) -> None:
    """Write the student version of every solutions notebook into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((HERE / "solutions").glob("*.ipynb")):
        solution, book = (json.loads(p.read_text(encoding="utf-8")) for p in (path, HERE / path.name))
        made = student(path.stem, solution, exercises(book["cells"]))
        (folder / path.name).write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
