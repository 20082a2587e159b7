"""TDA, a training-free dynamic adapter: a stream's most certain images vote for their class, its doubtful ones against.

    f             (D,)   an image, unit norm
    l, p          (C,)   its logits, 100 f W^T, and their softmax
    H                    the entropy of p in nats
    k                    a cached image with its answer c_k and its p_k
    alpha, beta          weight and sharpness of the positive cache

    l + alpha sum_k exp(-beta (1 - f.k)) onehot(c_k) - 0.117 sum_k exp(-(1 - f.k)) [0.03 < p_k < 1]

The first sum runs over the positive cache: of every class the images with the smallest H. The second runs over the
negative cache: of every class at most two images with 0.2 < H / log2(C) < 0.5.

Source: Karmanov et al., "Efficient Test-Time Adaptation of Vision-Language Models", CVPR 2024 (arXiv 2403.18293).
"""

from __future__ import annotations

from math import log2

import torch
from torch import Tensor

from upclose.features import check_unit
from upclose.methods import tip_adapter
from upclose.methods.entry import Method, whole

NEGATIVE_WEIGHT, NEGATIVE_BETA, NEGATIVE_CAPACITY = 0.117, 1.0, 2
DOUBT = (0.2, 0.5)  # between these shares of log2(C) an entropy is doubtful
UNLIKELY = 0.03  # a doubtful image votes against the classes to which it gave more than this
BLOCK = 1024  # images that are answered at once


def stream(
    image: Tensor,
    label: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 5.0,
    capacity: int = 3,
    negative: bool = True,
    logit_scale: float = 100.0,
) -> Tensor:
    """Classify a stream of images with caches that fill as it goes; no label is taken.

    An image is admitted first and answered then, with the caches as they are. Who is in them depends on CLIP's own
    answers alone, so that is settled first, image after image, and the votes are taken in blocks.

    Args:
        image: (B, D) unit norm, in the order in which they come
        label: (C, D) unit norm
        alpha: weight of the positive cache. The released program has a pair of alpha and beta for every data set, found
            on its test labels, which is a leak; 2 and 5 are its pair for ImageNet
        beta: sharpness of the positive cache
        capacity: images that a class's positive cache holds; the negative one holds at most two and no more than this,
            so that 0 is CLIP
        negative: use the negative cache
        logit_scale: multiplies the cosines

    Returns:
        (B, C) logits in stream order

    Raises:
        ValueError: an embedding that is not finite or not of unit norm (on the CPU), or a negative capacity

    Source:
        Sections 3.2 and 3.3; thresholds and weights are the released program's.

    Deviates:
        As the program, H in nats is divided by log2(C). Of equal entropies the youngest image leaves a full cache, and
        an equal one does not enter.
    """
    check_unit(image, "image")
    check_unit(label, "label")
    if capacity < 0:
        raise ValueError(f"a capacity of {capacity}: a class's cache holds 0 images or more")
    logits = logit_scale * image @ label.T
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    entropy, answer = -(p * log_p).sum(1), logits.argmax(1)
    certain = torch.ones_like(answer, dtype=torch.bool)
    ballot = torch.nn.functional.one_hot(answer, len(label)).to(p)
    out = logits + alpha * _cache_logits(image, answer, entropy, certain, ballot, beta, capacity)
    if negative and len(label) > 1:
        share = entropy / log2(len(label))
        doubtful = (DOUBT[0] < share) & (share < DOUBT[1])
        ballot = ((p > UNLIKELY) & (p < 1)).to(p)
        room = min(NEGATIVE_CAPACITY, capacity)
        out -= NEGATIVE_WEIGHT * _cache_logits(image, answer, entropy, doubtful, ballot, NEGATIVE_BETA, room)
    return out


def _cache_logits(
    image: Tensor, answer: Tensor, entropy: Tensor, admitted: Tensor, ballot: Tensor, beta: float, capacity: int
) -> Tensor:
    """(B, C): for every image the ballots (B, C) of those in the cache when it is answered, by likeness."""
    if not len(image):
        return ballot
    leave, out = tip_adapter.queue(answer, entropy, capacity, admitted), []
    for now in torch.arange(len(image), device=image.device).split(BLOCK):
        key, held = tip_adapter.present(leave, now, ballot.shape[1] * capacity + BLOCK)
        out.append((tip_adapter.affinity(image[now], image[key], beta) * held).T @ ballot[key])
    return torch.cat(out)


METHODS = (Method("TDA", lambda views, text: stream(views.image, text.label), ("stream",), "#6bc4c4", whole),)
