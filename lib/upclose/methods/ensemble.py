"""S trainings at once: layers stacked over seeds, and the products and gradients that a step consists of.

    S seeds, N rows, B rows of a minibatch, I and O inputs and outputs of a layer
    weight (S, I, O), bias (S, 1, O)    one layer a seed: x weight + bias

Every seed has its own initial parameters and its own minibatch order, both drawn from `upclose.seeds`, so that S
trainings are one sequence of batched products over rows that stay in one tensor. The linear probe, LARE and LADS
train this way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from upclose import features
from upclose.seeds import generator

SEEDS = (0, 1, 2, 3, 4)
NORM_TOLERANCE = 1e-3
TINY = 1e-12  # of a norm: the direction of nothing is nothing


class Network(NamedTuple):
    """S networks of two layers with a ReLU between them.

    Attributes:
        weight_in: (S, D, H)
        bias_in: (S, 1, H)
        weight_out: (S, H, O)
        bias_out: (S, 1, O)
    """

    weight_in: Tensor
    bias_in: Tensor
    weight_out: Tensor
    bias_out: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(B, D), the same for all seeds, or (S, B, D) -> (S, B, O)."""
        x = x.expand(len(self.weight_in), -1, -1)
        return affine(affine(x, self.weight_in, self.bias_in).relu_(), self.weight_out, self.bias_out)


def train(
    parameters: Sequence[Tensor],
    loss: Callable[[Tensor], Tensor],
    n: int,
    seeds: Sequence[int],
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
) -> Iterator[int]:
    """Minimise `loss` with AdamW, all seeds in one step; yields the epoch's number after each epoch.

    Args:
        parameters: leaves (S, ...) that require gradients; no seed's loss depends on another's slice
        loss: (S, B) int64 rows of each seed's minibatch -> scalar, the sum of the seeds' losses
        n: rows that there are
        seeds: S integers; seed s orders its minibatches by its own generator, alone or among others
        epochs: passes over the rows
        batch_size: rows a step; the last step of an epoch has what remains
        learning_rate: of AdamW
        weight_decay: of AdamW

    Raises:
        ValueError: there are no epochs, or no rows in a minibatch
    """
    if min(epochs, batch_size) < 1:
        raise ValueError(f"epochs is {epochs}, batch_size is {batch_size}: give one or more of each")
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    streams = [generator(seed, "order") for seed in seeds]
    device = parameters[0].device
    for epoch in range(epochs):
        order = torch.stack([torch.randperm(n, generator=stream) for stream in streams]).to(device, non_blocking=True)
        for index in order.split(batch_size, 1):
            optimizer.zero_grad()
            with torch.enable_grad():
                loss(index).backward()
            optimizer.step()
        yield epoch


def linear(seeds: Sequence[int], inputs: int, outputs: int, *key: object, like: Tensor) -> tuple[Tensor, Tensor]:
    """Initial layers U(-1/sqrt(inputs), 1/sqrt(inputs)) that require gradients: (S, inputs, outputs), (S, 1, outputs).

    Raises:
        ValueError: there are no seeds, or they repeat
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds are {list(seeds)}: give one or more, all different, since equal seeds are equal runs")
    draw = torch.stack([torch.rand(inputs + 1, outputs, generator=generator(seed, *key, "init")) for seed in seeds])
    weight, bias = ((2 * draw - 1) * inputs**-0.5).to(like).split([inputs, 1], 1)
    return weight.contiguous().requires_grad_(), bias.contiguous().requires_grad_()


def network(seeds: Sequence[int], inputs: int, outputs: int, hidden: int | None, *key: object, like: Tensor) -> Network:
    """Initial two-layer networks, inputs -> hidden (None: inputs / 2) -> outputs."""
    hidden = hidden or inputs // 2
    return Network(
        *linear(seeds, inputs, hidden, *key, "in", like=like),
        *linear(seeds, hidden, outputs, *key, "out", like=like),
    )


def take(table: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (S, B) of a table that the seeds share, (N,) or (N, D), or of one table each, (S, N, D)."""
    if table.ndim == 3:
        index = index + torch.arange(0, table.shape[0] * table.shape[1], table.shape[1], device=index.device)[:, None]
        table = table.flatten(0, 1)
    return table[index] if table.ndim == 1 else F.embedding(index, table)


def cross_entropy(logits: Tensor, answer: Tensor) -> Tensor:
    """Summed over seeds and images; logits (S, B, C), answer (S, B) int64 or (S, B, C) probabilities."""
    return F.cross_entropy(logits.flatten(0, 1), answer.flatten(0, 1), reduction="sum")


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The layers of all seeds, x weight + bias: (S, B, I), (S, I, O), (S, 1, O) -> (S, B, O)."""
    return _Affine.apply(x, weight, bias) if x.device.type == "cpu" else torch.baddbmm(bias, x, weight)


def cosines(pair: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of two points with each other and with labels: X (S, B, 2, D) and T (C, D) -> (S, B) and (S, B, 2, C).

    The points may have any norm; the labels have unit norm and get no gradient.
    """
    return _Cosines.apply(pair, label)


class _Affine(torch.autograd.Function):
    """`baddbmm` on the CPU, a product after the other: a batched one gives five seeds to two threads, 13 % slower."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        result = x.new_empty(*x.shape[:2], weight.shape[2])
        for seed in zip(bias, x, weight, result):
            torch.addmm(*seed[:3], out=seed[3])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        to_x = _products(gradient, weight.mT) if ctx.needs_input_grad[0] else None
        return to_x, _products(x.mT, gradient), gradient.sum(1, keepdim=True)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """(S, m, k) x (S, k, n) -> (S, m, n)."""
    result = a.new_empty(len(a), a.shape[1], b.shape[2])
    for left, right, product in zip(a, b, result):
        torch.mm(left, right, out=product)
    return result


class _Cosines(torch.autograd.Function):
    """w (S, B) between the two points X (S, B, 2, D), and z (S, B, 2, C) of each with the labels T (C, D).

    With n_k = |X_k|: w = X_0 . X_1 / (n_0 n_1) and z_k = X_k T' / n_k, so that a loss has the gradient

        dX_k = (dz_k / n_k) T + dw / (n_0 n_1) X_(1-k) - (dz_k . z_k + dw w) / n_k^2 X_k

    which takes three passes over the points beside the product, where autograd's own takes ten.
    """

    @staticmethod
    def forward(ctx, pair: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        norm = torch.linalg.vector_norm(pair, dim=3, keepdim=True).clamp_min(TINY)  # (S, B, 2, 1)
        between = torch.linalg.vecdot(*pair.unbind(2)) / norm.prod(2)[..., 0]
        with_labels = (pair @ label.T).div_(norm)
        ctx.save_for_backward(pair, label, norm, between, with_labels)
        return between, with_labels

    @staticmethod
    @once_differentiable
    def backward(ctx, to_between: Tensor, to_labels: Tensor) -> tuple[Tensor, None]:
        pair, label, norm, between, with_labels = ctx.saved_tensors
        gradient = (to_labels / norm) @ label
        towards = to_between[..., None] / norm.prod(2)  # (S, B, 1)
        for own, other in zip(gradient.unbind(2), reversed(pair.unbind(2))):
            own.addcmul_(towards, other)
        along = (to_labels * with_labels).sum(3, keepdim=True) + (to_between * between)[..., None, None]
        return gradient.addcmul_(along / norm.square(), pair, value=-1), None


def check_shape(x: Tensor, name: str, **axes: int | None) -> None:
    """Raises unless `x` has these axes, each of its length, or of any where it is None: `check_shape(y, "y", N=50)`."""
    if x.ndim != len(axes) or any(want not in (None, have) for have, want in zip(x.shape, axes.values())):
        known = ", ".join(f"{axis} = {length}" for axis, length in axes.items() if length is not None)
        raise ValueError(f"{name} is {tuple(x.shape)}: give ({', '.join(axes)}){known and ' with ' + known}")


def check_embeddings(x: Tensor, name: str, **axes: int | None) -> Tensor:
    """`features.check_unit` of embeddings that have these axes (without any (N, D)): `x` as float32, or float64."""
    check_shape(x, name, **(axes or {"N": None, "D": None}))
    x = x if x.dtype == torch.float64 else x.float()
    features.check_unit(x, name, NORM_TOLERANCE)
    return x


def check_labels(y: Tensor, classes: int | None, name: str, n: int) -> None:
    """Raises unless `y` is (n,) int64 in [0, classes), n >= 1; names the first index that is not."""
    if y.shape != (n,) or n == 0 or y.dtype != torch.int64:
        raise ValueError(f"{name} is {y.dtype} {tuple(y.shape)} for {n} embeddings: give one int64 class to each")
    bad = (y < 0) if classes is None else (y < 0) | (y >= classes)
    if bad.any():
        index = int(bad.nonzero()[0])
        limit = "" if classes is None else f" to {classes - 1}"
        raise ValueError(f"{name}[{index}] is {int(y[index])}: classes are numbered from 0{limit}")
