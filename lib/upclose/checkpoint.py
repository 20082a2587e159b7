"""A training's state as named tensors: what safetensors writes as it is, and from which the training goes on.

weight.NAME                 a weight
step.NAME, exp_avg.NAME     what an optimizer remembers of it, under the optimizer's own words
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

State = dict[str, Tensor]


def pack(weights: Mapping[str, Tensor], optimizers: Sequence[torch.optim.Optimizer], **more: Tensor) -> State:
    """A copy of the weights and of what the optimizers remember of them, on the CPU.

    Args:
        weights: name -> tensor; the optimizers hold the same objects
        optimizers: each weight belongs to at most one of them
        more: further tensors to keep, under names without a dot

    """
    found = dict(more)
    for name, weight in weights.items():
        found[f"weight.{name}"] = weight
        for optimizer in optimizers:
            found |= {f"{fact}.{name}": value for fact, value in optimizer.state.get(weight, {}).items()}
    return {key: value.detach().clone().cpu().contiguous() for key, value in found.items()}


@torch.no_grad()
def unpack(state: State, weights: Mapping[str, Tensor], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Put the weights and what the optimizers remember back where they were, in place.

    Args:
        state: of `pack`
        weights: the same names, with the same shapes
        optimizers: of the same kinds over the same weights

    Raises:
        KeyError: a weight that the state lacks
    """
    for name, weight in weights.items():
        weight.copy_(state[f"weight.{name}"])
    names = {id(weight): name for name, weight in weights.items()}
    remembered: dict[str, State] = {name: {} for name in weights}
    for key, value in state.items():
        fact, _, name = key.partition(".")
        if fact != "weight" and name in remembered:
            remembered[name][fact] = value.clone()
    for optimizer in optimizers:
        held = [weight for group in optimizer.param_groups for weight in group["params"]]
        facts = {i: remembered[names[id(weight)]] for i, weight in enumerate(held)}
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": {i: found for i, found in facts.items() if found}, "param_groups": groups})
