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
