"""The linear probe, of S seeds at once.

    S seeds, N images, D embedding dimensions, C classes
    x (N, D), y (N,)                    image embeddings of unit norm and their classes
    weight (S, D, C), bias (S, 1, C)    the probe, one linear layer a seed: scores = x weight + bias

Source: LARE, sections 3.2 and 4.1 (linear probing).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from upclose import features
from upclose.methods import ensemble
from upclose.methods.ensemble import NORM_TOLERANCE, SEEDS
from upclose.methods.entry import Method, whole

CHUNK = 8192


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


def split(x: Tensor, y: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four fifths of the images of every class to train on, one fifth to validate, drawn at random.

    Args:
        x: (n, D)
        y: (n,) int64
        seed: of the draw

    Returns:
        x, y, x_val, y_val, as `fit` takes them; of a class with fewer than five images some fifths have none
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")
        train, held = next(StratifiedKFold(5, shuffle=True, random_state=seed).split(x.cpu(), y.cpu()))
    return x[train], y[train], x[held], y[held]


def pick(y: Tensor, k: int | Tensor, generator: torch.Generator) -> Tensor:
    """The positions of k images of every class, in the order in which they are drawn; fewer where a class has fewer.

    Args:
        y: (n,) int64 in [0, C)
        k: a number, or (C,) of them
        generator: on the CPU

    Returns:
        (m,) int64

    Example:
        >>> few = pick(torch.tensor([0, 0, 0, 1, 1]), 1, torch.Generator().manual_seed(0))
        >>> sorted(torch.tensor([0, 0, 0, 1, 1])[few].tolist())
        [0, 1]
    """
    order = torch.randperm(len(y), generator=generator).to(y.device)
    rank = F.one_hot(y[order]).cumsum(0).gather(1, y[order, None])[:, 0] - 1  # within its class
    k = torch.as_tensor(k, device=y.device)
    return order[rank < (k[y[order]] if k.ndim else k)]


def epochs_of(steps: int, images: int, samples: int = 0, batch_size: int = 512) -> int:
    """Passes over the images and their samples that make so many steps, so that probes with more rows train as long.

    Args:
        steps: of AdamW, at least
        images: N
        samples: of each image, n
        batch_size: of a minibatch

    Example:
        >>> epochs_of(100, images=64, samples=1, batch_size=32)  # four steps an epoch
        25
    """
    return ceil(steps / ceil(images * (1 + samples) / batch_size))


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

    Example:
        >>> x, y = torch.eye(2).repeat(4, 1), torch.tensor([0, 1]).repeat(4)
        >>> fitted = fit(x, y, x, y, seeds=[0, 1], epochs=5, learning_rate=0.5)
        >>> predict(fitted, torch.eye(2)).tolist()
        [[0, 1], [0, 1]]
    """
    x = ensemble.check_embeddings(x, "x")
    x_val = ensemble.check_embeddings(x_val, "x_val", V=None, D=x.shape[1])
    ensemble.check_labels(y, classes, "y", len(x))
    ensemble.check_labels(y_val, classes, "y_val", len(x_val))
    classes = classes or int(torch.maximum(y.max(), y_val.max())) + 1
    rows, answers = _with_samples(x, y, sample, target, len(seeds), classes)
    weight, bias = ensemble.linear(seeds, x.shape[1], classes, "probe", like=x)

    def loss(index: Tensor) -> Tensor:
        return (
            ensemble.cross_entropy(
                ensemble.affine(ensemble.take(rows, index), weight, bias), ensemble.take(answers, index)
            )
            / index.shape[1]
        )

    best = Probe(
        weight.detach().clone(),
        bias.detach().clone(),
        torch.zeros(len(seeds), dtype=torch.int64, device=x.device),
        torch.full((len(seeds),), -1.0, device=x.device),
    )
    steps = ensemble.train([weight, bias], loss, rows.shape[-2], seeds, epochs, batch_size, learning_rate, weight_decay)
    for epoch in steps:
        now = Probe(weight.detach(), bias.detach(), torch.full_like(best.epoch, epoch), best.accuracy)
        now = now._replace(accuracy=(predict(now, x_val) == y_val).float().mean(1))
        better = now.accuracy > best.accuracy
        best = Probe(*(torch.where(better.view(-1, *[1] * (b.ndim - 1)), a, b) for a, b in zip(now, best)))
    return best


def scores(probe: Probe, x: Tensor) -> Tensor:
    """Scores of every seed, x weight + bias.

    Args:
        probe: of S seeds
        x: (B, D), the same images for all seeds, or (S, B, D)

    Returns:
        (S, B, C), larger is better

    Source:
        LARE, section 3.2.
    """
    return ensemble.affine(x.to(probe.weight.dtype).expand(len(probe.weight), -1, -1), probe.weight, probe.bias)


def predict(probe: Probe, x: Tensor) -> Tensor:
    """The class of each image by each seed, 8,192 images at a time.

    Args:
        probe: of S seeds
        x: (B, D)

    Returns:
        (S, B) int64

    Source:
        LARE, section 3.2.
    """
    return torch.cat([scores(probe, rows).argmax(2) for rows in x.split(CHUNK)], 1)


def _with_samples(
    x: Tensor, y: Tensor, sample: Tensor | None, target: Tensor | None, n_seeds: int, classes: int
) -> tuple[Tensor, Tensor]:
    """Originals and samples as one table: (N, D), (N,), or (S, N + N n, D) with (N + N n,) or (S, N + N n, C)."""
    if sample is None:
        return x, y
    axes = {"S": n_seeds} if sample.ndim == 4 else {}
    axes |= {"N": len(x), "n": None}
    ensemble.check_shape(sample, "sample", **axes, D=x.shape[1])
    features.check_finite(sample, "sample")
    sample = sample.to(x.dtype)
    n = sample.shape[-2]
    rows = torch.cat([x[:, None].expand(n_seeds, -1, -1, -1), sample.expand(n_seeds, -1, -1, -1)], 2).flatten(1, 2)
    if target is None:
        return rows, y.repeat_interleave(n + 1)
    ensemble.check_shape(target, "target", **axes | {"n": n}, C=classes)
    bad = ~((target >= 0).all(-1) & ((target.sum(-1) - 1).abs() < NORM_TOLERANCE))
    if bad.any():
        index = bad.nonzero()[0].tolist()
        raise ValueError(f"target{index} is no distribution over classes: probabilities are >= 0 and sum to 1")
    hard = F.one_hot(y, classes).to(x.dtype)[:, None].expand(n_seeds, -1, -1, -1)
    return rows, torch.cat([hard, target.to(x.dtype).expand(n_seeds, -1, -1, -1)], 2).flatten(1, 2)


METHODS = (Method("linear probe", fit, ("shots",), "#5a5a5a", whole),)
