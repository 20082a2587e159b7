"""Tip-Adapter and Tip-Adapter-F: a few labelled images as a cache of keys that vote for their classes.

    f         (D,)     a test embedding, unit norm
    F_train   (K, D)   the keys
    L_train   (K, C)   their labels one-hot, kept as class numbers here
    W_c       (C, D)   the class prompts
    A         (K,)     the affinities
    alpha              weight of the cache
    beta               sharpness of the affinity

    A      = exp(-beta (1 - f F_train^T))
    logits = alpha A L_train + f W_c^T

The second line is a plain sum, `zero_shot + alpha * scores(...)`, with zero-shot scores in units of cosine. The paper
writes 100 f W_c^T, so its alpha is 100 times ours.

Source: Zhang et al., "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification", ECCV 2022, section 3.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from heapq import heappush, heapreplace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from upclose import seeds
from upclose.methods.entry import Method, whole

CHUNK = 2**24  # affinities held at once: 64 MiB


def shots(label: np.ndarray | Tensor, k: int, seed: int = 0) -> Tensor:
    """Draw a few-shot training set: k images of every class.

    The draws of one seed are nested (2 shots contain the 1 shot) and those of a class do not depend on other classes.

    Args:
        label: (n,) class of every training image
        k: images a class; a class with fewer gives all that it has, a class with none gives none
        seed: of the draw

    Returns:
        at most k * C indices into `label`, int64, class after class

    Raises:
        ValueError: k < 1

    Deviates:
        CoOp draws with Python's `random` once a data set; here each class has a stream of its own.
    """
    if k < 1:
        raise ValueError(f"{k} shots a class: at least 1 is needed (0 shots is the zero-shot method)")
    label = np.asarray(label)
    drawn = [seeds.rng(seed, "shots", int(c)).permutation(np.flatnonzero(label == c))[:k] for c in np.unique(label)]
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *drawn]))


def queue(answer: Tensor, entropy: Tensor, capacity: int, admitted: Tensor | None = None) -> Tensor:
    """When each image of a stream leaves its class's queue of the most certain ones.

    An image joins the queue of its answer while there is room, or in the place of the least certain one when its own
    entropy is lower; of equal entropies the youngest leaves first.

    Args:
        answer: (n,) int64, in the order in which the images come
        entropy: (n,) of their predictions
        capacity: images that a class's queue holds
        admitted: (n,) bool, the images that may join; None is all

    Returns:
        (n,) int64 steps: n for those that stay to the end, its own step for an image that never joins
    """
    admitted = torch.ones_like(answer, dtype=torch.bool) if admitted is None else admitted
    if answer.device.type != "cpu":
        return _queue_by_rank(answer, entropy, capacity, admitted)
    queues = defaultdict(list)  # class -> heap of (-entropy, -step): the least certain first
    leave = list(range(len(answer)))
    at = admitted.nonzero().flatten()
    for step, c, h in zip(at.tolist(), answer[at].tolist(), entropy[at].tolist()):
        if len(queues[c]) < capacity:
            heappush(queues[c], (-h, -step))
        elif capacity and h < -queues[c][0][0]:
            leave[-heapreplace(queues[c], (-h, -step))[1]] = step
        else:
            continue
        leave[step] = len(answer)
    return torch.tensor(leave, dtype=torch.int64)


def _queue_by_rank(answer: Tensor, entropy: Tensor, capacity: int, admitted: Tensor) -> Tensor:
    """`queue` without a look at values: an image is out as soon as `capacity` of its class that go before it have come.

    All pairs of images are compared, some rows at a time.
    """
    n = len(answer)
    step, leave = torch.arange(n, device=answer.device), []
    for i in step.split(max(1, CHUNK // max(1, n))):
        h = entropy[i, None]
        better = (entropy < h) | ((entropy == h) & (step < i[:, None]))
        full = ((answer == answer[i, None]) & admitted & better).cumsum(1, dtype=torch.int32) >= capacity
        first = torch.where(full[:, -1], full.to(torch.uint8).argmax(1), n)
        leave.append(torch.where(admitted[i], first.maximum(i), i))
    return torch.cat(leave) if leave else step


def present(leave: Tensor, now: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The images that are in a queue at some of the steps `now`, which follow each other.

    Args:
        leave: (n,) from `queue`
        now: (b,) steps
        most: how many there can be; on a device, which is not asked for their number, others fill up

    Returns:
        (K,) int64 images, and (K, b) bool: whether each is in at each step
    """
    step = torch.arange(len(leave), device=leave.device)
    seen = (step <= now[-1]) & (leave > now[0]) & (leave > step)
    if seen.device.type == "cpu":
        image = seen.nonzero().flatten()
    else:
        image = seen.to(torch.uint8).argsort(descending=True, stable=True)[:most]
    return image, (image[:, None] <= now) & (now < leave[image, None])


def affinity(image: Tensor, key: Tensor, beta: float) -> Tensor:
    """A^T: how near the keys are to images.

    Args:
        image: (B, D) unit norm
        key: (K, D) unit norm
        beta: sharpness, >= 0

    Returns:
        (K, B), exp(-beta (1 - cos)): keys first, so that `cache_logits` adds whole rows

    Source:
        Tip-Adapter, section 3.1.
    """
    return (key @ image.T).sub_(1).mul_(beta).exp_()


def cache_logits(affinity: Tensor, label: Tensor, classes: int) -> Tensor:
    """A L_train: the affinities of each class's keys, summed.

    Args:
        affinity: (K, B), of `affinity`
        label: (K,) int64 in [0, C), the class of each key
        classes: C

    Returns:
        (B, C), 0 for a class without a key

    Source:
        Tip-Adapter, section 3.1.
    """
    return affinity.new_zeros(classes, affinity.shape[1]).index_add_(0, label, affinity).T


def scores(image: Tensor, key: Tensor, label: Tensor, *, classes: int, beta: float) -> Tensor:
    """The cache's votes A L_train, to be added to zero-shot scores as `zero_shot + alpha * scores`.

    A class without a key gets 0, the least that a cache can say; a class with fewer keys than others gets fewer
    votes, as the sum over one-hot values has it. Beside its inputs and result this holds 64 MiB.

    Args:
        image: (B, D) unit norm, the images to classify (or crops, one a row)
        key: (K, D) unit norm; K = 0 is allowed and votes for nothing
        label: (K,) int64, the class of every key
        classes: C
        beta: sharpness, >= 0; at 0 every key counts 1

    Returns:
        (B, C) float32, in [0, keys of the class]

    Raises:
        ValueError: sizes that do not fit, a negative beta, on the CPU a label outside 0 .. C-1

    Source:
        Tip-Adapter, section 3.1.

    Example:
        >>> scores(torch.eye(2), torch.eye(2), torch.tensor([1, 0]), classes=2, beta=5.5).argmax(1)
        tensor([1, 0])
    """
    if len(key) != len(label):
        raise ValueError(f"{len(key)} keys but {len(label)} labels: give one label a key")
    if image.shape[1] != key.shape[1]:
        raise ValueError(f"images of {image.shape[1]} dimensions, keys of {key.shape[1]}: encode both with one model")
    on_cpu = label.device.type == "cpu"  # elsewhere a look at values would stall the device
    if on_cpu and len(label) and not 0 <= int(label.min()) <= int(label.max()) < classes:
        raise ValueError(f"labels {int(label.min())} to {int(label.max())}, but there are {classes} classes")
    if beta < 0:
        raise ValueError(f"beta {beta}: a negative one prefers the least similar key; use 0 or more")
    size = max(1, CHUNK // max(1, len(key)))
    return torch.cat([cache_logits(affinity(part, key, beta), label, classes) for part in image.split(size)])


@torch.enable_grad()
def finetune(
    image: Tensor,
    target: Tensor,
    zero_shot: Tensor,
    key: Tensor,
    label: Tensor,
    *,
    alpha: float,
    beta: float,
    epochs: int = 20,
    learning_rate: float = 1e-3,
    batch_size: int = 256,
    seed: int = 0,
    logit_scale: float = 100.0,
) -> Tensor:
    """Tip-Adapter-F: train the keys by cross-entropy on the shots; their labels and both encoders stay frozen.

    Everything here belongs to the training shots. `image` may hold several augmented views of a shot as rows of their
    own (its crops, say), with `target` and `zero_shot` repeated.

    Args:
        image: (B, D) unit norm, training images
        target: (B,) int64, their classes
        zero_shot: (B, C) their scores in units of cosine
        key: (K, D) keys to start from, left unchanged
        label: (K,) int64, the classes of the keys
        alpha: weight of the cache, as in `zero_shot + alpha * cache`
        beta: sharpness of the affinity
        epochs: passes over `image`, >= 1
        learning_rate: of AdamW at the start, cosine to 0 over all steps
        batch_size: images a step
        seed: of the order of the images; drawn on the CPU, so the same on every device
        logit_scale: CLIP's, which turns cosines into logits for the loss

    Returns:
        (K, D) trained keys, for `scores` in the place of `key`; no longer of unit norm

    Raises:
        ValueError: sizes that do not fit, or no training image

    Source:
        Tip-Adapter, section 3.2.

    Deviates:
        The released program draws a new random crop of each shot every epoch; here the embeddings are given, so that a
        run needs no encoder. AdamW's eps 1e-4 and its weight decay 0.01 are the released program's.
    """
    if not len(image) == len(target) == len(zero_shot) or len(image) == 0:
        raise ValueError(
            f"{len(image)} images, {len(target)} targets, {len(zero_shot)} zero-shot rows: give as many of each"
        )
    if len(key) != len(label):
        raise ValueError(f"{len(key)} keys but {len(label)} labels: give one label a key")
    key = key.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([key], lr=learning_rate, eps=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(image) // batch_size))
    generator = seeds.generator(seed, "tip_adapter.finetune")
    for _ in range(epochs):
        for rows in torch.randperm(len(image), generator=generator).to(image.device).split(batch_size):
            cache = cache_logits(affinity(image[rows], key, beta), label, zero_shot.shape[1])
            loss = cross_entropy(logit_scale * (zero_shot[rows] + alpha * cache), target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return key.detach()


class Choice(NamedTuple):
    """Attributes: alpha and beta of the best accuracy, and that accuracy, in 0 .. 1."""

    alpha: float
    beta: float
    accuracy: float


def search(
    zero_shot: Tensor,
    cache: Callable[[float], Tensor],
    label: Tensor,
    *,
    alphas: Sequence[float],
    betas: Sequence[float],
) -> Choice:
    """Choose alpha and beta on validation images: the pair with the best accuracy of `zero_shot + alpha * cache(beta)`.

    Args:
        zero_shot: (B, C) scores of the validation images
        cache: beta -> (B, C) cache scores of the same images; called once a beta
        label: (B,) their classes
        alphas: weights to try; 0 is the zero-shot method
        betas: sharpnesses to try

    Returns:
        the best pair; of equals the first alpha, then the first beta, in the order given

    Raises:
        ValueError: nothing to try, or no image
    """
    if not (len(alphas) and len(betas) and len(label)):
        raise ValueError(
            f"{len(alphas)} alphas, {len(betas)} betas, {len(label)} images: at least one of each is needed"
        )
    accuracy = torch.tensor(
        [
            [float(((zero_shot + alpha * cached).argmax(1) == label).float().mean()) for alpha in alphas]
            for cached in map(cache, betas)
        ]
    )  # (betas, alphas)
    a, b = divmod(int(accuracy.T.flatten().argmax()), len(betas))
    return Choice(alphas[a], betas[b], float(accuracy[b, a]))


METHODS = (
    Method("Tip-Adapter", scores, ("shots",), "#5b7f2b", whole),
    Method("Tip-Adapter-F", finetune, ("shots",), "#2f4a0e", whole),
)
