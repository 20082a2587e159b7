"""The fingerprint of a model: a hash of the weights in use, and a cheap sign that they have changed."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from upclose import seeds

BLOCK = 2**16  # words that a checksum weights at once: they stay in the cache


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Its parameters and buffers by name."""
    return dict((*model.named_parameters(), *model.named_buffers()))


def state(weights: Iterable[Tensor]) -> tuple:
    """Differs once a weight was written to: by autograd's rules (its version) or behind their back (its checksum)."""
    weights = [weight.detach() for weight in weights]
    sums = [checksum(weight) for weight in weights]
    return (
        tuple((weight.data_ptr(), weight._version) for weight in weights),
        tuple(torch.stack(sums).tolist()) if sums else (),
    )


def checksum(weight: Tensor) -> Tensor:
    """The sum of all bits times random numbers that depend on their place, modulo 2^64; it does not synchronise."""
    bits = weight.contiguous().view(-1).view(torch.uint8)
    if (len(bits) | bits.storage_offset()) % 8 == 0:
        bits = bits.view(torch.int64)
    factor = _factors(weight.device)
    total = factor.new_zeros(())
    for part in bits.split(BLOCK):
        total = total * factor[0] + (part * factor[: len(part)]).sum()
    return total


@functools.cache
def _factors(device: torch.device) -> Tensor:
    """(BLOCK,) odd random int64."""
    draw = torch.randint(-(2**62), 2**62, (BLOCK,), generator=seeds.generator(0, "checksum"))
    return (2 * draw + 1).to(device)


def of(model: nn.Module) -> str:
    """A hash of the weights, and of the modules that hold them."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__name__}\n".encode())
    for name, weight in sorted(weights(model).items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
