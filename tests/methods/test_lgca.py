import naive_lgca
import pytest
import torch
from open_clip.model import CLIP
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize

from upclose import crops, seeds
from upclose.features import Ladder, Text, Views
from upclose.methods import lgca, wca

COUNTS = (3, 1, 4, 2, 4)


def world(batch=3, steps=3, n=12, counts=COUNTS, dim=16, key="lgca", dtype=torch.float64):
    """A random ladder, image and text. float64, so that no two roundings disagree about a selection."""
    draw = seeds.generator(0, key, n, steps)

    def unit(*shape):
        return normalize(torch.randn(*shape, dim, generator=draw, dtype=dtype), dim=-1)

    text = Text.from_lists(unit(len(counts)), [unit(m) for m in counts])
    return unit(batch, steps, n), unit(batch), text


def close(found, expected, tolerance=1e-6):
    return torch.allclose(found.double(), expected.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 12, 33])
@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.0, 0.0), (30.0, 5.0)])
def test_scores_and_selected_sets_equal_the_equations(n, scale):
    ladder, image, text = world(n=n, steps=lgca.steps(n))
    scales = dict(image_scale=scale[0], text_scale=scale[1])
    expected, selected = naive_lgca.scores(ladder, image, text, **scales)
    assert close(lgca.scores(Ladder(image, ladder), text, **scales), expected)
    assert torch.equal(lgca.trace(Ladder(image, ladder), text, **scales), selected)
    assert torch.equal(lgca.survivors(Ladder(image, ladder), text, **scales), selected.any(1))


def test_float32_scores_equal_the_equations():
    ladder, image, text = world(n=32, steps=5, dtype=torch.float32)
    found = lgca.scores(Ladder(image, ladder), text)
    assert found.dtype == torch.float32
    assert close(found, naive_lgca.scores(ladder, image, text)[0])


def test_topk_and_alphas_reach_the_equations():
    ladder, image, text = world(steps=4)
    for given, used in [(5, [5] * 4), ([6, 2, 1], [6, 2, 1, 1]), (1000, [1000] * 4), ("halving", None)]:
        alphas = torch.tensor([0.1, 0.2, 0.3, 0.4])
        expected, selected = naive_lgca.scores(ladder, image, text, top_k=used, alphas=alphas)
        assert close(lgca.scores(Ladder(image, ladder), text, alphas=alphas, top_k=given), expected)
        assert torch.equal(lgca.trace(Ladder(image, ladder), text, top_k=given), selected)


def test_topk_beyond_all_entries_keeps_every_crop():
    ladder, image, text = world()
    assert lgca.trace(Ladder(image, ladder), text, top_k=12 * 4).all()


@pytest.mark.parametrize("boundary", ["shift", "clip"])
def test_random_pictures_through_a_model_with_random_weights(boundary):
    """The naive side expands its own boxes and encodes one crop at a time; the ladder is encoded at once."""
    vision = dict(image_size=32, patch_size=16, width=32, head_width=16, layers=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIP(8, vision, dict(context_length=4, vocab_size=8, width=16, heads=1, layers=1)).double().eval()
    picture = torch.randint(0, 256, (2, 3, 60, 83), generator=seeds.generator(0, "picture"), dtype=torch.uint8)
    n, factor, steps = 9, 1.23, 3

    def encode(pixels, box):
        with torch.no_grad():
            return normalize(model.encode_image(crops.extract(pixels, box, 32, torch.float64)), dim=-1)

    whole = [encode(p, torch.tensor([[11.0, 0, 71, 60]]))[0] for p in picture]
    boxes = [crops.sample_boxes(60, 83, n, (0.3, 0.9), 0, str(i)) for i in range(2)]
    ladder = torch.stack(
        [
            encode(p, crops.ladder_boxes(b, factor, steps, 60, 83, boundary).flatten(0, 1)).view(steps, n, -1)
            for p, b in zip(picture, boxes)
        ]
    )
    text = world(dim=8)[2]

    def embed(p, box):
        def crop(s, t):
            corners = box[s].tolist()
            for _ in range(t):
                corners = naive_lgca.expand(corners, factor, 60, 83, boundary)
            return encode(p, torch.tensor([corners]))[0]

        return crop

    selected = lgca.trace(Ladder(torch.stack(whole), ladder), text)
    found = lgca.scores(Ladder(torch.stack(whole), ladder), text)
    for b in range(2):
        for c in range(len(COUNTS)):
            rows = text.description[text.owner == c]
            expected, sets = naive_lgca.pair(embed(picture[b], boxes[b]), n, steps, whole[b], text.label[c], rows)
            assert found[b, c].item() == pytest.approx(expected.item(), abs=1e-5)
            assert [selected[b, c, t].nonzero()[:, 0].tolist() for t in range(steps)] == sets


def test_one_step_is_wca():
    ladder, image, text = world(steps=1)
    for image_scale, text_scale in [(1.0, 1.0), (0.0, 3.0), (20.0, 0.0)]:
        scales = dict(image_scale=image_scale, text_scale=text_scale)
        expected = wca.scores(Views(image, ladder[:, 0]), text, **scales)
        assert close(lgca.scores(Ladder(image, ladder), text, **scales), expected)


def test_a_ladder_of_equal_levels_with_every_crop_kept_is_wca():
    ladder, image, text = world()
    same = ladder[:, :1].expand(-1, 3, -1, -1)
    assert close(lgca.scores(Ladder(image, same), text, top_k=1000), wca.scores(Views(image, ladder[:, 0]), text))


def test_the_steps_sum_to_the_scores():
    ladder, image, text = world()
    steps = lgca.step_scores(Ladder(image, ladder), text)
    assert steps.shape == (3, 3, len(COUNTS))
    assert close(
        lgca.scores(Ladder(image, ladder), text, alphas=[1, 0, 0]), wca.scores(Views(image, ladder[:, 0]), text)
    )
    assert close(
        lgca.scores(Ladder(image, ladder), text, alphas=[0.5, 2, 1]), 0.5 * steps[:, 0] + 2 * steps[:, 1] + steps[:, 2]
    )


def test_a_level_more_scores_the_last_set_and_changes_nothing_before():
    ladder, image, text = world(steps=4, n=8)  # the paper's T is 3
    longer, shorter = (lgca.step_scores(Ladder(image, x), text) for x in (ladder, ladder[:, :3]))
    assert close(longer[:, :3], shorter)
    assert (lgca.trace(Ladder(image, ladder), text)[:, :, 3].sum(-1) == 1).all()


def test_sets_shrink_by_the_rule_and_are_nested():
    ladder, image, text = world(steps=4, n=20)
    selected = lgca.trace(Ladder(image, ladder), text)
    assert selected[:, :, 0].all()
    for t, most in [(1, 10), (2, 5), (3, 2)]:
        assert selected[:, :, t].sum(-1).max() <= most
        assert (selected[:, :, t].sum(-1) >= 1).all()
        assert (selected[:, :, t - 1] | ~selected[:, :, t]).all()


def test_permuting_crops_descriptions_or_classes_permutes_nothing_else():
    ladder, image, text = world()
    expected, selected = lgca.scores(Ladder(image, ladder), text), lgca.trace(Ladder(image, ladder), text)

    order = torch.randperm(12, generator=seeds.generator(0, "order"))
    assert close(lgca.scores(Ladder(image, ladder[:, :, order]), text), expected)
    assert torch.equal(lgca.trace(Ladder(image, ladder[:, :, order]), text), selected[..., order])

    rows = [text.description[text.owner == c] for c in range(len(COUNTS))]
    flipped = Text.from_lists(text.label, [r.flip(0) for r in rows])
    assert close(lgca.scores(Ladder(image, ladder), flipped), expected)
    assert torch.equal(lgca.trace(Ladder(image, ladder), flipped), selected)

    classes = [4, 2, 0, 1, 3]
    moved = Text.from_lists(text.label[classes], [rows[c] for c in classes])
    assert close(lgca.scores(Ladder(image, ladder), moved), expected[:, classes])
    assert torch.equal(lgca.trace(Ladder(image, ladder), moved), selected[:, classes])
    assert torch.equal(lgca.trace(Ladder(image, ladder), text, classes=classes), selected[:, classes])


@pytest.mark.parametrize("entries", [1, 12 * 4 * 2, 12 * 4 * 7])
def test_the_chunk_changes_nothing(monkeypatch, entries):
    ladder, image, text = world(batch=5)
    arguments = Ladder(image, ladder), text
    expected = lgca.step_scores(*arguments), lgca.trace(*arguments), lgca.survivors(*arguments)
    monkeypatch.setattr(lgca, "ENTRIES", entries)
    assert close(lgca.step_scores(*arguments), expected[0])
    assert torch.equal(lgca.trace(*arguments), expected[1])
    assert torch.equal(lgca.survivors(*arguments), expected[2])


def test_padding_of_other_classes_changes_nothing():
    ladder, image, text = world()
    alone = Text.from_lists(text.label[1:2], [text.description[text.owner == 1]])
    assert close(lgca.scores(Ladder(image, ladder), alone), lgca.scores(Ladder(image, ladder), text)[:, 1:2])


def test_negative_entries_are_never_beaten_by_padding():
    ladder, image, text = world()
    opposite = text._replace(label=-image[:1].expand_as(text.label), description=-ladder[0, 0, :1].expand(14, -1))
    near = normalize(ladder + 20 * ladder[:1, :1, :1], dim=-1)
    assert (near @ opposite.description.T < 0).all()
    expected, selected = naive_lgca.scores(near, image, opposite)
    assert close(lgca.scores(Ladder(image, near), opposite), expected)
    assert torch.equal(lgca.trace(Ladder(image, near), opposite), selected)


def test_ties_go_to_the_lower_crop_then_the_lower_description():
    axis = torch.eye(4, dtype=torch.float64)
    ladder = axis[0].expand(1, 3, 8, 4)
    text = Text.from_lists(axis[:2], [axis[[0, 0]], axis[[0, 0, 0]]])  # every entry of a class is equal
    selected = lgca.trace(Ladder(axis[:1], ladder), text)
    for c, sets in enumerate([[8, 2, 1], [8, 2, 1]]):  # topK = 4 entries: crops 0, 0, 1, 1 | 0, 0, 0, 1; then 2
        for t, size in enumerate(sets):
            assert selected[0, c, t].nonzero()[:, 0].tolist() == list(range(size))


def test_ties_below_the_top_fill_up_in_order():
    a = torch.tensor([[0.0, 1.0], [2.0, 1.0], [1.0, 0.0], [3.0, 1.0]])
    expected = {1: [3], 2: [1, 3], 3: [0, 1, 3], 4: [0, 1, 3], 5: [0, 1, 2, 3], 8: [0, 1, 2, 3]}
    for size, rows in expected.items():
        assert lgca._occurs(a, size).nonzero()[:, 0].tolist() == rows


def test_crops_as_large_as_the_image_stay_what_they_are():
    box = torch.tensor([[0.0, 0, 50, 50]]).expand(4, 4)
    assert len(crops.ladder_boxes(box, 1.25, 3, 50, 50).flatten(0, 1).unique(dim=0)) == 1
    _, image, text = world(batch=2)
    ladder = image[:, None, None].expand(-1, 3, 4, -1)  # one encoding
    assert close(lgca.scores(Ladder(image, ladder), text), wca.scores(Views(image, image[:, None]), text))


def test_a_lazy_ladder_encodes_the_survivors_and_scores_as_the_whole():
    ladder, image, text = world(batch=1, steps=4)
    asked = torch.zeros(4, 12, dtype=torch.bool)

    def encode(t, crop):
        assert not asked[t].any()
        asked[t, crop] = True
        return ladder[0, t, crop]

    lazy = lgca.lazy_ladder(encode, image[0], text, 12, 4)
    assert torch.equal(asked, lgca.survivors(Ladder(image, ladder), text)[0])
    assert not asked.all()
    assert torch.equal(lgca.scores(lazy, text), lgca.scores(Ladder(image, ladder), text))


def test_steps_of_the_paper():
    assert [lgca.steps(n) for n in (1, 2, 3, 4, 7, 8, 100)] == [1, 1, 1, 2, 2, 3, 6]
    assert all(n >> lgca.steps(n) == 1 for n in range(2, 300))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(alphas=[1, 2]), "2 alphas for a ladder of 3 steps"),
        (dict(top_k=0), "top_k=0"),
        (dict(top_k="half"), "top_k='half'"),
        (dict(top_k=[3]), r"top_k=\[3\] for a ladder of 3 steps"),
        (dict(top_k=[3, 0]), r"top_k=\[3, 0\]"),
        (dict(image=torch.zeros(3, 4)), r"image \(3, 4\)"),
        (dict(crop=torch.zeros(3, 12, 16)), r"ladder.crop \(3, 12, 16\)"),
    ],
)
def test_errors_name_the_value(change, message):
    ladder, image, text = world()
    parts = {name: change.pop(name) for name in ("image", "crop") if name in change}
    with pytest.raises(ValueError, match=message):
        lgca.scores(Ladder(image, ladder)._replace(**parts), text, **change)


def test_the_walk_runs_on_a_device_without_reading_values_back():
    with FakeTensorMode(), torch.device("cuda"):
        row, real = torch.empty(5, 4, 16), torch.empty(5, 4, dtype=torch.bool)
        steps = list(lgca._walk(torch.empty(2, 3, 12, 16), torch.empty(2, 16), row, real, [6, 3], 1.0))
    assert [(score.device.type, score.shape) for score, _ in steps] == [("cuda", (2, 5))] * 3
    assert [member.shape for _, member in steps] == [(2, 5, 12), (2, 5, 6), (2, 5, 3)]


def test_schedules_are_weights_of_the_steps():
    rows = lgca.schedules(3)
    assert rows["halving"] == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert rows["doubling"] == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert rows["falling"] == pytest.approx([3 / 6, 2 / 6, 1 / 6])
    assert rows["rising"] == rows["falling"][::-1]
    assert rows["step 2 only"] == [0, 1, 0]


def test_a_margin_adds_the_same_number_of_pixels_to_every_crop_until_it_is_the_picture():
    box = torch.tensor([[40.0, 40, 50, 50], [30, 30, 60, 60]])
    side = lgca.margin_boxes(box, 8, 3, 100, 100)[..., 2:] - lgca.margin_boxes(box, 8, 3, 100, 100)[..., :2]
    assert torch.allclose(side[..., 0], torch.tensor([[10.0, 30], [18, 38], [26, 46]]))
    assert torch.equal(side[..., 0], side[..., 1])
    assert lgca.margin_boxes(box, 200, 2, 100, 90)[1].tolist() == [[0, 0, 90, 100]] * 2
