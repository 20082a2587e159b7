"""What a program does, without what it says: a hash that comments, docstrings and layout do not change."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
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
        source: of the program; imports inside functions count
    """
    found: dict[str, Path] = {}
    todo = list(_imports(source))
    while todo:
        name = todo.pop()
        if name not in found:
            found[name] = _file(name)
            todo += _imported_by(found[name])
    return dict(sorted(found.items()))


@cache
def _imported_by(file: Path) -> tuple[str, ...]:
    return tuple(_imports(file.read_text(encoding="utf-8")))


def _imports(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.startswith("upclose") and _file(name) else node.module for name in inside]
        for name in names:
            parts = name.split(".")
            if parts[0] == "upclose":
                yield from (".".join(parts[: k + 1]) for k in range(len(parts)))
                if (folder := PACKAGE.joinpath(*parts[1:])).is_dir() and "import_module(" in _file(name).read_text():
                    yield from (f"{name}.{file.stem}" for file in folder.glob("[!_]*.py"))  # which one, it asks later


def _file(name: str) -> Path | None:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()), None)
