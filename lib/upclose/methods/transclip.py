"""TransCLIP-ZS: all test images at once, each answer pulled to its neighbours', to its class's centre and to CLIP's.

    f_i      (D,)     image i of B, unit norm
    l, y_i   (B, C)   CLIP's logits, and the softmax of l_i
    z_i      (C,)     the soft assignment, which sums to one
    mu_c     (D,)     the centre of class c, unit norm
    sigma    (D,)     one variance a dimension for all classes
    w_ij              the cosine of i with j where j is among the nearest neighbours of i, else 0
    lambda            the weight of y

    z_ic = y_ic exp(a_ic / lambda) / sum_c'                                                           (step z)
    a_ic = -1/2 sum_d (f_id - mu_cd)^2 / sigma_d + lambda / (2 neighbours) sum_j (w_ij + w_ji) z_jc
    mu_c = sum_i z_ic f_i, made a unit vector                                                         (step mu)
    sigma_d = 1/B sum_ic z_ic (f_id - mu_cd)^2                                                        (step sigma)

Source: Zanella, Gerin and Ben Ayed, "Boosting Vision-Language Models with Transduction", NeurIPS 2024
(arXiv 2406.01837); FAIR's Table 4 cites it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from upclose.features import check_unit
from upclose.methods.entry import Method, whole

WEIGHT = 50.0
"""lambda, of the released program."""
INNER = 5
"""Rounds of z between two updates of mu and sigma."""
CONFIDENT = 8
"""Images that a class's first centre is the mean of."""
BLOCK_BYTES = 2**28  # cosines, or differences to the centres, held at once
_LEAST = 1e-12  # of a variance: images that are all alike have none


def affinity(image: Tensor, neighbours: int = 3) -> Tensor:
    """W + w^T: each image's cosines with its nearest others, and theirs with it.

    Args:
        image: (B, D) unit norm
        neighbours: of each image, itself left out; B - 1 where there are fewer

    Returns:
        (B, B) sparse
    """
    count, rows = len(image), []
    block = max(1, BLOCK_BYTES // (count * image.element_size()))
    for start in range(0, count, block):
        cosine = image[start : start + block] @ image.T
        cosine.diagonal(start).fill_(-torch.inf)
        rows.append(cosine.topk(min(neighbours, count - 1)))
    value = torch.cat([row.values for row in rows]).flatten()
    near = torch.cat([row.indices for row in rows])
    own = torch.arange(count, device=image.device)[:, None].expand_as(near)
    edge = torch.stack([own.flatten(), near.flatten()])
    both = torch.cat([edge, edge.flip(0)], dim=1)
    return torch.sparse_coo_tensor(both, value.repeat(2), (count, count), check_invariants=False).coalesce()


def distances(image: Tensor, centre: Tensor, sigma: Tensor) -> Tensor:
    """(B, C): sum_d (f_d - mu_cd)^2 / sigma_d.

    Here and in `variances` the square is multiplied out, so that no (B, C, D) differences are made, and in double
    precision, so that it is exact for small ones.
    """
    centre, sigma = centre.double(), sigma.double()
    weighted = centre / sigma
    own = (weighted * centre).sum(1)
    rows = max(1, BLOCK_BYTES // (8 * (image.shape[1] + 2 * len(centre))))
    parts = (
        ((f**2 / sigma).sum(1, keepdim=True) + own).addmm_(f, weighted.T, alpha=-2).to(image.dtype)
        for f in map(Tensor.double, image.split(rows))
    )
    return torch.cat(list(parts))


def variances(image: Tensor, centre: Tensor, z: Tensor) -> Tensor:
    """Sigma (D,): the mean squared distance to the centres, each counted with its share of the assignment."""
    total = image.new_zeros(image.shape[1], dtype=torch.float64)
    centre = centre.double()
    rows = max(1, BLOCK_BYTES // (8 * (image.shape[1] + len(centre))))
    for f, share in zip(image.split(rows), z.split(rows)):
        f, share = f.double(), share.double()
        total += (f**2 * share.sum(1, keepdim=True)).sum(0)
        total += (share.sum(0) @ centre**2) - 2 * ((share.T @ f) * centre).sum(0)
    return (total / len(image)).clamp_min(_LEAST).to(image.dtype)


def scores(
    image: Tensor,
    label: Tensor,
    *,
    logit_scale: float = 100.0,
    neighbours: int = 3,
    iterations: int = 10,
    start: Tensor | None = None,
) -> Tensor:
    """The soft assignment z of all images at once, without labels.

    Beside the inputs this holds a handful of (B, C) tensors and `BLOCK_BYTES`: under 4 GiB for 50,000 images, 1,000
    classes and D = 512.

    Args:
        image: (B, D) unit norm: whole images, or one embedding an image made of its crops, such as
            `normalize(wca.image_means(views))`, their weighted mean, or with `scale=0` their plain one
        label: (C, D) unit norm
        logit_scale: multiplies the scores before the softmax that is y
        neighbours: of each image
        iterations: updates of mu and sigma; 0 still has one round of z, around the first centres
        start: (B, C) scores of any method, in units of cosine, whose softmax is y; None is CLIP's, image @ label.T

    Returns:
        (B, C), rows sum to one

    Raises:
        ValueError: an embedding or a start that is not finite, an embedding that is not of unit norm (on the CPU),
            neighbours < 1, iterations < 0, or a start of another shape

    Source:
        Section 3 of the paper; the number of rounds, lambda and the first centres are the released program's.

    Deviates:
        The program makes (2500, C, D) differences in memory; here the square is multiplied out. A variance is at least
        1e-12, and a class that is given less than 1e-12 of an image has its centre near 0, far from all. Fewer than
        `neighbours` + 1 images have fewer neighbours: one image alone has CLIP's answer.
    """
    check_unit(image, "image")
    check_unit(label, "label")
    if neighbours < 1 or iterations < 0:
        raise ValueError(f"neighbours is {neighbours} and iterations {iterations}: at least 1 and 0 are needed")
    if start is None:
        start = image @ label.T
    if start.shape != (len(image), len(label)):
        raise ValueError(f"start {tuple(start.shape)}, but there are {len(image)} images and {len(label)} classes")
    if start.device.type == "cpu" and not start.isfinite().all():
        raise ValueError(f"{int((~start.isfinite()).sum())} of the start's scores are not finite")
    log_y = (logit_scale * start.to(image)).log_softmax(1)
    if not len(image):
        return log_y
    near = affinity(image, neighbours) / (2 * neighbours)
    z = log_y.exp()
    best = z.topk(min(CONFIDENT, len(image)), dim=0)
    centre = normalize(torch.einsum("kc,kcd->cd", best.values, image[best.indices]), dim=-1)
    sigma = image.new_full((image.shape[1],), 1 / image.shape[1])
    for step in range(iterations + 1):
        still = distances(image, centre, sigma).mul_(-0.5 / WEIGHT).add_(log_y)
        for _ in range(INNER):
            z = torch.sparse.mm(near, z).add_(still).softmax(1)
        if step < iterations:
            centre = normalize(z.T @ image, dim=-1)
            sigma = variances(image, centre, z)
    return z


METHODS = (Method("TransCLIP-ZS", lambda views, text: scores(views.image, text.label), ("stream",), "#00797a", whole),)
