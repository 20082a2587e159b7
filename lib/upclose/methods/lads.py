"""LADS, latent augmentation using domain descriptions: embeddings are moved to a domain that only its name describes.

    I_theta(x_i), y_i       (N, D), (N,)   image embedding of unit norm, its class                  x, y
    T_theta(y)              (C, D)         embedding of "a photo of a [label]", of unit norm        label
    T_theta(t_training, y)  (C, D)         embedding of "a photo of a [label]", or of whatever the  text_train
                                           training domain is
    T_theta(t_unseen, y)    (C, D)         embedding of "a painting of a [label]"                   text_unseen
    f_aug                                  R^D -> R^D, two layers                                   network
    alpha                                  weight of domain alignment against class consistency     alpha

LARE needs no name of the domain.

Source: Dunlap et al., "Using Language to Extend to Unseen Domains", ICLR 2023 (arXiv 2210.09520), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from upclose.methods import ensemble
from upclose.methods.ensemble import SEEDS, Network
from upclose.methods.entry import Method, whole


def fit(
    x: Tensor,
    y: Tensor,
    label: Tensor,
    text_train: Tensor,
    text_unseen: Tensor,
    seeds: Sequence[int] = SEEDS,
    *,
    alpha: float = 0.5,
    epochs: int = 100,
    batch_size: int = 512,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    hidden: int | None = None,
    logit_scale: float = 100.0,
) -> Network:
    """Train f_aug towards one unseen domain, for all seeds at once.

    Args:
        x: (N, D) unit norm
        y: (N,) int64 in [0, C)
        label: (C, D) unit norm
        text_train: (C, D), or (D,) the same for all classes, unit norm
        text_unseen: (C, D), or (D,) the same for all classes, unit norm
        seeds: S different integers
        alpha: in [0, 1]: 0 only keeps the classes, 1 only moves to the domain
        epochs: passes over the images
        batch_size: images a step
        learning_rate: of AdamW
        weight_decay: of AdamW
        hidden: units between the layers, None = D / 2
        logit_scale: multiplies the cosines before the softmax

    Returns:
        f_aug of every seed; `augment` applies it. One network an unseen domain: call again for the next domain.

    Raises:
        ValueError: an embedding is not finite or not of unit norm, a class is out of range, both domains' texts of a
            class are equal (each names the index), shapes do not fit, alpha is outside [0, 1], seeds repeat, or there
            are no epochs or no rows in a minibatch

    Source:
        LADS, section 3: L = alpha L_DA + (1 - alpha) L_CC.

    Deviates:
        The released program (github.com/lisadunlap/LADS) has
        - no scale in L_CC, whose logits are plain cosines, and weights its classes by how rare they are. Here
          `logit_scale` is CLIP's 100, since the paper describes L_CC as CLIP's zero-shot classification, and classes
          weigh alike;
        - the epoch whose loss on the validation images is smallest; here the last one is kept;
        - 200 epochs and batch 256 for CUB; here 100 and 512 as for LARE's network, so that the two differ in their
          losses only.
        As there: alpha 0.5, the learning rate 1e-3 and decay 0.05 of CUB, D / 2 hidden units for D = 768, f(x) as it
        is in L_DA and normalised in L_CC and in what is added to the training set.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}: it weighs domain alignment against class consistency, from 0 to 1")
    x = ensemble.check_embeddings(x, "x")
    label = ensemble.check_embeddings(label, "label", C=None, D=x.shape[1]).to(x.dtype)
    ensemble.check_labels(y, len(label), "y", len(x))
    text_train, text_unseen = (
        ensemble.check_embeddings(
            text.expand(len(label), -1) if text.ndim == 1 else text, name, C=len(label), D=x.shape[1]
        ).to(x.dtype)
        for text, name in ((text_train, "text_train"), (text_unseen, "text_unseen"))
    )
    equal = (text_train == text_unseen).all(1)
    if equal.any():
        c = int(equal.nonzero()[0])
        raise ValueError(f"text_train[{c}] equals text_unseen[{c}]: there is no direction to the unseen domain")
    direction = text_unseen - text_train
    network = ensemble.network(seeds, x.shape[1], x.shape[1], hidden, "lads", like=x)

    def objective(index: Tensor) -> Tensor:
        rows, classes = ensemble.take(x, index), y[index]
        moved = network(rows)
        consistency = ensemble.cross_entropy(logit_scale * F.normalize(moved, dim=2) @ label.T, classes)
        return alpha * domain_alignment_loss(rows, moved, ensemble.take(direction, classes)) + (1 - alpha) * consistency

    for _ in ensemble.train(network, objective, len(x), seeds, epochs, batch_size, learning_rate, weight_decay):
        pass
    return Network(*(part.detach() for part in network))


def augment(network: Network, x: Tensor) -> Tensor:
    """f_aug: the images in the unseen domain.

    Args:
        network: of `fit`
        x: (B, D), the same images for all seeds, or (S, B, D), unit norm

    Returns:
        (S, B, D) unit norm; as samples of the probe, `augment(...)[:, :, None]`

    Source:
        LADS, section 3: f(x) normalised, as in L_CC.
    """
    return F.normalize(network(x.to(network.bias_in.dtype)), dim=2)


def domain_alignment_loss(x: Tensor, moved: Tensor, direction: Tensor) -> Tensor:
    """L_DA: the sum over images of 1 - cos(f(x) - x, t_unseen - t_train).

    Args:
        x: (..., D)
        moved: (..., D) f(x), not normalised
        direction: (..., D) t_unseen - t_train of each image's class

    Returns:
        scalar

    Source:
        LADS, section 3.
    """
    return (1 - F.cosine_similarity(moved - x, direction, dim=-1)).sum()


METHODS = (Method("LADS", fit, ("shots",), "#9f8cc9", whole),)
