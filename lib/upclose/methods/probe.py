"""The linear probe, and the training of S seeds at once that LARE and LADS share with it.

    S seeds, N images, D embedding dimensions, C classes, H hidden units, B images of a minibatch
    x (N, D), y (N,)                    image embeddings of unit norm and their classes
    weight (S, D, C), bias (S, 1, C)    the probe, one linear layer a seed: scores = x weight + bias

Every seed has its own initial parameters and its own minibatch order, both drawn from `upclose.seeds`, and parameters
are stacked over seeds: S trainings are one sequence of batched products over embeddings that stay in one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from upclose import features
from upclose.methods.entry import Method, whole
from upclose.seeds import generator

NORM_TOLERANCE = 1e-3
CHUNK = 8192
SEEDS = (0, 1, 2, 3, 4)


class Probe(NamedTuple):
    """S linear classifiers.

    Attributes:
        weight: (S, D, C)
        bias: (S, 1, C)
        epoch: (S,) int64, the epoch that was kept, counted from 0
        accuracy: (S,) float32, its accuracy on the validation images, 0 .. 1
    """

    weight: Tensor
    bias: Tensor
    epoch: Tensor
    accuracy: Tensor


class Accuracy(NamedTuple):
    """Accuracies 0 .. 1, each (...,), one a seed where the predictions have seeds.

    Attributes:
        in_domain: over the images of the training domain
        out_of_domain: over the images of all other domains, pooled
        extended: over all images, pooled (not the mean of the two)
    """

    in_domain: Tensor
    out_of_domain: Tensor
    extended: Tensor


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


def fit(
    x: Tensor,
    y: Tensor,
    x_val: Tensor,
    y_val: Tensor,
    seeds: Sequence[int] = SEEDS,
    *,
    sample: Tensor | None = None,
    target: Tensor | None = None,
    classes: int | None = None,
    epochs: int = 100,
    batch_size: int = 512,
    learning_rate: float = 1e-2,
    weight_decay: float = 0.05,
) -> Probe:
    """Train a linear classifier a seed, and keep each seed's best epoch on the validation images.

    Args:
        x: (N, D) unit norm
        y: (N,) int64 in [0, classes)
        x_val: (V, D) unit norm
        y_val: (V,) int64 in [0, classes)
        seeds: S different integers
        sample: (S, N, n, D) or (N, n, D), n augmented embeddings an image that are added to the originals, of any norm;
            originals and samples of all seeds become one table, S N (n + 1) D more floats
        target: (S, N, n, C) or (N, n, C), class probabilities of `sample`; without them, the class of its image
        classes: C; without it, the largest class of `y` and `y_val`, plus 1. A class may have no image
        epochs: passes over originals and samples
        batch_size: of a minibatch, counted in originals and samples; few rows make few steps an epoch
        learning_rate: of AdamW
        weight_decay: of AdamW

    Returns:
        The probes. Of epochs with equal validation accuracy the first is kept.

    Raises:
        ValueError: an embedding is not finite or not of unit norm, a class is out of range, a target is no distribution
            (each names the index), shapes do not fit, seeds repeat, or there are no epochs or no rows in a minibatch

    Source:
        LARE, section 3.2 and 4.1: linear probing, AdamW, batch 512, the epoch that is best on the validation data.

    Deviates:
        Learning rate, weight decay, the number of epochs that "best" is searched in and the layer's initial values are
        not given: 1e-2, LADS' released 0.05, 100 and U(-1/sqrt(D), 1/sqrt(D)). Nor is the validation split: the caller
        gives it, and it must hold images of the training domain only.
    """
    x = check_embeddings(x, "x")
    x_val = check_embeddings(x_val, "x_val", V=None, D=x.shape[1])
    check_labels(y, classes, "y", len(x))
    check_labels(y_val, classes, "y_val", len(x_val))
    classes = classes or int(torch.maximum(y.max(), y_val.max())) + 1
    rows, answers = _with_samples(x, y, sample, target, len(seeds), classes)
    weight, bias = linear(seeds, x.shape[1], classes, "probe", like=x)

    def loss(index: Tensor) -> Tensor:
        return cross_entropy(affine(take(rows, index), weight, bias), take(answers, index)) / index.shape[1]

    best = Probe(
        weight.detach().clone(),
        bias.detach().clone(),
        torch.zeros(len(seeds), dtype=torch.int64, device=x.device),
        torch.full((len(seeds),), -1.0, device=x.device),
    )
    steps = train([weight, bias], loss, rows.shape[-2], seeds, epochs, batch_size, learning_rate, weight_decay)
    for epoch in steps:
        now = Probe(weight.detach(), bias.detach(), torch.full_like(best.epoch, epoch), best.accuracy)
        now = now._replace(accuracy=(predict(now, x_val) == y_val).float().mean(1))
        better = now.accuracy > best.accuracy
        best = Probe(*(torch.where(better.view(-1, *[1] * (b.ndim - 1)), a, b) for a, b in zip(now, best)))
    return best


def scores(probe: Probe, x: Tensor) -> Tensor:
    """(B, D) or (S, B, D) -> (S, B, C), larger is better."""
    return affine(x.to(probe.weight.dtype).expand(len(probe.weight), -1, -1), probe.weight, probe.bias)


def predict(probe: Probe, x: Tensor) -> Tensor:
    """(B, D) -> (S, B) int64, the class of each image by each seed; 8192 images at a time."""
    return torch.cat([scores(probe, rows).argmax(2) for rows in x.split(CHUNK)], 1)


def accuracy(prediction: Tensor, y: Tensor, inside: Tensor) -> Accuracy:
    """Accuracy inside the training domain, outside it, and over both.

    Args:
        prediction: (..., B) int64
        y: (B,) int64
        inside: (B,) bool, the image is of the training domain

    Returns:
        Each (...,); nan where there is no image.

    Source:
        LARE, table 1. "Extended" is the accuracy on both domains, pooled over images: the printed 60.40 of 63.27 and
        55.10 is not their mean.
    """
    right = (prediction == y).float()
    return Accuracy(right[..., inside].mean(-1), right[..., ~inside].mean(-1), right.mean(-1))


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


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The layers of all seeds, x weight + bias: (S, B, I), (S, I, O), (S, 1, O) -> (S, B, O)."""
    return _Affine.apply(x, weight, bias) if x.device.type == "cpu" else torch.baddbmm(bias, x, weight)


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


def take(table: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (S, B) of a table that the seeds share, (N,) or (N, D), or of one table each, (S, N, D)."""
    if table.ndim == 3:
        index = index + torch.arange(0, table.shape[0] * table.shape[1], table.shape[1], device=index.device)[:, None]
        table = table.flatten(0, 1)
    return table[index] if table.ndim == 1 else F.embedding(index, table)


def cross_entropy(logits: Tensor, answer: Tensor) -> Tensor:
    """Summed over seeds and images; logits (S, B, C), answer (S, B) int64 or (S, B, C) probabilities."""
    return F.cross_entropy(logits.flatten(0, 1), answer.flatten(0, 1), reduction="sum")


def check_shape(x: Tensor, name: str, **axes: int | None) -> None:
    """Raises unless `x` has these axes, each of its length, or of any where it is None: `check_shape(y, "y", N=50)`."""
    if x.ndim != len(axes) or any(want not in (None, have) for have, want in zip(x.shape, axes.values())):
        known = ", ".join(f"{axis} = {length}" for axis, length in axes.items() if length is not None)
        raise ValueError(f"{name} is {tuple(x.shape)}: give ({', '.join(axes)}){known and ' with ' + known}")


def check_embeddings(x: Tensor, name: str, unit: bool = True, **axes: int | None) -> Tensor:
    """`x` as float32, or float64 where it was; on the CPU, what is not finite or not of unit norm is refused by index.

    `axes` as in `check_shape`; without them (N, D).
    """
    check_shape(x, name, **(axes or {"N": None, "D": None}))
    x = x if x.dtype == torch.float64 else x.float()
    if unit:
        features.check_unit(x, name, NORM_TOLERANCE)
    elif x.device.type == "cpu" and (bad := ~x.isfinite().all(-1)).any():
        raise ValueError(f"{name}{bad.nonzero()[0].tolist()} is not finite: drop it or encode it again")
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


def _with_samples(
    x: Tensor, y: Tensor, sample: Tensor | None, target: Tensor | None, n_seeds: int, classes: int
) -> tuple[Tensor, Tensor]:
    """Originals and samples as one table: (N, D), (N,), or (S, N + N n, D) with (N + N n,) or (S, N + N n, C)."""
    if sample is None:
        return x, y
    axes = {"S": n_seeds} if sample.ndim == 4 else {}
    axes |= {"N": len(x), "n": None}
    sample = check_embeddings(sample, "sample", unit=False, **axes, D=x.shape[1]).to(x.dtype)
    n = sample.shape[-2]
    rows = torch.cat([x[:, None].expand(n_seeds, -1, -1, -1), sample.expand(n_seeds, -1, -1, -1)], 2).flatten(1, 2)
    if target is None:
        return rows, y.repeat_interleave(n + 1)
    check_shape(target, "target", **axes | {"n": n}, C=classes)
    bad = ~((target >= 0).all(-1) & ((target.sum(-1) - 1).abs() < NORM_TOLERANCE))
    if bad.any():
        index = bad.nonzero()[0].tolist()
        raise ValueError(f"target{index} is no distribution over classes: probabilities are >= 0 and sum to 1")
    hard = F.one_hot(y, classes).to(x.dtype)[:, None].expand(n_seeds, -1, -1, -1)
    return rows, torch.cat([hard, target.to(x.dtype).expand(n_seeds, -1, -1, -1)], 2).flatten(1, 2)


METHODS = (Method("linear probe", fit, ("shots",), "#333333", whole),)
