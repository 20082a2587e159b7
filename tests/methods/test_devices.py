"""No method waits for a device: fake tensors have no values, so that a look at one raises."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from upclose import methods
from upclose.features import Ladder, Text, Views
from upclose.methods import dnd, tda, tip_adapter

C, D, N = 4, 16, 5


def problem(images=6):
    """On a GPU that is not there, with descriptions of several numbers."""
    text = Text.from_lists(torch.empty(C, D), [torch.empty(m, D) for m in (3, 1, 4, 2)])
    views = Views(torch.empty(images, D), torch.empty(images, N, D))
    return views, Ladder(views.image, torch.empty(images, 2, N, D)), text


def check(found, shape=(6, C)):
    assert (found.device.type, found.shape) == ("cuda", shape)


# TransCLIP's sparse table of neighbours is put together once, which counts its entries.
ASKED = [m for m in methods.REGISTRY.values() if m.zero_shot and m.name != "TransCLIP-ZS"]


@pytest.mark.parametrize("method", ASKED, ids=lambda method: method.name)
def test_scores(method):
    with FakeTensorMode(), torch.device("cuda"):
        views, ladder, text = problem()
        check(method.function(ladder if "ladder" in method.needs else views, text))


def test_what_needs_shots():
    with FakeTensorMode(), torch.device("cuda"):
        views, _, text = problem()
        label = torch.zeros(6, dtype=torch.int64)
        check(tip_adapter.scores(views.image, views.image, label, classes=C, beta=2.0))
        check(dnd.cache_scores(views, dnd.Cache(views.image, label, label, label), C, 2.0))
        check(dnd.stream(views, text, 2, zero_shot=torch.empty(6, C)))
        check(tda.stream(views.image, text.label))
        check(tip_adapter.queue(label, torch.empty(6), 2), (6,))


def test_plans():
    with FakeTensorMode(), torch.device("cuda"):
        views, _, text = problem()
        check(dnd.plans(views, text, max_iter=2), (6, C, N, 4))
