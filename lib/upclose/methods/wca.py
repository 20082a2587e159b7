"""WCA, weighted visual-text cross alignment: crops and descriptions weighted by their likeness to the whole.

    f      (B, D)     the whole image          f_i   (B, N, D)  crop i of the image
    y      (C, D)     the class prompt         t_j   (L, D)     description j of its class
    w_i    (B, N)     image weights            v_j   (L,)       text weights
    Theta  (N, M)     cos(f_i, t_j) for one image and one class

Source: Li et al. 2024, "Visual-text cross alignment" (arXiv 2406.02915), written with the numbers of FAIR's
eqs. 7-10 (arXiv 2507.09615); LGCA's eqs. 7 and 8 (arXiv 2511.00419) are the same weights.
"""

from __future__ import annotations

from functools import partial
from math import e

import torch
from torch import Tensor
from torch.nn.functional import normalize

from upclose.features import Text, Views, check_described
from upclose.methods.entry import Method

RELEASED = dict(image_scale=e**4, text_scale=e**2, normalise=True)
"""The hyperparameters of the authors' released program, for `scores(views, text, **RELEASED)`."""


def image_weights(views: Views, *, scale: float = 1.0) -> Tensor:
    """w_i: softmax over an image's crops of scale * cos(f, f_i).

    Args:
        views: image (B, D) and crop (B, N, D), unit norm
        scale: multiplies the cosines before the softmax

    Returns:
        (B, N), each row sums to 1; uniform at scale 0

    Source:
        FAIR eq. 8 at scale 1.
    """
    return (scale * torch.einsum("bd,bnd->bn", views.image, views.crop)).softmax(-1)


def image_means(views: Views, *, scale: float = 1.0) -> Tensor:
    """sum_i w_i f_i of each image.

    Args:
        views: image (B, D) and crop (B, N, D), unit norm
        scale: as in `image_weights`

    Returns:
        (B, D), not normalised; the mean of an image's crops at scale 0

    Source:
        The image's side of FAIR eq. 10.
    """
    return torch.einsum("bn,bnd->bd", image_weights(views, scale=scale), views.crop)


def text_weights(text: Text, *, scale: float = 1.0) -> Tensor:
    """v_j: softmax over a class's descriptions of scale * cos(y, t_j).

    Args:
        text: label (C, D) and description (L, D), unit norm
        scale: multiplies the cosines before the softmax

    Returns:
        (L,), the weights of each class sum to 1; uniform within a class at scale 0

    Raises:
        ValueError: on the CPU, a class without descriptions

    Source:
        FAIR eq. 9 at scale 1.
    """
    check_described(text)
    cosine = scale * (text.label[text.owner] * text.description).sum(-1)
    top = cosine.new_full((len(text.label),), -torch.inf).scatter_reduce(0, text.owner, cosine, "amax")
    part = (cosine - top[text.owner]).exp()
    return part / text.sum(part)[text.owner]


def class_means(text: Text, *, scale: float = 1.0) -> Tensor:
    """sum_j v_j t_j of each class.

    Args:
        text: label (C, D) and description (L, D), unit norm
        scale: as in `text_weights`

    Returns:
        (C, D), not normalised; the mean of a class's descriptions at scale 0

    Raises:
        ValueError: on the CPU, a class without descriptions

    Source:
        The text's side of FAIR eq. 10.
    """
    return text.sum(text_weights(text, scale=scale)[:, None] * text.description)


def scores(
    views: Views, text: Text, *, image_scale: float = 1.0, text_scale: float = 1.0, normalise: bool = False
) -> Tensor:
    """WCA: sum_ij w_i v_j Theta_ij.

    Args:
        views: B images, N crops each
        text: C classes and their descriptions
        image_scale: multiplies cos(f, f_i) before the softmax; 0 is uniform, 1 is the paper
        text_scale: multiplies cos(y, t_j) before the softmax; 0 is uniform, 1 is the paper
        normalise: give the weighted mean of the crops and of the descriptions unit norm before their product

    Returns:
        (B, C) float32, larger is better

    Source:
        FAIR eq. 10. The sum is the product of two weighted means, (sum_i w_i f_i) . (sum_j v_j t_j), so Theta is
        never made: memory beyond the inputs is B * (D + N + C) + C * D + L * D numbers.

    Deviates:
        The equations have no temperature and no second normalisation; the released program has both. The default is
        the equations, `RELEASED` the program. Normalising the image side cannot change a ranking within an image;
        normalising the text side can.

    Example:
        >>> views = Views(torch.eye(2)[:1], torch.eye(2)[None])  # one image; crop 0 is like it, crop 1 is not
        >>> text = Text.from_lists(torch.eye(2), list(torch.eye(2)[:, None]))
        >>> scores(views, text)
        tensor([[0.7311, 0.2689]])
        >>> scores(views, text, **RELEASED).argmax(1).tolist()
        [0]
    """
    image, label = image_means(views, scale=image_scale), class_means(text, scale=text_scale)
    if normalise:
        image, label = normalize(image, dim=-1), normalize(label, dim=-1)
    return (image @ label.mT).float()


METHODS = (
    Method("WCA", scores, ("crops", "descriptions"), "#de8f05"),
    Method("WCA (released)", partial(scores, **RELEASED), ("crops", "descriptions"), "#8a5a00"),
)
