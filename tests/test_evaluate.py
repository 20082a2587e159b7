from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import normalize

from upclose import bank, claims, encode, evaluate, metrics, prompts
from upclose.birdlets import dataset
from upclose.features import Ladder, Plan, Text, Views
from upclose.methods import clip, lgca, wca

PLANS = [Plan("square", 4, (0.5, 0.9), seed, 1.25, 2) for seed in (0, 1)]
DRAW = torch.Generator().manual_seed(0)


def unit(*shape):
    return normalize(torch.randn(*shape, 8, generator=DRAW), dim=-1)


@pytest.fixture(scope="module")
def encoder():
    return encode.load("birdlets-tiny")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return dataset("test", "photo", n=5), {"root": tmp_path_factory.mktemp("bank")}


@pytest.fixture
def text():
    return Text(unit(3), unit(6), torch.tensor([0, 0, 0, 1, 2, 2]))


@pytest.fixture
def any_text(encoder):
    """A text of the world's 120 classes, two descriptions each."""
    draw = lambda n: normalize(torch.randn(n, encoder.dim, generator=DRAW), dim=-1)  # noqa: E731
    return Text(draw(120), draw(240), torch.arange(120).repeat_interleave(2))


@pytest.mark.filterwarnings("ignore::upclose.prompts.PromptWarning")
def test_text_has_plain_prompts_and_the_sources_sentences(encoder):
    problem = SimpleNamespace(name="birdlets", split="test", class_names=dataset("test", "photo", n=1).class_names[:3])
    found = evaluate.text(encoder, problem, "clip-d")
    said = prompts.load("clip-d", "birdlets", "test", problem.class_names)
    assert found.counts.tolist() == [len(rows) for rows in said.values()]
    plain = encoder.encode_text([f"a photo of a {name}." for name in problem.class_names])
    assert torch.allclose(found.label, plain, atol=1e-6)
    assert torch.allclose(found.of(1).description, encoder.encode_text(said[problem.class_names[1]]), atol=1e-6)


def test_text_of_clip_e_has_the_mean_of_its_templates_as_labels(encoder):
    problem = SimpleNamespace(name="birdlets", split="test", class_names=["a tern", "a gull"])
    found = evaluate.text(encoder, problem, "clip-e")
    assert torch.allclose(found.label, normalize(found.mean(), dim=-1), atol=1e-6)


def test_a_source_is_embedded_once(monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "text", lambda encoder, data, source: asked.append(source) or source)
    said = evaluate.texts(None, None)
    assert [said("clip-d"), said("cupl"), said("clip-d")] == ["clip-d", "cupl", "clip-d"]
    assert asked == ["clip-d", "cupl"]


def test_a_rule_reads_the_sentences_of_its_source(text):
    asked = []
    evaluate.rules(["CLIP-D", "CuPL", "WCA", "LaZSL"], lambda source: asked.append(source) or text, source="dnd")
    assert asked == ["clip-d", "cupl", "dnd", "lazsl"]


def test_rules_of_crops_read_the_first_level_of_a_ladder_and_lgca_all_of_it(text):
    ladder = Ladder(unit(4), unit(4, 2, 5))
    rules = evaluate.rules(["WCA (released)", "LGCA"], lambda source: text)
    assert torch.equal(rules["WCA (released)"](ladder), wca.scores(ladder.level(0), text, **wca.RELEASED))
    assert torch.equal(rules["LGCA"](ladder), lgca.scores(ladder, text))
    with pytest.raises(ValueError, match="LGCA reads a ladder"):
        rules["LGCA"](ladder.level(0))


def test_a_method_that_is_not_scored_by_name_is_refused(text):
    with pytest.raises(ValueError, match="no method 'CLIPD'; did you mean 'CLIP-D'"):
        evaluate.rules(["CLIPD"], lambda source: text)
    with pytest.raises(ValueError, match="Tip-Adapter needs shots"):
        evaluate.rules(["Tip-Adapter"], lambda source: text)


def test_hits_are_the_methods_answers_for_each_crop_set(encoder, world, any_text):
    data, options = world
    rules = evaluate.rules(["CLIP", "WCA"], lambda source: any_text) | {
        "never": lambda views: -torch.eye(120)[data.label]
    }
    found = evaluate.hits(rules, encoder, data, PLANS, **options)
    for s, plan in enumerate(PLANS):
        ladder, label, _ = bank.build(data, encoder, plan, **options).read()
        assert torch.equal(found["CLIP"][s], metrics.correct(clip.scores(ladder.level(0), any_text), label))
        assert torch.equal(found["WCA"][s], metrics.correct(wca.scores(ladder.level(0), any_text), label))
    assert found["never"].shape == (2, 5)
    assert not found["never"].any()


def test_what_is_collected_does_not_depend_on_the_size_of_a_block(encoder, world, monkeypatch):
    data, options = world
    rules = {"image": lambda ladder: ladder.image, "crop": lambda ladder: ladder.crop.flatten(1)}
    whole = evaluate.collect(lambda scores, label: scores, rules, encoder, data, PLANS, **options)
    monkeypatch.setattr(evaluate, "NUMBERS", 2 * 4 * 2 * encoder.dim)
    sizes = [len(label) for _, label, _ in evaluate.blocks(encoder, data, PLANS[0], **options)]
    assert sizes == [2, 2, 1]
    parts = evaluate.collect(lambda scores, label: scores, rules, encoder, data, PLANS, **options)
    assert all(torch.equal(parts[name], whole[name]) for name in rules)


def test_a_method_of_a_stream_gets_all_images_at_once(encoder, world, any_text, monkeypatch):
    data, options = world
    monkeypatch.setattr(evaluate, "NUMBERS", 1)
    rules = evaluate.rules(["CLIP", "TDA"], lambda source: any_text)
    found = evaluate.collect(lambda scores, label: scores, rules, encoder, data, PLANS[:1], **options)
    ladder, _, _ = bank.build(data, encoder, PLANS[0], **options).read()
    assert torch.equal(found["TDA"][0], rules["TDA"](ladder))
    assert torch.allclose(found["CLIP"][0], rules["CLIP"](ladder), atol=1e-6)
    assert list(found) == ["CLIP", "TDA"]


def test_read_gives_some_of_the_images_on_the_encoders_device(encoder, world):
    data, options = world
    ladder, label, index = evaluate.read(encoder, data, PLANS[0], slice(1, 3), **options)
    assert ladder.crop.shape == (2, 2, 4, encoder.dim)
    assert label.tolist() == data.label[1:3].tolist()
    assert index.tolist() == [1, 2]
    assert {part.device for part in ladder} == {encoder.device}


def test_differences_are_paired_and_against_all_others_unless_told():
    hits = {name: torch.rand(2, 50, generator=DRAW) < share for name, share in (("A", 0.7), ("B", 0.5), ("C", 0.6))}
    assert evaluate.differences(hits, "A") == {rival: claims.interval(hits["A"], hits[rival]) for rival in "BC"}
    assert list(evaluate.differences(hits, "A", ["C"])) == ["C"]


def test_a_claim_is_decided_in_every_world_that_has_both_methods():
    hits = {name: torch.rand(1, 50, generator=DRAW) < 0.5 for name in "AB"}
    tested = evaluate.check({"C1": ("A beats B", "A", "B"), "C2": ("A beats C", "A", "C")}, {"": hits, "photo": hits})
    assert [(c.name, c.text) for c in tested] == [("C1", "A beats B"), ("C1 photo", "A beats B, photo")]
    assert tested[0][2:] == claims.check("C1", "A beats B", hits["A"], hits["B"])[2:]


def test_views_of_a_device_keep_what_is_not_there():
    views = Views(unit(2), unit(2, 3)).to("meta")
    assert views.crop.device.type == "meta"
    assert views.box is None


@pytest.mark.parametrize(
    ("name", "budget", "crops"), [("WCA", 8, 7), ("LGCA", 16, 7), ("LGCA", 32, 10), ("CLIP", 1, None)]
)
def test_a_budget_is_spent_and_not_exceeded(name, budget, crops):
    method = evaluate.methods.get(name)
    assert evaluate.Rule(method, None).within(budget).crops == crops
    assert method.encodings(crops or 1) <= budget
    with pytest.raises(ValueError, match="at least"):
        evaluate.Rule(evaluate.methods.get("WCA"), None).within(1)


def test_a_rule_within_a_budget_reads_the_first_crops():
    generator = torch.Generator().manual_seed(0)
    image, crop, label, description = (
        torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)
        for shape in ((2, 8), (2, 3, 10, 8), (3, 8), (6, 8))
    )
    text = Text(label, description, torch.tensor([0, 0, 1, 1, 2, 2]))
    ladder = Ladder(image, crop)
    for name, fewer in (("WCA", ladder.level(0).cut(crops=7)), ("LGCA", ladder.cut(levels=1, crops=3))):
        rule = evaluate.rules([name], lambda _: text)[name]
        assert torch.equal(rule.within(8 if name == "WCA" else 4)(ladder), rule(fewer))


def unencodable(*_, **__):
    raise AssertionError("something was encoded")


@pytest.mark.parametrize(
    ("name", "budget", "plan", "said"),
    [
        ("LGCA", None, Plan("square", 15), "LGCA reads a ladder"),
        ("LGCA", 64, Plan("square", 15, factor=1.25, steps=2), "LGCA expands 15 crops 2 times: .* too few steps"),
        ("LGCA", 64, Plan("square", 8, factor=1.25, steps=3), "LGCA reads 15 crops an image, and the plan draws 8"),
        ("WCA", 16, Plan("square", 9), "WCA reads 15 crops an image, and the plan draws 9"),
    ],
)
def test_what_a_plan_cannot_pay_is_refused_before_anything_is_encoded(
    encoder, world, any_text, monkeypatch, name, budget, plan, said
):
    rule = evaluate.rules([name], lambda _: any_text)[name]
    rule = rule.within(budget) if budget else rule
    monkeypatch.setattr(bank, "build", unencodable)
    with pytest.raises(ValueError, match=said):
        evaluate.hits(
            {"CLIP": rule._replace(method=evaluate.methods.get("CLIP")), name: rule}, encoder, world[0], [plan]
        )


@pytest.mark.filterwarnings("ignore::upclose.prompts.PromptWarning")
def test_sentences_of_another_encoder_are_refused_before_anything_is_encoded(encoder, world, monkeypatch):
    other = encode.load("birdlets-tiny-whole")
    assert other.dim == encoder.dim
    rules = evaluate.rules(["CLIP-D"], evaluate.texts(other, world[0]))
    monkeypatch.setattr(bank, "build", unencodable)
    with pytest.raises(ValueError, match="CLIP-D reads sentences of another encoder than birdlets-tiny"):
        evaluate.hits(rules, encoder, world[0], PLANS)
