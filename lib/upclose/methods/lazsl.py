"""LaZSL: crops of an image and attributes of a class, aligned by optimal transport.

    p^l_i, p^g   (N, D), (D,)   crop i and the whole image, eq. 3                views.crop, views.image
    q_j          (M, D)         attribute j of class y, eq. 4                    text.description
    delta, r*    (), (N,)       mean cosine of crops and image, and the crops' mass, eqs. 6-9   `crop_mass`
    sim*, C*     (N, M)         hybrid similarity, eq. 16, and cost 1 - sim*, eq. 10            `_logit`
    T            (N, M)         transport plan between r* and c = 1/M, eqs. 5 and 11-14         `plans`
    psi_y        ()             <T, sim*>, eq. 15: the score of class y, eq. 17                 `scores`

All classes and a piece of the images are one batch of transport problems without padding, whose similarities are one
matrix product. The image's share of sim* is the same for all crops: it moves no mass, and joins the score at the end.

Source: "Interpretable Zero-Shot Learning with Locally-Aligned Vision-Language Model" (arXiv 2506.23822), equations by
number.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding

from upclose import features, transport
from upclose.features import Text, Views
from upclose.methods.entry import Method

INFINITE = 1e18  # an epsilon at which kernels are flat, and by which logits can still be multiplied
# Crop-attribute pairs solved at once, about 20 bytes each.
PAIRS = {"cpu": 5 << 19, "device": 1 << 25}


def scores(
    views: Views,
    text: Text,
    *,
    theta: float = 0.8,
    epsilon: float = 0.1,
    selection: bool = True,
    hybrid: bool = True,
    max_iter: int = 100,
    tolerance: float = 1e-5,
) -> Tensor:
    """LaZSL's similarity of every image with every class, psi_y = <T, sim*>.

    The plan's mass on each attribute is 1/M, so that psi_y = theta <T, sim> + (1 - theta) CLIP-D: the image's share of
    the hybrid cost shifts whole columns and acts on T only through theta / epsilon. theta = 0 is CLIP-D, and
    `selection=False, hybrid=False` is plain optimal transport.

    Args:
        views: image (B, D), crop (B, N, D), unit norm
        text: description (L, D) unit norm, at least one a class
        theta: weight of the crops in cost and similarity, 0 to 1; the image has the rest
        epsilon: weight of the entropy, the paper's lambda, in units of 1 - cosine; infinity gives the mean over
            the kept crops and the attributes
        selection: give no mass to crops that are less like the image than its average crop
        hybrid: False is theta = 1
        max_iter: most Sinkhorn rounds
        tolerance: L1 error of a plan's marginals at which its rounds end

    Returns:
        (B, C) float32, larger is better. Memory beyond inputs and result: below 1 GiB up to 30,000 descriptions.

    Raises:
        ValueError: theta outside 0 to 1, epsilon not positive, embeddings that are not finite or not of unit norm,
            a class without attributes

    Source:
        LaZSL, eqs. 5-17.

    Deviates:
        - lambda is not in the paper; 0.1 is what the released program uses.
        - The paper states no stop rule. The released program stops when u moves by less than 1e-2 on average, or
          after 100 rounds; we stop each problem by its own marginal error. On CLIP-like features scores agree to 1e-4.
        - beta, the upper end of the crops' scale, is not in the paper, and N is "60-90": the crop plan's business;
          `params/papers` samples N = 90 from U(0.6, 0.9).
        - The paper's sentence is "A photo of a {class}, which (is/has/etc) {attribute}"; the released program's lacks
          "A photo of a". `prompts` builds the paper's.
        - Crops whose cosines with the image are all equal are all kept: a crop is dropped when it lies more than
          1e-6 below the mean, where rounding alone would decide otherwise.

    Example:
        >>> views = Views(torch.eye(2)[:1], torch.eye(2)[None])  # crop 1 is less like the image: it gets no mass
        >>> text = Text.from_lists(torch.eye(2), list(torch.eye(2)[:, None]))
        >>> scores(views, text).round(decimals=2).tolist()
        [[1.0, 0.0]]
        >>> plans(views, text)[0, 0].tolist()  # (N, M) of class 0
        [[1.0], [0.0]]
    """
    theta, epsilon = _weights(theta, hybrid, epsilon)
    _check(views, text)
    columns = transport.Ragged(text.owner, len(text.label))
    description = text.description * (theta / epsilon)
    result = (1 - theta) * views.image @ columns.mean(text.description).T  # (16)
    for rows, crop, row in _pieces(views, text, crop_mass(views, selection=selection)):
        logit = _logit(description, crop)
        moved = transport.moved_ragged(logit, row, columns, max_iter, tolerance, bound=2 / epsilon)  # (11-14)
        result[rows] += epsilon * moved.T  # (15)
    return result.float()


def plans(
    views: Views,
    text: Text,
    label: Tensor | None = None,
    *,
    theta: float = 0.8,
    epsilon: float = 0.1,
    selection: bool = True,
    hybrid: bool = True,
    max_iter: int = 100,
    tolerance: float = 1e-5,
) -> Tensor:
    """The transport plans T behind `scores`, for explanations: the mass between crop n and attribute j of a class.

    Args:
        views: as in `scores`
        text: as in `scores`
        label: (B,) int64, the one class of each image whose plan is wanted; None is all classes
        theta: as in `scores`
        epsilon: as in `scores`
        selection: as in `scores`
        hybrid: as in `scores`
        max_iter: as in `scores`
        tolerance: as in `scores`

    Returns:
        (B, C, N, M), or (B, N, M) with `label`, M the longest class; zero on the padding of shorter classes and on
        dropped crops. Each plan sums to 1. All classes are B * C * N * M numbers: ask for a few images at a time.

    Raises:
        ValueError: as `scores`, and another number of labels than of images

    Source:
        LaZSL, eqs. 11-14.
    """
    theta, epsilon = _weights(theta, hybrid, epsilon)
    _check(views, text)
    description, mask = text.padded()  # (C, M, D), (C, M)
    crop, row = torch.lerp(views.image[:, None], views.crop, theta), crop_mass(views, selection=selection)  # (10, 16)
    if label is None:
        crop, row = crop[:, None], row[:, None]
    else:
        features.check_labels(label, len(views.image))
        description, mask = description[label], mask[label]
    cost, column = 1 - crop @ description.mT, mask / mask.sum(-1, keepdim=True)
    return transport.sinkhorn(cost, row, column, epsilon, max_iter, tolerance, bound=2.0)[0]


def exact_scores(views: Views, text: Text, *, theta: float = 0.8, selection: bool = True) -> Tensor:
    """`scores` with the plan of least cost, without entropy: what epsilon = 0 would be, one problem after the other.

    Args:
        views: as in `scores`
        text: as in `scores`
        theta: as in `scores`
        selection: as in `scores`

    Returns:
        (B, C) float32, larger is better

    Source:
        LaZSL, eqs. 5-10, 15-17; the network simplex of POT.
    """
    _check(views, text)
    crop, row = torch.lerp(views.image[:, None], views.crop, theta), crop_mass(views, selection=selection)
    out = []
    for c in range(len(text.label)):
        sim = crop @ text.of(c).description.T  # (16)
        plan = transport.exact(1 - sim, row, sim.new_full((sim.shape[-1],), 1 / sim.shape[-1]))  # (5)
        out.append((plan * sim).sum((-2, -1)))  # (15)
    return torch.stack(out, 1).float()


def released_scores(
    views: Views, text: Text, *, theta: float = 0.8, epsilon: float = 0.1, stop: float = 1e-2, max_iter: int = 100
) -> tuple[Tensor, int]:
    """`scores` with the stop rule of the released program, class after class, images together, each with its own stop.

    Args:
        views: as in `scores`
        text: as in `scores`
        theta: as in `scores`
        epsilon: as in `scores`
        stop: an image's problem is done when u has moved by less than this on average
        max_iter: rounds at most

    Returns:
        (B, C) float32, and the rounds of the class that took most

    Source:
        Written from the description of the program's rule; eqs. 11-16.
    """
    _check(views, text)
    crop, row = torch.lerp(views.image[:, None], views.crop, theta), crop_mass(views)
    out, rounds = [], []
    for c in range(len(text.label)):
        sim = crop @ text.of(c).description.T  # (16)
        kernel = ((sim - 1) / epsilon).exp()  # (14)
        u, v = torch.ones_like(row), torch.ones_like(sim[:, 0])
        running, count = torch.ones(len(row), dtype=torch.bool, device=row.device), 0
        while running.any() and count < max_iter:
            next_u = row / (kernel @ v[..., None])[..., 0]  # (12)
            next_v = 1 / sim.shape[-1] / (kernel.mT @ next_u[..., None])[..., 0]  # (13)
            moved = (next_u - u).abs().mean(1)
            u, v = torch.where(running[:, None], next_u, u), torch.where(running[:, None], next_v, v)
            running, count = running & (moved >= stop), count + 1
        rounds.append(count)
        out.append((u[:, :, None] * kernel * v[:, None] * sim).sum((-2, -1)))  # (11, 15)
    return torch.stack(out, 1).float(), max(rounds)


def crop_mass(views: Views, *, selection: bool = True) -> Tensor:
    """The crops' marginal r*: uniform over the crops at least as like the image as the average crop.

    Args:
        views: image (B, D), crop (B, N, D), unit norm
        selection: False is uniform over all crops

    Returns:
        (B, N), each row sums to 1

    Source:
        LaZSL, eqs. 6-9.
    """
    cosine = (views.image[:, None] @ views.crop.mT)[:, 0]
    delta = cosine.mean(-1, keepdim=True)  # (6)
    positive = (cosine >= delta - 1e-6) if selection else torch.ones_like(cosine, dtype=torch.bool)  # (7, 8)
    return positive / positive.sum(-1, keepdim=True).to(cosine)  # (9)


def _logit(description: Tensor, crop: Tensor) -> Tensor:
    """-C* / epsilon (10), less what all crops share: (L, B, N), from descriptions times theta / epsilon."""
    return (description @ crop.flatten(0, 1).T).unflatten(1, crop.shape[:2])


def _pieces(views: Views, text: Text, row: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images (b,), their crops (b, K, D) and the crops' mass (b, K), in pieces of at most `PAIRS` pairs.

    On the CPU crops without mass are left out, and images with about as many others share a piece. Elsewhere all
    crops stay, for counting them would stall the device.
    """
    n, kept = row.shape[1], (row > 0).sum(-1)
    first, crops = row.argsort(dim=-1, descending=True, stable=True), views.crop.flatten(0, 1)
    order = kept.argsort() if row.device.type == "cpu" else torch.arange(len(row), device=row.device)
    for rows in order.tensor_split(-(-len(order) // _step(views, text))) if len(order) else ():
        index = first[rows, : int(kept[rows].max())] if row.device.type == "cpu" else first[rows]
        yield rows, embedding(rows[:, None] * n + index, crops), row[rows].gather(1, index)


def _step(views: Views, text: Text) -> int:
    """How many images keep pairs and crop embeddings below `PAIRS`."""
    pairs = PAIRS["cpu" if views.crop.device.type == "cpu" else "device"]
    return max(1, pairs // (views.crop.shape[1] * sum(text.description.shape)))


def _check(views: Views, text: Text) -> None:
    """Refuse images without crops and, on the CPU, embeddings that are not of unit norm."""
    features.check_cropped(views)
    features.check_described(text)
    for name, x in (("views.image", views.image), ("views.crop", views.crop), ("text.description", text.description)):
        features.check_unit(x, name)


def _weights(theta: float, hybrid: bool, epsilon: float) -> tuple[float, float]:
    """The crops' weight, which is 1 in a plain similarity, and the entropy's, which is made finite."""
    if not 0 <= theta <= 1:
        raise ValueError(f"theta is {theta}: give a weight between 0 (the image alone) and 1 (the crops alone)")
    if not epsilon > 0:
        raise ValueError(f"epsilon is {epsilon}: give a positive number")
    return theta if hybrid else 1.0, min(epsilon, INFINITE)


METHODS = (
    Method(
        "LaZSL",
        scores,
        ("crops", "descriptions"),
        "#cc78bc",
        source="lazsl",
        rows=("Baseline", "Baseline+OT", "Baseline+OT+VS", "Baseline+OT+Hybrid"),
    ),
)
