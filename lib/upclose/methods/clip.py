"""CLIP, CLIP-D and the multi-crop control: the scores that every other method must beat.

    f     (B, D)     the whole image, unit norm
    f_i   (B, N, D)  crop i of the image
    y     (C, D)     the class prompt, "a photo of a {name}."
    t_j   (L, D)     description j

Source: Radford et al. 2021 (CLIP, CLIP-E); Menon and Vondrick 2023 (CLIP-D); Pratt et al. 2023 (CuPL);
Roth et al. 2023 (WaffleCLIP). LGCA (arXiv 2511.00419) eq. 1 and FAIR (arXiv 2507.09615) eqs. 2-5 state them again.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn.functional import normalize

from upclose.features import Text, Views
from upclose.methods.entry import Method, whole


def scores(views: Views, text: Text) -> Tensor:
    """CLIP: cos(f, y).

    CLIP-E is the same with `text.label` the re-normalised mean over the templates.

    Args:
        views: B images; the crops are not used
        text: C classes; the descriptions are not used

    Returns:
        (B, C) float32, larger is better

    Source:
        LGCA eq. 1; CLIP section 3.1.2.

    Example:
        >>> import torch
        >>> text = Text.from_lists(torch.eye(2), list(torch.eye(2)[:, None]))
        >>> scores(Views(torch.tensor([[0.6, 0.8]]), torch.zeros(1, 0, 2)), text).argmax(1)
        tensor([1])
    """
    return (views.image @ text.label.mT).float()


def description_scores(views: Views, text: Text, *, normalise: bool = False) -> Tensor:
    """CLIP-D: the mean over a class's descriptions of cos(f, t_j).

    CuPL and WaffleCLIP are this with other sentences.

    Args:
        views: B images; the crops are not used
        text: C classes and their descriptions
        normalise: cosine with the normalised mean embedding instead of the mean of the cosines

    Returns:
        (B, C) float32, larger is better

    Source:
        Menon and Vondrick 2023, eq. 1 (mean of cosines); CuPL's released program (`normalise=True`).
    """
    mean = text.mean()
    return (views.image @ (normalize(mean, dim=-1) if normalise else mean).mT).float()


def multi_crop_scores(views: Views, text: Text) -> Tensor:
    """The control: the unweighted mean of cos(f_i, t_j) over crops and a class's descriptions.

    Args:
        views: B images, N crops each
        text: C classes and their descriptions

    Returns:
        (B, C) float32, larger is better

    Source:
        FAIR eqs. 7 and 10 with w_i = 1/N and v_j = 1/M. The mean of cosines is the product of the two mean
        embeddings, so the (N, L) matrix is never made.
    """
    return (views.crop.mean(1) @ text.mean().mT).float()


METHODS = (
    Method("CLIP", scores, (), "#949494", whole, rows=("zero-shot",)),
    Method("CLIP-E", scores, (), "#b3b3b3", whole, source="clip-e"),
    Method("CLIP-D", description_scores, ("descriptions",), "#56b4e9", whole, source="clip-d"),
    Method("CLIP-D, shuffled", description_scores, ("descriptions",), "#1f6f99", whole, source="clip-d-shuffled"),
    Method("WaffleCLIP", description_scores, ("descriptions",), "#ca9161", whole, source="waffle"),
    Method("CuPL", partial(description_scores, normalise=True), ("descriptions",), "#ece133", whole, source="cupl"),
    Method("multi-crop", multi_crop_scores, ("crops", "descriptions"), "#0173b2"),
)
