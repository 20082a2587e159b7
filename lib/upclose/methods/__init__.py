"""One paper, one file: tensors in, tensors out. `REGISTRY` knows every method by its name in the tables."""

import difflib
import pkgutil
from functools import cache
from importlib import import_module

from upclose.methods.entry import NEEDS as NEEDS
from upclose.methods.entry import Method as Method

REGISTRY: dict[str, Method]


@cache
def _collect() -> dict[str, Method]:
    known: dict[str, Method] = {}
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        for method in getattr(import_module(module.name), "METHODS", ()):
            if method.name in known or not set(method.needs) <= set(NEEDS):
                raise ValueError(f"{module.name} enters {method.name!r} a second time, or with needs not in {[*NEEDS]}")
            known[method.name] = method
    return known


def __getattr__(name: str) -> dict[str, Method]:
    if name == "REGISTRY":  # when it is asked for, so that one method alone is imported alone
        return _collect()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def get(name: str) -> Method:
    """A method by its name, in any case.

    Raises:
        ValueError: there is none; names the nearest
    """
    known = {method.name.casefold(): method for method in _collect().values()}
    if name.casefold() in known:
        return known[name.casefold()]
    close = difflib.get_close_matches(name.casefold(), known, 1)
    there = ", ".join(_collect())
    raise ValueError(
        f"no method {name!r}; " + (f"did you mean {known[close[0]].name!r}?" if close else f"there are {there}")
    )


def find(row: str) -> Method | None:
    """The method that a row of a table is of: by name, as one of its `rows`, or by the longest name it starts with."""
    if row in (known := _collect()):
        return known[row]
    if printed := [method for method in known.values() if row in method.rows]:
        return printed[0]
    return known[max(begun, key=len)] if (begun := [name for name in known if row.startswith(name)]) else None
