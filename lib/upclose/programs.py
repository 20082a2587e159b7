"""What a program does, without what it says: a hash that comments, docstrings and layout do not change."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def bare(source: str) -> str:
    """A program without comments, docstrings and layout, as text; the same on every version of Python.

    Raises:
        SyntaxError: it is no Python
    """
    return repr(_shape(ast.parse(source)))


def _shape(node: object) -> object:
    if isinstance(node, list):
        return [_shape(part) for part in node if not _is_text(part)]
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value is not None and value != [])
        return [type(node).__name__, *((name, _shape(value)) for name, value in fields)]
    return node


def _is_text(node: object) -> bool:
    """Whether a statement is only a string."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@cache
def digest(file: Path) -> str:
    """The sha256 of what a file's program does."""
    return hashlib.sha256(bare(file.read_text(encoding="utf-8")).encode()).hexdigest()


def used(source: str) -> dict[str, Path]:
    """The modules of upclose that a program imports, and those that these import: name -> file, in order of names.

    Args:
        source: of the program; imports inside functions count, those of a package only where it is asked for a name
            that is no module of it
    """
    found: dict[str, Path] = {}
    todo = list(_imports(ast.walk(ast.parse(source))))
    while todo:
        name = todo.pop()
        if name not in found:
            found[name] = _file(name)
            todo += _imported_by(found[name])
    return dict(sorted(found.items()))


@cache
def _imported_by(file: Path) -> tuple[str, ...]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return tuple(_imports(tree.body if file.name == "__init__.py" else ast.walk(tree)))


def _imports(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.startswith("upclose") and _file(name) else node.module for name in inside]
        for name in names:
            parts = name.split(".")
            if parts[0] == "upclose":
                yield from (".".join(parts[: k + 1]) for k in range(len(parts)))
                if _file(name).name == "__init__.py":
                    yield from _later(name)


@cache
def _later(package: str) -> tuple[str, ...]:
    """What a package's functions import, by names that only they know too."""
    file = _file(package)
    text = file.read_text(encoding="utf-8")
    every = (f"{package}.{other.stem}" for other in file.parent.glob("[!_]*.py")) if "import_module(" in text else ()
    inside = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
    return (*every, *_imports(part for node in inside for part in ast.walk(node)))


def _file(name: str) -> Path | None:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()), None)
