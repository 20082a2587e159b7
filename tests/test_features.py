import pytest
import torch
from torch.nn.functional import normalize

from upclose.features import Ladder, Text, Views
from upclose.methods import clip, dnd, lazsl, lgca, wca

DRAW = torch.Generator().manual_seed(0)


def unit(*shape):
    return normalize(torch.randn(*shape, 16, generator=DRAW), dim=-1)


METHODS = {
    "clip": clip.description_scores,
    "multi-crop": clip.multi_crop_scores,
    "wca": wca.scores,
    "lgca": lambda views, text: lgca.scores(Ladder(views.image, views.crop[:, None]), text),
    "lazsl": lazsl.scores,
    "dnd": dnd.scores,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("owner", [[0, 0, 2, 2], [0, 0, 1, 1]])
def test_every_method_refuses_a_class_without_descriptions(method, owner):
    empty = ({0, 1, 2} - set(owner)).pop()
    text = Text(unit(3), unit(4), torch.tensor(owner))
    with pytest.raises(ValueError, match=rf"classes \[{empty}\] have no description"):
        METHODS[method](Views(unit(5), unit(5, 7)), text)


def test_sum_mean_and_of_are_the_loops_over_classes():
    text = Text(unit(3), unit(6), torch.tensor([0, 0, 0, 1, 2, 2]))
    x = torch.randn(6, 4, 2, generator=DRAW)
    for c in range(3):
        mine = text.owner == c
        assert torch.allclose(text.sum(x)[c], x[mine].sum(0), atol=1e-6)
        assert torch.allclose(text.mean(x)[c], x[mine].mean(0), atol=1e-6)
        assert torch.allclose(text.mean()[c], text.description[mine].mean(0), atol=1e-6)
        one = text.of(c)
        assert torch.equal(one.label, text.label[c : c + 1])
        assert torch.equal(one.description, text.description[mine])
        assert one.owner.tolist() == [0] * int(mine.sum())


def test_text_and_ladder_move_with_all_of_their_parts():
    text = Text(unit(2), unit(2), torch.arange(2)).to("meta")
    ladder = Ladder(unit(2), unit(2, 2, 3), torch.zeros(2, 2, 3, 4)).to("meta")
    assert {part.device.type for part in (*text, *ladder)} == {"meta"}


def test_a_ladder_that_is_cut_and_flat_holds_the_same_crops():
    ladder = Ladder(unit(2), unit(2, 3, 4), torch.rand(2, 3, 4, 4, generator=DRAW))
    part = ladder.select(slice(1, 2)).cut(levels=2, crops=3)
    assert torch.equal(part.crop, ladder.crop[1:, :2, :3])
    assert torch.equal(part.box, ladder.box[1:, :2, :3])
    assert torch.equal(ladder.flat().crop[:, 5], ladder.crop[:, 1, 1])
    assert torch.equal(ladder.flat().box[:, 5], ladder.box[:, 1, 1])


def test_equal_boxes_of_an_image_are_one_encoding():
    box = torch.tensor([[[0, 0, 4, 4], [1, 1, 5, 5]], [[0, 0, 4, 4], [0, 0, 6, 6]]]).expand(2, 2, 2, 4).float().clone()
    box[1, :, 1] = box[1, :, 0]
    ladder = Ladder(unit(2), unit(2, 2, 2), box)
    assert ladder.distinct() == (3 + 1) / 2
    mask = torch.tensor([[True, False], [True, True]]).expand(2, 2, 2)
    assert ladder.distinct(mask) == (2 + 1) / 2
