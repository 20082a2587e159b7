import pytest
import torch
from safetensors.torch import load, save

from upclose import checkpoint


def training(seed):
    """Two layers under AdamW and Muon."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    first, second = model
    adam = torch.optim.AdamW([first.bias, *second.parameters()], lr=0.1)
    return model, [adam, torch.optim.Muon([first.weight], lr=0.1)]


def descend(model, optimizers, steps):
    for step in range(steps):
        model.zero_grad()
        model(torch.full((3, 4), 1.0 + step)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()


def test_a_training_goes_on_as_if_it_had_never_stopped():
    model, optimizers = training(0)
    descend(model, optimizers, 2)
    state = load(save(checkpoint.pack(dict(model.named_parameters()), optimizers, epoch=torch.tensor([2]))))
    other, others = training(1)
    checkpoint.unpack(state, dict(other.named_parameters()), others)
    for each in ((model, optimizers), (other, others)):
        descend(*each, 2)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert state["epoch"].tolist() == [2]


def test_what_is_packed_is_a_copy():
    model, optimizers = training(0)
    descend(model, optimizers, 1)
    state = checkpoint.pack(dict(model.named_parameters()), optimizers)
    before = {key: value.clone() for key, value in state.items()}
    descend(model, optimizers, 1)
    assert all(torch.equal(state[key], before[key]) for key in state)
    assert {key for key in state if key.endswith("0.weight")} == {"weight.0.weight", "momentum_buffer.0.weight"}


def test_a_weight_that_the_state_lacks_is_an_error():
    model, optimizers = training(0)
    with pytest.raises(KeyError, match=r"weight\.0\.weight"):
        checkpoint.unpack({}, dict(model.named_parameters()), optimizers)
