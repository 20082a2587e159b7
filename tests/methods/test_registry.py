"""What the registry says of a method is what the method does."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from upclose import compare, methods, paths, prompts
from upclose.features import Ladder, Text, Views
from upclose.methods import REGISTRY

ZERO_SHOT = [method for method in REGISTRY.values() if method.zero_shot]


def unit(*shape, seed):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def problem(crops=0, descriptions=0, images=7):
    """Seven images with 8 crops each (or a ladder of three levels), four classes with three sentences each."""
    text = Text(unit(4, 16, seed=1), unit(12, 16, seed=2 + descriptions), torch.arange(12) // 3)
    views = Views(unit(7, 16, seed=10)[:images], unit(7, 8, 16, seed=20 + crops)[:images])
    ladder = Ladder(views.image, unit(7, 3, 8, 16, seed=30 + crops)[:images])
    return {False: views, True: ladder}, text


def scores(method, **changed):
    views, text = problem(**changed)
    return method.function(views["ladder" in method.needs], text)


def test_every_paper_is_entered():
    papers = {file.stem for file in Path(methods.__file__).parent.glob("*.py")}
    papers -= {"__init__", "entry", "augment", "ensemble", "tuning", "lgca_theorem"}
    assert {name for name in papers if not getattr(import_module(f"upclose.methods.{name}"), "METHODS", ())} == set()


@pytest.mark.parametrize("method", ZERO_SHOT, ids=lambda method: method.name)
def test_a_method_reads_what_it_says_it_needs_and_nothing_else(method):
    before = scores(method)
    assert before.shape == (7, 4)
    assert before.isfinite().all()
    crops = bool({"crops", "ladder"} & set(method.needs))
    assert torch.equal(scores(method, crops=1), before) != crops
    assert torch.equal(scores(method, descriptions=1), before) != ("descriptions" in method.needs)
    assert (method.encodings(30) > 1) == crops


@pytest.mark.parametrize("method", ZERO_SHOT, ids=lambda method: method.name)
def test_only_a_stream_depends_on_the_other_images(method):
    alone = torch.cat([scores(method, images=k)[k - 1 :] for k in range(1, 8)])
    if "stream" not in method.needs:
        assert torch.allclose(alone, scores(method), atol=1e-6)


def test_colours_are_colours_and_no_two_are_alike():
    colours = [method.colour for method in REGISTRY.values()]
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours)
    assert len(set(colours)) == len(colours)


def test_sources_are_known_and_only_of_methods_that_read_sentences():
    for method in REGISTRY.values():
        assert method.source in ("", *prompts.SOURCES)
        assert not method.source or "descriptions" in method.needs or method.source == "clip-e"


def test_every_printed_row_that_is_not_cited_only_is_a_methods():
    account = compare.account(compare.published().assign(dataset="none"))
    ours = set(account[account.account != "cited only"].method)
    assert {row for row in ours if methods.find(row) is None} == set()


OFFICE = ("params", "doctor", "compare", "plots", "run", "report", "cli", "record", "metrics", "claims")


@pytest.mark.parametrize("module", OFFICE)
def test_the_office_names_no_method(module):
    tree = ast.parse((paths.PACKAGE / f"{module}.py").read_text())
    said = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert not said & set(REGISTRY)


def test_a_row_is_found_by_name_by_what_it_is_a_part_of_and_by_its_beginning():
    assert methods.find("WCA (released)").name == "WCA (released)"
    assert methods.find("Baseline+OT").name == "LaZSL"
    assert methods.find("WCA (N=16)").name == "WCA"
    assert methods.find("WCA as PL").name == "FAIR"
    assert methods.find("CLIP+D").name == "D&D"
    assert methods.find("nobody's") is None


def test_an_unknown_name_is_answered_with_the_nearest():
    assert methods.get("LGCA") is REGISTRY["LGCA"]
    with pytest.raises(ValueError, match="no method 'LGCB'; did you mean 'LGCA'"):
        methods.get("LGCB")
    with pytest.raises(ValueError, match="there are CLIP, "):
        methods.get("?")


@pytest.mark.parametrize("method", ZERO_SHOT, ids=lambda method: method.name)
@pytest.mark.parametrize("budget", [2, 5, 16, 64])
def test_a_budget_pays_for_so_many_crops_and_not_for_one_more(method, budget):
    crops = method.afford(budget)
    if method.encodings(1) == 1:
        assert crops == 0
    else:
        assert method.encodings(crops) <= budget < method.encodings(crops + 1)
        with pytest.raises(ValueError, match=f"{re.escape(method.name)} needs 2 encodings an image at least, not 1"):
            method.afford(1)


def test_methods_of_one_crop_set_share_it():
    sets = {name: REGISTRY[name].crop_set for name in ("WCA", "LaZSL", "multi-crop", "best-crop", "D&D", "LGCA")}
    assert sets == dict.fromkeys(("WCA", "LaZSL", "multi-crop", "best-crop"), "square") | {
        "D&D": "area",
        "LGCA": "ladder",
    }
