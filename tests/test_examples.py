"""Every example in a docstring gives what it says."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import upclose

ROOT = Path(upclose.__file__).parent
SHOWING = [
    ".".join(("upclose", *file.relative_to(ROOT).with_suffix("").parts))
    for file in sorted(ROOT.rglob("*.py"))
    if ">>> " in file.read_text()
]


@pytest.mark.parametrize("name", SHOWING)
def test_the_examples_of_a_module_hold(name):
    failed, tried = doctest.testmod(import_module(name))
    assert (failed, tried > 0) == (0, True)
