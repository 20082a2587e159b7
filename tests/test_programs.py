import pytest

from upclose import paths, programs

ONE = '''"""What it is."""
import os  # to see


def f(x: int = 1) -> int:
    """Doubles."""
    y = {"a": (x + x)}
    return y["a"]
'''
SAME = "import os\ndef f(x: int=1) -> int:\n  'another text'\n  y = { 'a': x+x, }\n  return y['a'] # done\n"


def test_a_program_is_the_same_without_what_it_says():
    assert programs.bare(ONE) == programs.bare(SAME)
    for change in (("x + x", "x - x"), ("= 1", "= 2"), ("= 1", "= 1.0"), ('"a": (x', '"b": (x'), ("import os", "")):
        assert programs.bare(ONE.replace(*change)) != programs.bare(ONE)


def test_none_and_empty_lists_are_told_from_nothing():
    assert len({programs.bare(text) for text in ("x = None", "x = []", "x = ()", "x: int", "x = ''", "x = ...")}) == 6


def test_modules_are_followed_also_into_functions_and_packages():
    found = programs.used("def f():\n    from upclose.methods import wca\n")
    assert {"upclose", "upclose.methods", "upclose.methods.entry", "upclose.methods.wca", "upclose.features"} <= set(
        found
    )
    assert not {"upclose.methods.fair", "upclose.run", "upclose.bank"} & set(found)
    assert found["upclose.methods"] == paths.PACKAGE / "methods" / "__init__.py"
    assert {"upclose.bank.cluster", "upclose.crops", "upclose.images"} <= set(programs.used("import upclose.bank as b"))
    assert programs.used("import torch, upclosed") == {}
    assert "upclose.short" in programs.used("import upclose\nupclose.classify()\n")


@pytest.mark.parametrize("line", ["from upclose import methods", "from upclose.methods import get"])
def test_who_asks_the_registry_may_use_every_method(line):
    assert {"upclose.methods.fair", "upclose.methods.tpt"} <= set(programs.used(line))
