"""D&D: crops and descriptions matched by the earth mover's distance; zero-shot, few-shot and test-time.

    v_j    (N, D)   crop j of an image, unit norm; the paper has M of them
    i_k    (M, D)   description k of a class, unit norm; the paper has N of them
    c_jk   (N, M)   the cost 1 - cos(v_j, i_k)
    T      (N, M)   the transport plan
    h               the crop that a description selects

    EMD(image, class) = min_T sum_jk T_jk c_jk,   sum_k T_jk = 1/N,   sum_j T_jk = 1/M,   T >= 0        (4)
    key of (image, description i_k) = v_h,   h = argmax_j cos(v_j, i_k)                       (section 4.2)

The class of least cost is predicted; the few-shot cache votes as Tip-Adapter's does and is added to minus the cost.

Source: "Helping CLIP See Both the Forest and the Trees: A Decomposition and Description Approach" (arXiv 2507.03458).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from upclose import transport
from upclose.devices import has_kernels
from upclose.features import Text, Views, check_cropped, check_described
from upclose.methods import tip_adapter
from upclose.methods.entry import Method

CHUNK = 2**18  # entries of one cost tensor: 1 MiB, so that the rounds of Sinkhorn stay in cache
IMAGES = 48  # of one cost tensor, if there are as many: products of few crops with many descriptions are slow
PAIRS = {"cpu": 2**19, "device": 2**25}  # crops times descriptions and dimensions where nothing is looked at
INFINITE = 1e18  # an epsilon at which kernels are flat, and by which logits can still be multiplied
TOLERANCE = 1e-5  # L1 error of a plan's marginals at which Sinkhorn stops; the score is then right to about 1e-6


class Cache(NamedTuple):
    """A local-aware cache of K keys, image after image, and an image's in the order of its class's descriptions.

    Attributes:
        key: (K, D) unit norm, the crop that answers the description best
        label: (K,) int64, the class of the image
        description: (K,) int64, the row of `text.description` that selected the crop
        image: (K,) int64, the row of `views` that the crop comes from
    """

    key: Tensor
    label: Tensor
    description: Tensor
    image: Tensor


def scores(views: Views, text: Text, *, epsilon: float = 0.01, max_iter: int = 1000, exact: bool = False) -> Tensor:
    """Zero-shot D&D: minus the earth mover's distance between an image's crops and a class's descriptions.

    Both sets have uniform mass. A class counts with the descriptions it has, however few. Beside its inputs and result
    this holds under 0.2 GiB.

    Args:
        views: crop (B, N, D); the paper takes N = 9 of 10-75 % scale
        text: description (L, D); the paper takes 9 a class
        epsilon: entropic regularisation in units of the cost 1 - cos. CLIP's cosines span about 0.1, so at 0.1 the
            plan is nearly uniform and D&D nearly the unweighted mean; as epsilon falls it nears the exact distance
        max_iter: rounds of Sinkhorn at most. At epsilon 0.01 nearly all pairs are done in 100, where the scores of the
            slowest are still wrong by about 1e-5; 300 leave less than 1e-6
        exact: the exact distance by linear programming (epsilon and max_iter are then not used); slow, on the CPU

    Returns:
        (B, C) float32, -<T, c>, larger is better, without the entropy term

    Raises:
        ValueError: no crop, a class without a description, epsilon <= 0

    Source:
        D&D, eq. 4.

    Deviates:
        The paper's summary, from which this is written, gives neither epsilon nor a stopping rule; 0.01 resolves
        differences of cosine that matter to CLIP.

    Example:
        >>> views = Views(torch.eye(2)[:1], torch.eye(2)[None])
        >>> text = Text.from_lists(torch.eye(2), [torch.eye(2), torch.eye(2)[1:]])
        >>> scores(views, text).round(decimals=2).tolist()  # both crops find a description of class 0
        [[0.0, -0.5]]
    """
    if exact:
        return _by_tile(views, text, lambda cosine, column: (_exact(cosine, column) * (cosine - 1)).sum((0, 1)))
    epsilon = _finite(epsilon)
    if _is_on_a_gpu(views.crop):
        columns = transport.Ragged(text.owner, len(text.label))
        row = views.crop.new_full(views.crop.shape[1:2], 1 / views.crop.shape[1])
        solve = partial(transport.moved_ragged, row=row, columns=columns, max_iter=max_iter, tolerance=TOLERANCE)
        return epsilon * _by_image(views, text, partial(solve, bound=2 / epsilon), 1 / epsilon) - 1
    solve = partial(_entropic, epsilon=epsilon, max_iter=max_iter, plans=False)
    return epsilon * _by_tile(views, text, solve, 1 / epsilon) - 1


def plans(views: Views, text: Text, *, epsilon: float = 0.01, max_iter: int = 1000, exact: bool = False) -> Tensor:
    """The transport plans T behind `scores`, whose arguments and errors these are.

    Returns:
        (B, C, N, M) float32: the mass that moves between crop n and the class's m-th description; M is that of the
        class with most, padded with 0
    """
    epsilon = _finite(epsilon)
    solve = _exact if exact else partial(_entropic, epsilon=epsilon, max_iter=max_iter, plans=True)
    scale = 1.0 if exact else 1 / epsilon
    return _by_tile(views, text, lambda logit, column: solve(logit, column).permute(2, 3, 0, 1), scale)


def max_scores(views: Views, text: Text) -> Tensor:
    """The ablation without a marginal on the crops: every description goes to its nearest crop, mean_m max_n cos - 1.

    Args, Returns, Raises: as `scores`, which this bounds from above.
    """
    columns = transport.Ragged(text.owner, len(text.label))
    return _by_image(views, text, lambda cosine: columns.mean(cosine.amax(-1))) - 1


def assignment_scores(views: Views, text: Text) -> Tensor:
    """The ablation that pairs crops and descriptions one to one (Hungarian): minus the mean cost of the pairs.

    min(N, M) pairs are matched and what is left over is ignored; with N = M this is the exact distance. A loop, on
    the CPU.

    Args, Returns, Raises: as `scores`.
    """

    def cosines(cosine: Tensor, column: Tensor) -> Tensor:
        counts = (column > 0).sum(0).tolist()
        cosine = cosine.permute(2, 3, 0, 1).cpu().numpy()
        pairs = [[x[:, :count] for x, count in zip(image, counts)] for image in cosine]
        best = [[float(x[linear_sum_assignment(x, maximize=True)].mean()) for x in image] for image in pairs]
        return torch.tensor(best).view(cosine.shape[:2])

    return _by_tile(views, text, cosines).to(views.crop) - 1


def local_cache(views: Views, label: Tensor, text: Text) -> Cache:
    """The local-aware cache: for every training image and every description of its class, the crop most like it.

    With `Views(image, image[:, None])` every key is the whole image: the ablation that isolates locality.

    Args:
        views: crop (B, N, D) of the training images
        label: (B,) int64, their classes (or pseudo-labels)
        text: all C classes

    Returns:
        K = sum over images of the number of descriptions of their class. A class without an image has no key; of
        equally similar crops the first is taken

    Raises:
        ValueError: sizes that do not fit, a label outside the classes of `text`, no crop, a class without a description

    Source:
        D&D, section 4.2.
    """
    check_cropped(views)
    if len(label) != len(views.crop):
        raise ValueError(f"{len(views.crop)} images but {len(label)} labels: give one label an image")
    on_cpu = label.device.type == "cpu"  # elsewhere only the number of keys is waited for
    if on_cpu and len(label) and not 0 <= int(label.min()) <= int(label.max()) < len(text.label):
        raise ValueError(f"labels {int(label.min())} to {int(label.max())}, but text has {len(text.label)} classes")
    rows, mask = text.padded()  # (C, M, D), (C, M)
    best = torch.cat(
        [
            torch.einsum("bnd,bmd->bmn", crop, rows[own]).argmax(-1)
            for crop, own in zip(views.crop.split(1024), label.split(1024))
        ]
    )  # (B, M)
    image, place = mask[label].nonzero(as_tuple=True)
    first = text.counts.cumsum(0) - text.counts
    label = label[image]
    return Cache(views.crop[image, best[image, place]], label, first[label] + place, image)


def cache_scores(views: Views, cache: Cache, classes: int, beta: float) -> Tensor:
    """The votes of the local-aware cache for test images, to be added to zero-shot scores, `zero_shot + alpha * votes`.

    How test crops are aggregated: each crop meets the whole cache as Tip-Adapter's image does, and an image's votes are
    the mean of its crops' votes, (1/N) sum_n sum_k exp(-beta (1 - cos(crop_n, key_k))) [label_k = c]. So with one crop
    that is the image and whole-image keys this is Tip-Adapter, and a sharper beta lets the crops that find a near key
    decide. No test label is taken. Beside its inputs and result this holds under 0.2 GiB.

    Args:
        views: crop (B, N, D) of the test images
        cache: of the training images
        classes: C
        beta: sharpness, >= 0

    Returns:
        (B, C) float32; 0 for a class without a shot, and fewer votes for one with fewer shots or descriptions

    Raises:
        ValueError: as `tip_adapter.scores`

    Source:
        D&D, section 4.2; Tip-Adapter, section 3.1.

    Deviates:
        The summary does not say how test crops are aggregated; the uniform mean is eq. 4's mass of a crop.
    """
    n = views.crop.shape[1]
    return torch.cat(
        [
            tip_adapter.scores(crop.flatten(0, 1), cache.key, cache.label, classes=classes, beta=beta)
            .unflatten(0, (-1, n))
            .mean(1)
            for crop in views.crop.split(max(1, CHUNK // (n * classes)))
        ]
    )


def stream(
    views: Views,
    text: Text,
    capacity: int = 3,
    *,
    alpha: float = 0.002,
    beta: float = 5.0,
    zero_shot: Tensor | None = None,
    logit_scale: float = 100.0,
    batch_size: int = 64,
) -> Tensor:
    """Test-time adaptation: classify a stream of images, remembering the most certain ones of each predicted class.

    Image after image: its zero-shot prediction is its pseudo-label; it joins that class's queue while there is room,
    or in the place of the queue's least certain image when its own entropy is lower; then it is scored with the
    queues as they now stand, `zero_shot + alpha * cache_scores` of a local-aware cache of the queued images. Nothing is
    trained and no label is taken. The queues depend on zero-shot scores alone, so who is in at which step is settled
    first, in order, and the votes are batched: the result for an image depends on the order before it and not on
    `batch_size` or on later images. Beside the inputs and `scores` this holds about 8 * batch_size * N * C * capacity
    * M bytes.

    Args:
        views: crop (B, N, D) in stream order
        text: all C classes
        capacity: images that a class's queue holds, >= 1
        alpha: weight of the cache against scores in units of cosine. TDA's 2 against 100 cos with one key an image is
            0.02 here, shared between 9 keys an image
        beta: sharpness of the affinity
        zero_shot: (B, C) scores in stream order; None is `scores(views, text)`. Give them to try many orders,
            alphas or betas, or to start from another method
        logit_scale: multiplies `zero_shot` before the softmax whose entropy is the certainty: CLIP's logit scale
        batch_size: images voted on at once

    Returns:
        (B, C) float32 in stream order

    Raises:
        ValueError: capacity < 1, or `zero_shot` of another shape

    Source:
        D&D's test-time setting; Karmanov et al., "Efficient Test-Time Adaptation of Vision-Language Models" (TDA), the
        positive cache. As in TDA an image joins before it is scored, so its own keys vote too.

    Deviates:
        No negative cache, and the entropy is that of one prediction, not of an average over augmented views: the
        summary mentions neither. An equal entropy pushes no older image out; of equal ones the youngest leaves first.
    """
    if capacity < 1:
        raise ValueError(f"a queue of {capacity} images remembers nothing: use a capacity of at least 1")
    if zero_shot is None:
        zero_shot = scores(views, text)
    if zero_shot.shape != (len(views.crop), len(text.label)):
        wanted = f"{len(views.crop)} images, {len(text.label)} classes"
        raise ValueError(f"zero_shot {tuple(zero_shot.shape)}, but there are {wanted}")
    log_p = (logit_scale * zero_shot.double()).log_softmax(1)
    entropy, pseudo = -(log_p.exp() * log_p).sum(1), zero_shot.argmax(1)
    leave = tip_adapter.queue(pseudo, entropy, capacity)
    times, fused = _times_chosen(views, pseudo, text), []
    for now, crop in zip(torch.arange(len(leave), device=leave.device).split(batch_size), views.crop.split(batch_size)):
        image, held = tip_adapter.present(leave, now, len(text.label) * capacity + batch_size)
        key = views.crop[image].flatten(0, 1)  # all crops of an image, those that no description selects without weight
        near = tip_adapter.affinity(crop.flatten(0, 1), key, beta).unflatten(1, crop.shape[:2]).mean(2)  # (K N, b)
        weighted = near.unflatten(0, (len(image), -1)) * times[image][..., None] * held[:, None]
        fused.append(zero_shot[now] + alpha * tip_adapter.cache_logits(weighted.sum(1), pseudo[image], len(text.label)))
    return torch.cat(fused)


def _times_chosen(views: Views, label: Tensor, text: Text) -> Tensor:
    """(B, N): of how many descriptions of its image's class each crop is the nearest, the keys of `local_cache`."""
    rows, mask = text.padded()  # (C, M, D), (C, M)
    parts = zip(views.crop.split(1024), label.split(1024))
    best = torch.cat([torch.einsum("bnd,bmd->bmn", crop, rows[own]).argmax(-1) for crop, own in parts])  # (B, M)
    return views.crop.new_zeros(views.crop.shape[:2]).scatter_add_(1, best, mask[label].to(views.crop))


def _places(text: Text) -> tuple[Tensor, Tensor]:
    """The descriptions as a rectangle: rows of `text.description` (M, C), in which padding repeats a class's last one,
    and the mass of each place (M, C), 0 on padding.
    """
    check_described(text)
    counts = text.counts
    place = torch.arange(text.widest, device=counts.device)[:, None]
    first = counts.cumsum(0) - counts
    return first + place.minimum(counts - 1), (place < counts) / counts.to(text.description)


def _by_tile(views: Views, text: Text, solve: Callable[[Tensor, Tensor], Tensor], scale: float = 1.0) -> Tensor:
    """(B, C, ...) of all images and classes, a few images and classes at a time.

    Args:
        views: crop (B, N, D)
        text: C classes
        solve: scale * cos (N, M, b, c), in which padding repeats a class's last description, and the descriptions'
            mass (M, c), 0 on padding -> (b, c, ...)
        scale: of the cosines
    """
    check_cropped(views)
    row, column = _places(text)
    n, pairs = views.crop.shape[1], max(1, CHUNK // (views.crop.shape[1] * len(row)))
    classes = max(1, pairs // max(1, min(IMAGES, len(views.crop))))
    images = max(1, pairs // min(classes, row.shape[1]))
    blocks = [
        (text.description.index_select(0, part.flatten()).T, mass)
        for part, mass in zip(row.split(classes, 1), column.split(classes, 1))
    ]

    def tile(crop: Tensor, description: Tensor, mass: Tensor) -> Tensor:
        cosine = (crop @ description).view(n, -1, *mass.shape)  # (N, b, M, c)
        return solve(cosine.transpose(1, 2).contiguous(), mass)

    rows = [crop.transpose(0, 1).flatten(0, 1) * scale for crop in views.crop.split(images)]
    return torch.cat([torch.cat([tile(crop, *block) for block in blocks], 1) for crop in rows])


def _is_on_a_gpu(x: Tensor) -> bool:
    """Where looking at who is done costs more than solving on."""
    return x.device.type == "cuda" or has_kernels(x.device)


def _by_image(views: Views, text: Text, solve: Callable[[Tensor], Tensor], scale: float = 1.0) -> Tensor:
    """(B, C) of all images, a few at a time: `solve` takes scale * cos (L, b, N) to (C, b); nothing is looked at."""
    check_cropped(views)
    check_described(text)
    description, n = text.description * scale, views.crop.shape[1]
    size = max(1, PAIRS["cpu" if views.crop.device.type == "cpu" else "device"] // (n * sum(description.shape)))
    parts = views.crop.split(size)
    return torch.cat([solve((description @ x.flatten(0, 1).T).unflatten(1, x.shape[:2])).T for x in parts])


def _exact(cosine: Tensor, column: Tensor) -> Tensor:
    """Plans (N, M, b, c) without entropy."""
    cost, row = 1 - cosine.permute(2, 3, 0, 1), cosine.new_full((len(cosine),), 1 / len(cosine))
    return transport.exact(cost, row, column.T).permute(2, 3, 0, 1)


def _finite(epsilon: float) -> float:
    if not epsilon > 0:
        raise ValueError(f"epsilon is {epsilon}: give a positive number, or exact=True for no entropy")
    return min(epsilon, INFINITE)


def _entropic(logit: Tensor, column: Tensor, epsilon: float, max_iter: int, plans: bool) -> Tensor:
    """Plans (N, M, b, c) or <plan, logit> (b, c): stacked where the kernel does not underflow, else one by one."""
    flat, images = logit.flatten(2), logit.shape[2]
    may_look = logit.device.type != "cuda"
    if may_look and not logit.requires_grad and transport.fits(flat):
        found = transport.sinkhorn_stacked(flat, column.repeat(1, images), max_iter, TOLERANCE, plans)
        return found.unflatten(-1, logit.shape[2:])
    row = logit.new_full((len(logit),), 1 / len(logit))
    cost, column = 1 - epsilon * logit.permute(2, 3, 0, 1).flatten(0, 1), column.T.repeat(images, 1)
    if may_look:
        plan = _sinkhorn(cost, row, column, epsilon, max_iter)
    else:
        plan, _ = transport.sinkhorn(cost, row, column, epsilon, max_iter, TOLERANCE, bound=2.0)
    plan = plan.unflatten(0, logit.shape[2:]).permute(2, 3, 0, 1)
    return plan if plans else (plan * logit).sum((0, 1))


def _sinkhorn(cost: Tensor, row: Tensor, column: Tensor, epsilon: float, max_iter: int) -> Tensor:
    """Plans (K, N, M) of K problems: a few rounds for all, then four times as many for those that need them, and so on.

    Of pairs like CLIP's at epsilon 0.01 half are done in about 50 rounds and some take thousands.
    """
    cost = cost - cost.amin(-1, keepdim=True)  # the plan stays the same, and exp(-cost / epsilon) does not underflow
    rounds = min(max_iter, 100)
    plan, _ = transport.sinkhorn(cost, row, column, epsilon, rounds, TOLERANCE)
    while rounds < max_iter:
        rounds = min(max_iter, 4 * rounds)
        error = (plan.sum(2) - row).abs().sum(1) + (plan.sum(1) - column).abs().sum(1)
        slow = (error >= TOLERANCE).nonzero().flatten()
        if len(slow) == 0:
            break
        plan[slow], _ = transport.sinkhorn(cost[slow], row, column[slow], epsilon, rounds, TOLERANCE)
    return plan


METHODS = (
    Method(
        "D&D",
        scores,
        ("crops", "descriptions"),
        "#d55e00",
        rows=("CLIP+D", "CLIP+R (descriptions alone)", "CLIP+D+R (averaging)", "D&D (descriptions alone)"),
        sampler="area",
    ),
    Method("best-crop", max_scores, ("crops", "descriptions"), "#7fb6d9"),
    Method(
        "Tip+D&D",
        cache_scores,
        ("crops", "descriptions", "shots"),
        "#7a3600",
        rows=("whole-image keys", "D&D + Tip-Adapter"),
    ),
    Method("D&D (stream)", stream, ("crops", "descriptions", "stream"), "#ff9d5c", rows=("whole images",)),
)
