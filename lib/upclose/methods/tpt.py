"""TPT, test-time prompt tuning: one step on the prompt's context an image, towards agreement of its confident views.

    v_1 .. v_V   (V, D)   the views of one image, v_1 the whole
    t_c(u)       (C, D)   the prompt of class c with the context u in place of "a photo of a"
    p_v          (C,)     the softmax of logit_scale * cos(v, t(u))
    H                     the entropy

    keep the views with the smallest H(p_v), a share `keep` of them
    u <- u - AdamW of the gradient of H(mean of the kept p_v)
    answer: cos(v_1, t_c(u))

Source: Shu et al., "Test-Time Prompt Tuning for Zero-Shot Generalization in Vision-Language Models", NeurIPS 2022
(arXiv 2209.07511), eqs. 3-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import torch
from torch import Tensor
from torch.nn.functional import normalize

from upclose import crops
from upclose.features import Views, check_unit
from upclose.methods.entry import Method

CONTEXT = "a photo of a"
AREA = (0.08, 1.0)  # of the views that are drawn from pixels


def confident(logits: Tensor, keep: float = 0.1) -> Tensor:
    """Which views count: the share `keep` with the least entropy, at least one.

    Args:
        logits: (B, V, C)
        keep: of the V views, rounded down

    Returns:
        (B, K) int64, the positions of the views
    """
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return entropy.topk(max(1, int(keep * logits.shape[1])), largest=False).indices


def loss(logits: Tensor) -> Tensor:
    """H of the mean probability of K views, (B, K, C) -> (B,). Source: eq. 5."""
    log_p = logits.log_softmax(-1).logsumexp(1) - log(logits.shape[1])
    return -(log_p.exp() * log_p).sum(-1)


def scores(
    encoder,
    images: Views | Sequence[Tensor],
    class_names: Sequence[str],
    *,
    steps: int = 1,
    keep: float = 0.1,
    learning_rate: float = 5e-3,
    views: int = 64,
    seed: int = 0,
    batch_size: int = 4,
) -> Tensor:
    """Tune the context for each image by itself and classify the whole image with it.

    The image tower runs without gradients, once a view; the text tower runs forward and backward over all C prompts
    for every image and step, which is the cost. The images of a batch have contexts of their own, so that its size
    changes nothing but speed and memory.

    Args:
        encoder: whose text tower takes embedded tokens (`Encoder.encode_embedded`)
        images: `Views` of a bank, of which the whole image and the first views - 1 crops are used; or B pictures,
            uint8 (3, H, W), of which as many crops are drawn
        class_names: C names; the prompt is "a photo of a {name}."
        steps: of AdamW; 0 is CLIP
        keep: share of the views that count; they are chosen before the first step
        learning_rate: of AdamW
        views: of an image, the whole one included
        seed: of the crops that are drawn from pictures
        batch_size: images whose prompts meet the text tower together

    Returns:
        (B, C) float32, cosines of the whole image with the tuned prompts

    Raises:
        ValueError: no class, views < 1, keep outside (0, 1], or embeddings that are not finite or of unit norm (on the
            CPU)

    Source:
        Eqs. 3-5; 64 views, a tenth of them kept, one step of AdamW at 5e-3 are the released program's.

    Deviates:
        The views are area crops without a flip, which a bank has already.
    """
    if not class_names or views < 1 or not 0 < keep <= 1:
        raise ValueError(f"{len(class_names)} classes, {views} views, keep {keep}: give at least 1, 1 and (0, 1]")
    tokens, start = encoder.embed_prompts([f"{CONTEXT} {name}." for name in class_names], CONTEXT)
    view = _from_bank(images, views) if isinstance(images, Views) else _from_pixels(encoder, images, views, seed)
    check_unit(view, "view")
    return torch.cat(
        [
            _tuned(encoder, part, tokens, start, steps, keep, learning_rate)
            for part in view.to(start.device).split(batch_size)
        ]
        or [view.new_zeros(0, len(class_names))]
    )


def _from_bank(images: Views, views: int) -> Tensor:
    return torch.cat([images.image[:, None], images.crop[:, : views - 1]], dim=1)


def _from_pixels(encoder, pictures: Sequence[Tensor], views: int, seed: int) -> Tensor:
    box = torch.stack(
        [crops.sample_area_boxes(*x.shape[1:], views - 1, AREA, seed, str(i)) for i, x in enumerate(pictures)]
    )
    crop = encoder.encode_crops(pictures, box)
    return torch.cat([encoder.encode_images(pictures)[:, None], crop], dim=1)


def _tuned(
    encoder, view: Tensor, tokens: Tensor, start: Tensor, steps: int, keep: float, learning_rate: float
) -> Tensor:
    """(b, C): views (b, V, D) of some images, prompts (C, T), the context (n, W) from which each image starts."""
    context = start.detach().expand(len(view), *start.shape).clone().requires_grad_()
    optimizer = torch.optim.AdamW([context], lr=learning_rate)
    kept = None
    for _ in range(steps):
        label = normalize(encoder.encode_embedded(tokens, context).float(), dim=-1)  # (b, C, D)
        if kept is None:
            chosen = confident(encoder.logit_scale * view @ label.detach().mT, keep)
            kept = view.gather(1, chosen[..., None].expand(-1, -1, view.shape[-1]))
        (context.grad,) = torch.autograd.grad(loss(encoder.logit_scale * kept @ label.mT).sum(), context)
        optimizer.step()
    with torch.no_grad():
        label = normalize(encoder.encode_embedded(tokens, context).float(), dim=-1)
    return torch.einsum("bd,bcd->bc", view[:, 0], label)


METHODS = (Method("TPT", scores, ("crops", "encoder"), "#a0522d", lambda crops: 64),)
