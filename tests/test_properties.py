"""Laws that hold for any input, tried by hypothesis: a few examples here, thousands in `make test-all`."""

import codecs
import itertools
import json
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from upclose import claims, crops, pointing, prompts, transport
from upclose.features import Plan, Text

SIDES = st.integers(1, 200)
SEEDS = st.integers(0, 2**63 - 1)
FACTORS = st.floats(1, 5)


def ranges(low, high):
    return st.tuples(st.floats(low, high), st.floats(low, high)).map(lambda pair: tuple(sorted(pair)))


def outcome(call):
    """What a call returns, and what it says where it refuses with a ValueError."""
    try:
        return call(), ""
    except ValueError as error:
        return None, str(error)


# --------------------------------------------------------------------------------------------------- boxes, ladders


@st.composite
def boxes_in_pictures(draw, most=200):
    """(height, width, box) with 1 to 5 boxes on whole pixels, of at least one pixel."""
    height, width = draw(st.integers(1, most)), draw(st.integers(1, most))
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        rows.append([x0, y0, draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))])
    return height, width, torch.tensor(rows, dtype=torch.float32)


def assert_inside(box, height, width):
    x0, y0, x1, y1 = box.unbind(-1)
    assert ((x0 >= 0) & (y0 >= 0) & (x1 <= width) & (y1 <= height) & (x0 < x1) & (y0 < y1)).all()


@given(SIDES, SIDES, st.integers(1, 40), ranges(1e-4, 1), SEEDS, st.text(max_size=5))
def test_square_boxes(height, width, n, scale, seed, key):
    box = crops.sample_boxes(height, width, n, scale, seed, key)
    assert_inside(box, height, width)
    assert torch.equal(box, box.round())
    sides = box[:, 2:] - box[:, :2]
    assert torch.equal(sides[:, 0], sides[:, 1])
    low, high = (max(1, int(share * min(height, width))) for share in scale)
    assert ((low <= sides) & (sides <= high)).all()
    few = (n + 1) // 2
    assert torch.equal(box[:few], crops.sample_boxes(height, width, few, scale, seed, key))


@given(SIDES, SIDES, st.integers(1, 40), ranges(1e-4, 1), SEEDS, ranges(0.1, 10))
def test_boxes_of_an_area(height, width, n, scale, seed, ratio):
    box = crops.sample_area_boxes(height, width, n, scale, seed, ratio=ratio)
    assert_inside(box, height, width)
    assert torch.equal(box, box.round())
    few = (n + 1) // 2
    assert torch.equal(box[:few], crops.sample_area_boxes(height, width, few, scale, seed, ratio=ratio))


@given(boxes_in_pictures(), FACTORS, st.sampled_from(["shift", "clip"]))
def test_an_expanded_box_holds_the_box_and_stays_in_the_picture(drawn, factor, boundary):
    height, width, box = drawn
    large = crops.expand_boxes(box, factor, height, width, boundary)
    assert_inside(large, height, width)
    assert (large[:, :2] <= box[:, :2] + 1e-3).all()
    assert (large[:, 2:] >= box[:, 2:] - 1e-3).all()
    wanted = ((box[:, 2:] - box[:, :2]) * factor).minimum(torch.tensor([float(width), float(height)]))
    sides = large[:, 2:] - large[:, :2]
    torch.testing.assert_close(sides, wanted if boundary == "shift" else sides.minimum(wanted), rtol=1e-4, atol=1e-3)
    assert torch.equal(crops.expand_boxes(box, 1, height, width, boundary), box)


@given(boxes_in_pictures(), FACTORS, st.integers(1, 6))
def test_the_levels_of_a_ladder_hold_one_another(drawn, factor, steps):
    height, width, box = drawn
    ladder = crops.ladder_boxes(box, factor, steps, height, width)
    assert ladder.shape == (steps, *box.shape)
    assert torch.equal(ladder[0], box)
    for below, above in itertools.pairwise(ladder):
        assert torch.equal(above, crops.expand_boxes(below, factor, height, width))
        assert (above[:, :2] <= below[:, :2] + 1e-3).all()
        assert (above[:, 2:] >= below[:, 2:] - 1e-3).all()


@given(SIDES, SIDES, st.sampled_from(["square", "area"]), ranges(1e-4, 1), SEEDS, FACTORS, st.integers(1, 4))
def test_what_a_plan_gives_can_be_cut_out(height, width, sampler, scale, seed, factor, steps):
    plan = Plan(sampler, 4, scale, seed, factor, steps)
    box = crops.plan_boxes(plan, height, width, "key")
    assert torch.equal(box, box.round())
    assert_inside(box, height, width)


@given(boxes_in_pictures(60), st.integers(1, 24), st.integers(0, 2**32 - 1))
def test_crops_are_pils(drawn, size, seed):
    height, width, box = drawn
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    picture = Image.fromarray(pixels)
    wanted = [
        np.asarray(picture.crop(tuple(map(int, row))).resize((size, size), Image.Resampling.BICUBIC)) for row in box
    ]
    wanted = torch.from_numpy(np.stack(wanted)).permute(0, 3, 1, 2).int()
    for found in (
        crops.extract(image, box, size, torch.uint8),
        crops._extract_banded([image], box[None], size, torch.uint8, crops.MEAN, crops.STD)[0],
    ):
        assert (found.int() - wanted).abs().max() <= 2


@given(boxes_in_pictures(), boxes_in_pictures(), st.integers(1, 100))
def test_pointing_counts_pixels(crop, part, percent):
    box, parts = crop[2], part[2]
    found = pointing.contains(box, parts, percent / 100)
    for n, (x0, y0, x1, y1) in enumerate(box.int().tolist()):
        for m, (a0, b0, a1, b1) in enumerate(parts.int().tolist()):
            shown = max(0, min(x1, a1) - max(x0, a0)) * max(0, min(y1, b1) - max(y0, b0))
            whole = (a1 - a0) * (b1 - b0)
            assert found[n, m] == (shown > 0 and Fraction(shown, whole) >= Fraction(percent, 100))


# ------------------------------------------------------------------------------------------------------- transports


@st.composite
def problems(draw):
    """(cost, row, column) in double precision, with rows and columns of no mass among them."""
    n, m, seed = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    cost = rng.random((n, m)) * draw(st.sampled_from([0.0, 1e-3, 1.0, 2.0]))
    marginals = []
    for k in (n, m):
        mass = rng.random(k) + 0.01
        mass[rng.random(k) < 0.2] = 0
        mass = mass if mass.any() else np.ones(k)
        marginals.append(torch.from_numpy(mass / mass.sum()))
    return torch.from_numpy(cost), *marginals


@given(problems(), st.sampled_from([0.001, 0.05, 1.0, 100.0, math.inf]))
def test_a_transport_has_its_marginals_and_never_beats_the_exact_one(problem, epsilon):
    cost, row, column = problem
    plan, rounds = transport.sinkhorn(cost, row, column, epsilon, max_iter=2000)
    best = transport.exact(cost, row, column)
    assert (plan >= 0).all()
    assert (plan[row == 0] == 0).all()
    assert (plan[:, column == 0] == 0).all()
    torch.testing.assert_close(plan.sum(0), column, atol=1e-8, rtol=0)
    torch.testing.assert_close(best.sum(0), column, atol=1e-8, rtol=0)
    torch.testing.assert_close(best.sum(1), row, atol=1e-8, rtol=0)
    if rounds < 2000:
        torch.testing.assert_close(plan.sum(1), row, atol=1e-8, rtol=0)
        assert (plan * cost).sum() >= (best * cost).sum() - 1e-7
    if epsilon == math.inf:
        torch.testing.assert_close(plan, row[:, None] * column, atol=1e-12, rtol=0)


@given(problems(), st.sampled_from([0.05, 1.0]), st.randoms(use_true_random=False))
def test_a_transport_does_not_depend_on_the_order_of_rows_and_columns(problem, epsilon, random):
    cost, row, column = problem
    n, m = (random.sample(range(k), k) for k in cost.shape)
    plan, _ = transport.sinkhorn(cost, row, column, epsilon)
    turned, _ = transport.sinkhorn(cost[n][:, m], row[n], column[m], epsilon)
    torch.testing.assert_close(turned, plan[n][:, m], atol=1e-8, rtol=0)
    mirrored, _ = transport.sinkhorn(cost.mT, column, row, epsilon, tolerance=1e-12, max_iter=5000)
    torch.testing.assert_close(mirrored.mT, plan, atol=1e-6, rtol=0)


COUNTS = st.lists(st.integers(1, 5), min_size=1, max_size=6)


@given(COUNTS, st.integers(1, 3), st.integers(1, 5), st.sampled_from([1.0, 20.0, 500.0]), st.integers(0, 2**32 - 1))
def test_ragged_and_stacked_problems_are_the_problems_one_by_one(counts, images, crops_each, scale, seed):
    draw = torch.Generator().manual_seed(seed)
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    cost = torch.rand(len(owner), images, crops_each, generator=draw, dtype=torch.float64)
    logit = -scale * cost
    row = torch.full((images, crops_each), 1 / crops_each, dtype=torch.float64)
    plan, _ = transport.sinkhorn_ragged(logit, row, transport.Ragged(owner, len(counts)))
    columns = torch.full((len(owner), images), 1 / len(owner), dtype=torch.float64)
    stacked = logit.permute(2, 0, 1)
    together = transport.sinkhorn_stacked(stacked, columns) if transport.fits(stacked) else None
    for b in range(images):
        for c, count in enumerate(counts):
            column = torch.full((count,), 1 / count, dtype=torch.float64)
            alone, rounds = transport.sinkhorn(cost[owner == c, b].mT, row[b], column, 1 / scale)
            if rounds < 1000:  # where both have come to the end: they start elsewhere
                torch.testing.assert_close(plan[owner == c, b].mT, alone, atol=1e-7, rtol=0)
        alone, rounds = transport.sinkhorn(cost[:, b].mT, row[b], columns[:, b], 1 / scale)
        if together is not None and rounds < 1000:
            torch.testing.assert_close(together[..., b], alone, atol=1e-7, rtol=0)


# --------------------------------------------------------------------------------------------------- ragged layouts


@given(COUNTS, st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_a_ragged_layout_is_its_lists(counts, width, seed):
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randn(count, width, generator=draw, dtype=torch.float64) for count in counts]
    text = Text.from_lists(torch.zeros(len(counts), width), rows)
    assert text.counts.tolist() == counts
    layout = transport.Ragged(text.owner, len(counts))
    joined = text.description
    torch.testing.assert_close(layout.sum(joined), torch.stack([part.sum(0) for part in rows]))
    torch.testing.assert_close(layout.mean(joined), torch.stack([part.mean(0) for part in rows]))
    assert torch.equal(layout.amax(joined), torch.stack([part.amax(0) for part in rows]))
    parts = torch.arange(len(counts))
    assert layout.spread(parts).tolist() == text.owner.tolist()
    torch.testing.assert_close(layout.sum(layout.share), torch.ones(len(counts), dtype=torch.float64))
    padded, mask = text.padded()
    assert torch.equal(padded[mask], joined)
    assert not padded[~mask].any()
    for c, part in enumerate(rows):
        assert torch.equal(padded[c, : len(part)], part)


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=8), st.integers(1, 4))
def test_an_owner_is_in_order_and_whole_or_refused(owner, classes):
    owner = torch.tensor(owner)
    if owner.tolist() == sorted(owner.tolist()) and set(owner.tolist()) == set(range(classes)):
        assert transport.Ragged(owner, classes).count.tolist() == owner.bincount().tolist()
    else:
        with pytest.raises(ValueError, match=r"owner must be|have no description"):
            transport.Ragged(owner, classes)


# ----------------------------------------------------------------------------------------------------------- claims


@st.composite
def hits(draw):
    """Two methods on the same images: (S, n) each, or one crop set for one of them."""
    n, sets = draw(st.integers(1, 60)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.floats(0, 1))
    one = torch.from_numpy(rng.random((sets, n)) < share)
    other = torch.from_numpy(rng.random((draw(st.sampled_from([1, sets])), n)) < draw(st.floats(0, 1)))
    return one, other


@given(hits(), st.randoms(use_true_random=False))
def test_an_interval_holds_its_difference_and_does_not_look_at_the_order(drawn, random):
    better, worse = drawn
    difference, low, high = claims.interval(better, worse, resamples=500)
    assert difference == pytest.approx(100 * (better.double().mean() - worse.double().mean()).item(), abs=1e-9)
    assert -100 <= low <= difference + 1e-9
    assert difference - 1e-9 <= high <= 100
    order = random.sample(range(better.shape[1]), better.shape[1])
    again = claims.interval(better[:, order], worse[:, order], resamples=500)
    assert again == pytest.approx((difference, low, high), abs=1e-9)
    doubled = claims.interval(better.repeat(2, 1), worse if len(worse) == 1 else worse.repeat(2, 1), resamples=500)
    assert doubled == pytest.approx((difference, low, high), abs=1e-6)
    if len(better) == len(worse):
        assert claims.interval(better, better, resamples=10) == (0, 0, 0)


@given(hits(), st.lists(st.floats(-100, 100), min_size=2, max_size=2).map(sorted))
def test_a_larger_margin_never_makes_a_claim_truer(drawn, margins):
    rank = {"fails": 0, "undecided": 1, "equal": 1, "holds": 2}
    small, large = (claims.check("C", "", *drawn, margin=margin) for margin in margins)
    assert rank[small.verdict] >= rank[large.verdict]
    assert (small.verdict == "holds") == (small.low > margins[0])
    assert (small.verdict == "fails") == (small.high < margins[0])
    assert (small.n, small.sets) == (drawn[0].shape[1], max(len(drawn[0]), len(drawn[1])))


# ---------------------------------------------------------------------------------------------------------- prompts

LINES = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(
    st.dictionaries(LINES, st.lists(LINES, max_size=4), max_size=4), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])
)
def test_a_description_file_is_read_as_it_was_written(tmp_path_factory, sentences, encoding):
    file = tmp_path_factory.mktemp("words") / "own.json"
    file.write_bytes(json.dumps(sentences, ensure_ascii=False).encode(encoding))
    assert prompts.read(file) == sentences


@given(
    st.one_of(st.binary(max_size=60), LINES.map(str.encode), st.just(b"[" * 10**5)),
    st.sampled_from([b"", codecs.BOM_UTF8, codecs.BOM_UTF16_LE]),
)
def test_any_bytes_are_descriptions_or_one_sentence_that_names_the_file(tmp_path_factory, content, mark):
    file = tmp_path_factory.mktemp("words") / "own.json"
    file.write_bytes(mark + content)
    found, said = outcome(lambda: prompts.read(file))
    if said:
        assert str(file) in said
        assert "\n" not in said
    else:
        assert all(isinstance(row, str) for rows in found.values() for row in rows)


NAMES = LINES.map(lambda text: " ".join("".join(c for c in text if c.isprintable()).split()))


@given(st.lists(NAMES, min_size=1, max_size=4, unique_by=prompts.plain), st.data())
def test_linted_sentences_are_clean_and_need_no_second_lint(names, data):
    mark = st.sampled_from(["", "- ", "1) ", "\t* ", "\0- "])
    row = st.tuples(mark, mark, LINES).map("".join)
    found = prompts.lint({name: data.draw(st.lists(row, max_size=4)) for name in names}, names)
    assert list(found.sentences) == names
    for name, sentences in found.sentences.items():
        assert sentences
        assert len(set(sentences)) == len(sentences)
        for sentence in sentences:
            assert sentence.strip()
            if sentence != prompts.TEMPLATE.format(name):
                assert sentence == " ".join(sentence.split())
                assert sentence.isprintable()
                assert len(re.findall(r"\w+|[^\w\s]+", sentence)) <= prompts.TOKENS
    assert prompts.lint(found.sentences, names).sentences == found.sentences


@given(
    st.lists(st.from_regex(r"[a-z]([a-z \-*,'\"]*[a-z])?", fullmatch=True), min_size=1, max_size=6),
    st.sampled_from(["- {}", "* {}", "• {}", "{k}. {}", "{k}) {}"]),
)
def test_an_answer_gives_back_its_list(descriptors, mark):
    text = "\n".join(mark.format(row, k=k) for k, row in enumerate(descriptors, 1))
    assert prompts.answer(text) == descriptors


@given(st.text(max_size=80))
def test_any_answer_is_a_list_or_one_sentence(text):
    rows, said = outcome(lambda: prompts.answer(text))
    assert bool(rows) != ("no list in the answer" in said)
    assert all(row == row.strip() and row for row in rows or [])


@given(st.lists(st.text(max_size=6), min_size=2, max_size=8, unique=True), st.integers(0, 2**63 - 1))
def test_shuffled_descriptions_are_all_used_once_by_another_class(names, seed):
    found = prompts.shuffled({name: [name] for name in names}, seed)
    assert list(found) == names
    assert sorted(rows[0] for rows in found.values()) == sorted(names)
    assert all(rows != [name] for name, rows in found.items())
