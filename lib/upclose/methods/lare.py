"""LARE, latent augmentation using regional embedding: an image is a box, whose points train a linear probe.

    x_i, y_i     (N, D), (N,)   image embedding of unit norm, its class              x, y
    T_theta(y)   (C, D)         embedding of "a photo of a [label]", of unit norm    label
    f_Box                       R^D -> R^2D, two layers                              network
    X^-, X^+     (S, N, D)      corners of unit norm, one box an image and seed;     minus, plus
                                X^-_j may exceed X^+_j
    n                           minibatch size                                       B
    alpha                       weight of class consistency against volume           alpha

Stage 1 is `fit_boxes`; stage 2 is `sample` and `probe.fit(..., sample=...)`. `noise` and `mixup` are the controls in
the same budget of samples, which tell boxes from mere augmentation.

Source: Sakurai et al., "LARE: Latent Augmentation using Regional Embedding with Vision-Language Model" (arXiv
2409.12597), equations by number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from upclose.methods import ensemble
from upclose.methods.ensemble import SEEDS, Network
from upclose.methods.entry import Method, whole


class Boxes(NamedTuple):
    """Two opposite corners of a box around every image (eq. 2), in no order: minus_j may exceed plus_j.

    Attributes:
        minus: (S, N, D) unit norm, the corner X^-
        plus: (S, N, D) unit norm, the corner X^+
    """

    minus: Tensor
    plus: Tensor


class Losses(NamedTuple):
    """Scalars.

    Attributes:
        volume: eq. 3, L_BV
        minus: eq. 4, L_CC^- at corner X^-
        plus: eq. 5, L_CC^+ at corner X^+
        centre: eq. 6, L_CC at their mean
    """

    volume: Tensor
    minus: Tensor
    plus: Tensor
    centre: Tensor


class Mixed(NamedTuple):
    """Mixtures of two images.

    Attributes:
        sample: (S, N, n, D)
        target: (S, N, n, C) class probabilities
    """

    sample: Tensor
    target: Tensor


def fit_boxes(
    x: Tensor, y: Tensor, label: Tensor, alpha: float = 0.9, seeds: Sequence[int] = SEEDS, **options
) -> Boxes:
    """Stage 1: the boxes of the training images themselves, for all seeds at once: f_Box is `fit_network`'s.

    Args:
        x: (N, D) unit norm
        y: (N,) int64 in [0, C); a class may have no image
        label: (C, D) unit norm
        alpha: in [0, 1]: 0 only enlarges the boxes, 1 only keeps their classes
        seeds: S different integers
        options: the others of `fit_network`

    Returns:
        Corners (S, N, D), 8 S N D bytes in float32.

    Raises:
        ValueError: as `fit_network`

    Source:
        LARE, section 3.1, eqs. 1-7; section 4.1.
    """
    return f_box(fit_network(x, y, label, alpha, seeds, **options), x)


def fit_network(
    x: Tensor,
    y: Tensor,
    label: Tensor,
    alpha: float = 0.9,
    seeds: Sequence[int] = SEEDS,
    *,
    epochs: int = 100,
    batch_size: int = 512,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    hidden: int | None = None,
    logit_scale: float = 1.0,
) -> Network:
    """Stage 1: train f_Box, for all seeds at once, on eq. 7.

    Args:
        x: (N, D) unit norm
        y: (N,) int64 in [0, C); a class may have no image
        label: (C, D) unit norm
        alpha: in [0, 1]: 0 only enlarges the boxes, 1 only keeps their classes
        seeds: S different integers
        epochs: passes over the images
        batch_size: images a step
        learning_rate: of AdamW
        weight_decay: of AdamW
        hidden: units between f_Box's layers, None = D / 2
        logit_scale: multiplies the cosines before the softmax of eqs. 4-6

    Returns:
        f_Box of every seed.

    Raises:
        ValueError: an embedding is not finite or not of unit norm, a class is out of range (each names the index),
            shapes do not fit, alpha is outside [0, 1], seeds repeat, or there are no epochs or no rows in a minibatch

    Source:
        LARE, section 3.1, eqs. 1-7; section 4.1: AdamW, batch 512, 100 epochs.

    Deviates:
        The paper is silent about

        - alpha: 0.9. Without a logit scale the class terms pull weakly: on made-up
          embeddings around their labels most corners had left their class at 0.5, and 95 % kept it at 0.9;
        - f_Box: two layers with a ReLU, D / 2 hidden units, as LADS' released augmentation network for D = 768;
        - the learning rate and decay: 1e-3 and 0.05, LADS' released values for CUB;
        - the logit scale: eqs. 4-6 print none, so `logit_scale` is 1; CLIP's own zero-shot softmax has 100;
        - the centre: eq. 6 prints the plain mean of the corners, not its direction, so it is not normalised (and a
          centre of norm 0, at alpha 0, is an ordinary value: it scores all classes alike);
        - the corners' order: eq. 2 needs X^- <= X^+ in every dimension, but nothing in eqs. 3-7 asks f_Box for it. The
          box is taken to be what the two corners span, whichever is larger.

        Eqs. 4-6 print T_theta(y_i) inside the softmax: it runs over the label embeddings of all C classes.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}: it weighs class consistency against volume, from 0 to 1")
    x = ensemble.check_embeddings(x, "x")
    label = ensemble.check_embeddings(label, "label", C=None, D=x.shape[1]).to(x.dtype)
    ensemble.check_labels(y, len(label), "y", len(x))
    network = ensemble.network(seeds, x.shape[1], 2 * x.shape[1], hidden, "lare", like=x)

    def loss(index: Tensor) -> Tensor:
        return objective(
            corner_losses(_corners(network, ensemble.take(x, index)), label, y[index], logit_scale=logit_scale), alpha
        )

    for _ in ensemble.train(network, loss, len(x), seeds, epochs, batch_size, learning_rate, weight_decay):
        pass
    return Network(*(part.detach() for part in network))


def f_box(network: Network, x: Tensor) -> Boxes:
    """The corners of images, each normalised.

    Args:
        network: f_Box of S seeds
        x: (B, D), the same images for all seeds, or (S, B, D)

    Returns:
        (S, B, D) each

    Source:
        Eq. 2.
    """
    return Boxes(*(F.normalize(corner, dim=2) for corner in _corners(network, x.to(network.bias_in.dtype)).unbind(2)))


def losses(boxes: Boxes, label: Tensor, y: Tensor, *, logit_scale: float = 1.0) -> Losses:
    """Eqs. 3-6, each summed over the images and seeds.

    Args:
        boxes: corners (S, B, D) of any norm: their directions count
        label: (C, D) unit norm, without gradients
        y: (S, B) int64
        logit_scale: multiplies the cosines before the softmax

    Returns:
        four scalars

    Source:
        Eqs. 3-6.
    """
    return corner_losses(torch.stack(boxes, 2), label, y, logit_scale=logit_scale)


def corner_losses(corners: Tensor, label: Tensor, y: Tensor, *, logit_scale: float = 1.0) -> Losses:
    """`losses` of both corners in one tensor, as f_Box gives them.

    Args:
        corners: (S, B, 2, D), X^- and X^+, of any norm
        label: (C, D) unit norm, without gradients
        y: (S, B) int64
        logit_scale: multiplies the cosines before the softmax

    Returns:
        four scalars, summed over the images and seeds

    Source:
        Eqs. 3-6.
    """
    between, with_labels = ensemble.cosines(corners, label)
    minus, plus = (logit_scale * with_labels).unbind(2)
    return Losses(
        volume=between.sum(),  # eq. 3
        minus=ensemble.cross_entropy(minus, y),  # eq. 4
        plus=ensemble.cross_entropy(plus, y),  # eq. 5
        centre=ensemble.cross_entropy((minus + plus) / 2, y),  # eq. 6: a product with the mean is the mean
    )


def objective(losses: Losses, alpha: float) -> Tensor:
    """(1 - alpha) L_BV + alpha (L_CC^- + L_CC^+ + L_CC) / 3.

    Args:
        losses: of eqs. 3-6
        alpha: weight of class consistency, in [0, 1]

    Returns:
        scalar

    Source:
        Eq. 7.
    """
    return (1 - alpha) * losses.volume + alpha * (losses.minus + losses.plus + losses.centre) / 3


def sample(boxes: Boxes, n: int, generator: torch.Generator | Sequence[torch.Generator]) -> Tensor:
    """Stage 2: n points an image, uniform between its corners in every dimension by itself.

    Args:
        boxes: corners (S, N, D)
        n: points an image; the paper takes 3 (CIFAR-100), 5 (CUB) or 40 (DomainNet)
        generator: one, or S of them, one a seed: then a seed's points do not depend on the other seeds

    Returns:
        (S, N, n, D), 4 S N n D bytes in float32.

    Source:
        LARE, section 3.2.

    Deviates:
        The paper does not say whether samples are normalised. They are not: a normalised point may lie outside the box.
        `torch.nn.functional.normalize(points, dim=-1)` gives the other reading. X^- <= X^+ is not needed.

    Example:
        >>> boxes = Boxes(torch.zeros(1, 1, 2), torch.ones(1, 1, 2))  # one seed, one image
        >>> points = sample(boxes, 3, torch.Generator().manual_seed(0))
        >>> points.shape, bool(((points >= 0) & (points <= 1)).all())
        (torch.Size([1, 1, 3, 2]), True)
    """
    minus, plus = (corner.unsqueeze(-2) for corner in boxes)
    shape = (*minus.shape[:-2], n, minus.shape[-1])
    weight = _draw(torch.rand, shape, generator, minus)
    return torch.lerp(minus, plus, weight, out=weight)


def log_volume(boxes: Boxes) -> Tensor:
    """(S, N): the natural logarithm of the product of the side lengths.

    A side shorter than the resolution of the corners' numbers (`torch.finfo(dtype).eps`, 1.2e-7 in float32) is counted
    as that: two corners may agree in a dimension by rounding alone, and the box would have no volume for it.

    Source:
        LARE, section 4.3, table 4.

    Deviates:
        In logarithms, since 0.1^1024 is 0 in any float. Table 4 averages volumes over the images of a class; the mean
        of these is that of log-volumes, in which no single large box outweighs all others.
    """
    side = (boxes.plus - boxes.minus).abs()
    return side.clamp_min(torch.finfo(side.dtype).eps).log().sum(-1)


def noise(x: Tensor, boxes: Boxes, n: int, generator: torch.Generator | Sequence[torch.Generator]) -> Tensor:
    """The control without a direction: Gaussian noise around an image, as far from it as points of its box are.

    The variance, equal in all dimensions, is E||p - x||^2 / D over points p of the image's own box: the squared
    distance of centre and image, plus the sum of side^2 / 12.

    Args:
        x: (N, D)
        boxes: corners (S, N, D)
        n: points an image
        generator: as in `sample`

    Returns:
        (S, N, n, D)
    """
    minus, plus = boxes
    square = ((minus + plus) / 2 - x).square() + (plus - minus).square() / 12
    deviation = square.mean(-1).sqrt()[..., None, None]
    return x[:, None] + deviation * _draw(torch.randn, (*minus.shape[:-1], n, minus.shape[-1]), generator, minus)


def mixup(x: Tensor, y: Tensor, n: int, classes: int, generator: Sequence[torch.Generator]) -> Mixed:
    """The control without a network: convex mixtures of an image with n random ones, and of their classes.

    Args:
        x: (N, D)
        y: (N,) int64 in [0, classes)
        n: mixtures an image, each with an image drawn from all N, itself among them
        classes: C
        generator: S of them, one a seed

    Raises:
        ValueError: a class is out of range (names the index)

    Source:
        Zhang et al., mixup: Beyond Empirical Risk Minimization, with weights Beta(1, 1), which is uniform.
    """
    ensemble.check_labels(y, classes, "y", len(x))
    shape = (len(generator), len(x), n)
    own = _draw(torch.rand, shape, generator, x)[..., None]
    other = (_draw(torch.rand, shape, generator, x.double()) * len(x)).long()
    one_hot = F.one_hot(y, classes).to(x.dtype)
    return Mixed(*(torch.lerp(table[other], table[:, None], own) for table in (x, one_hot)))


def _corners(network: Network, x: Tensor) -> Tensor:
    """(S, B, 2, D), X^- and X^+ before they are normalised."""
    return network(x).unflatten(2, (2, -1))


def _draw(
    draw: Callable[..., Tensor],
    shape: Sequence[int],
    generator: torch.Generator | Sequence[torch.Generator],
    like: Tensor,
) -> Tensor:
    if isinstance(generator, torch.Generator):
        return draw(shape, generator=generator, dtype=like.dtype, device=generator.device).to(like.device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for {shape[0]} seeds: give one a seed, or a single one for all")
    return torch.stack([_draw(draw, shape[1:], one, like) for one in generator])


METHODS = (Method("LARE", fit_boxes, ("shots",), "#44307a", whole, rows=("repeated", "Gaussian noise", "mixup")),)
