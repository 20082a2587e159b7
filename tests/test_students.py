"""The student versions: a gap that is open says so, and filled as the solution fills it the check passes."""

import ast
import importlib.util
import json

import pytest

from upclose import paths

SOLUTIONS = sorted((paths.NOTEBOOKS / "solutions").glob("*.ipynb"))


@pytest.fixture(scope="module")
def students():
    spec = importlib.util.spec_from_file_location("students", paths.NOTEBOOKS / "students.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


SOURCE = """
def twice(x):
    '''Two times x.'''
    return 2 * x


a = 3
b, unused = twice(a), 1  # (1,)
for k in range(2):
    c = k
print("b", b)
assert b == 6 and c == 1
"""


def test_an_open_gap_fails_with_a_sentence_and_a_filled_one_passes(students):
    left, check = students.gap(SOURCE, "7", {"a"})
    for name in ("a", "b", "c"):
        with pytest.raises(AssertionError, match=f"exercise 7: `{name}` is still a gap"):
            exec(check, dict.fromkeys("abc", 0) | {name: ...})
    exec(left, space := {})
    assert [space[name] for name in "abc"] == [...] * 3
    assert "unused" not in space
    assert "b = ...  # (1,)" in left
    with pytest.raises(NotImplementedError, match="exercise 7: `twice` is still a gap"):
        space["twice"](1)
    exec(SOURCE, space)
    exec(check, space)
    with pytest.raises(AssertionError):
        exec(check, space | {"b": 5})


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda p: p.stem)
def test_every_exercise_has_a_gap_and_loses_no_check(students, path):
    solution, book = (json.loads(p.read_text()) for p in (path, paths.NOTEBOOKS / path.name))
    asked = students.exercises(book["cells"])
    made = students.student(path.stem, solution, asked)["cells"]
    text = "\n".join("".join(cell["source"]) for cell in made)
    heads = [f"## Exercise {number}\n" for number in asked]
    parts = [text.split(head)[1].split("\n## Exercise")[0] for head in heads]
    assert all("is still a gap" in part for part in parts)
    assert all(line in text for line in asked.values())
    assert text.startswith(f"# {path.stem}: exercises\n")
    for cell in solution["cells"]:
        if "gap" in cell["metadata"].get("tags", []):
            source = "".join(cell["source"])
            kept = [ast.dump(each) for each in ast.parse(students.gap(source, "1", set())[1]).body]
            assert all(ast.dump(each) in kept for each in ast.parse(source).body if isinstance(each, ast.Assert))
    for cell in made:
        if cell["cell_type"] == "code":
            compile("".join(cell["source"]), path.name, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["00_start_here", "02_lazsl"])
def test_the_solutions_own_code_fills_every_gap(students, name):
    solution, book = (
        json.loads((paths.NOTEBOOKS / folder / f"{name}.ipynb").read_text()) for folder in ("solutions", "")
    )
    answers = ["".join(c["source"]) for c in solution["cells"] if "gap" in c["metadata"].get("tags", [])]
    space = {}
    for cell in students.student(name, solution, students.exercises(book["cells"]))["cells"]:
        if cell["cell_type"] == "code":
            exec(answers.pop(0) if cell["metadata"].get("tags") == ["gap"] else "".join(cell["source"]), space)
    assert not answers
