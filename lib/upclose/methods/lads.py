"""LADS: Latent Augmentation using Domain descriptionS (Dunlap et al., Using Language to Extend to Unseen Domains).

A network moves an image embedding from its domain to one that only its name describes. LARE needs no such name.

    paper                   here            shape     meaning
    I_theta(x_i), y_i       x, y            (N, D)    image embedding of unit norm, its class (N,)
    T_theta(y)              label           (C, D)    embedding of "a photo of a [label]", of unit norm
    T_theta(t_training, y)  text_train      (C, D)    embedding of "a photo of a [label]", or of
                                                      whatever the training domain is
    T_theta(t_unseen, y)    text_unseen     (C, D)    embedding of "a painting of a [label]"
    f_aug                   network         Network   R^D -> R^D, two layers
    alpha                   alpha           -         weight of domain alignment against class consistency
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from upclose.methods import probe
from upclose.methods.probe import Network


def fit(
    x: Tensor,
    y: Tensor,
    label: Tensor,
    text_train: Tensor,
    text_unseen: Tensor,
    seeds: Sequence[int] = probe.SEEDS,
    *,
    alpha: float = 0.5,
    epochs: int = 100,
    batch: int = 512,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    hidden: int | None = None,
    scale: float = 100.0,
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
        batch: images a step
        learning_rate: of AdamW
        weight_decay: of AdamW
        hidden: units between the layers, None = D / 2
        scale: multiplies the cosines before the softmax

    Returns:
        f_aug of every seed; `augment` applies it. One network an unseen domain: call again for the next domain.

    Raises:
        ValueError: an embedding is not finite or not of unit norm, a class is out of range (each names the index),
            both domains' texts of a class are equal, alpha is outside [0, 1], or seeds repeat

    Source:
        LADS, section 3: L = alpha L_DA + (1 - alpha) L_CC.

    Deviates:
        alpha is 0.5, the released default.
        100 epochs and batch 512 as for LARE's network, so that the two differ in their losses only; hidden units,
        learning rate and decay as in `upclose.methods.lare`. `scale` is CLIP's 100, since L_CC is described as CLIP's
        zero-shot classification.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}: it weighs domain alignment against class consistency, from 0 to 1")
    probe.check_labels(y, len(label), "y", len(x))
    x, label = probe.check_embeddings(x, "x"), probe.check_embeddings(label, "label").to(x.dtype)
    text_train, text_unseen = (
        probe.check_embeddings(text, name).to(x.dtype).expand_as(label)
        for text, name in ((text_train, "text_train"), (text_unseen, "text_unseen"))
    )
    equal = (text_train == text_unseen).all(1)
    if equal.any():
        c = int(equal.nonzero()[0])
        raise ValueError(f"text_train[{c}] equals text_unseen[{c}]: there is no direction to the unseen domain")
    direction = text_unseen - text_train
    network = probe.network(seeds, x.shape[1], x.shape[1], hidden, "lads", like=x)

    def objective(index: Tensor) -> Tensor:
        rows, classes = probe.take(x, index), y[index]
        moved = augment(network, rows)
        consistency = probe.cross_entropy(scale * moved @ label.T, classes)
        return alpha * domain_alignment_loss(rows, moved, probe.take(direction, classes)) + (1 - alpha) * consistency

    for _ in probe.train(network, objective, len(x), seeds, epochs, batch, learning_rate, weight_decay):
        pass
    return Network(*(part.detach() for part in network))


def augment(network: Network, x: Tensor) -> Tensor:
    """f_aug: (B, D) or (S, B, D) -> (S, B, D) unit norm. As samples of the probe: `augment(...)[:, :, None]`."""
    return F.normalize(network(x.to(network.bias_in.dtype)), dim=2)


def domain_alignment_loss(x: Tensor, moved: Tensor, direction: Tensor) -> Tensor:
    """L_DA: the sum over images of 1 - cos(f(x) - x, t_unseen - t_train), all (..., D)."""
    return (1 - F.cosine_similarity(moved - x, direction, dim=-1)).sum()
