"""FAIR, fine-grained alignment and interaction refinement: CLIP adapts to unlabelled images by its own scores.

    x, alpha(x), A(x)        an image, weakly and strongly augmented
    p_i                      crop i of alpha(x), side lambda_i min(W, H), lambda_i ~ U(alpha, beta), i = 1..N
    f, f_i          (D,)     embeddings of alpha(x) and of p_i, unit norm
    f^[CLS], f_i^[CLS] (W,)  their [CLS] tokens before projection
    Z*              (C, D)   class description anchors (CDA): a parameter
    Theta           (N, C)   cos(f_i, Z*_c), eq. 11
    w_i, I_k        (N,)     crop weights, eq. 12, and the k crops of largest weight, eq. 13
    psi             (C,)     the learned alignment score (LAS), eq. 14; y^ is its argmax
    S_i, S_j                 the largest and second largest entry of psi
    gamma                    weight of a pseudo-label, eq. 16
    p_A(x)          (C,)     softmax of the student's cosines with Z*; p_bar its moving average

The paper's settings are `Settings`, the rows of its tables `rows`.

Source: Ali et al. 2025, "Towards fine-grained adaptation of CLIP via a self-trained alignment score"
(arXiv 2507.09615), equations by number, Algorithm 1.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, log_softmax, nll_loss, normalize
from torchvision.transforms import v2

from upclose import checkpoint, crops, seeds
from upclose.checkpoint import State
from upclose.features import Dataset, Text, Views
from upclose.methods import augment, wca
from upclose.methods.entry import Method
from upclose.methods.tuning import Tuning, tune

CHOICES = {
    "weak": ("crops", "resized"),
    "crop_weights": ("cls", "softmax"),
    "classifier": ("anchors", "descriptions", "mean"),
    "pseudo_weight": ("gap", "top", "none"),
    "gamma": ("raw", "batch"),
}
READERS = 16  # threads at most that load pictures for a device
FIXED = {"descriptions": wca.class_means, "mean": Text.mean}


class Settings(NamedTuple):
    """How FAIR adapts; the defaults are the paper's. A row of its tables is `_replace` of some of them, see `rows`.

    Attributes:
        n: N, crops an image
        k: crops that count; None is all
        crop_scale: (alpha, beta), the share of the short side
        weak: "crops": of the centre square; "resized": one RandomResizedCrop instead, the whole view (FAIR-g)
        crop_weights: "cls" is eq. 12; "softmax" is WCA's eq. 8
        classifier: what the crops are compared with: "anchors" Z*; "descriptions" WCA's eqs. 9 and 10, fixed; "mean"
            CuPL's eq. 5, fixed. The student trains Z* in any case
        pseudo_weight: form of gamma, see `pseudo_label_weights`
        gamma: "raw" is eq. 16; "batch" divides by the mean over the batch
        shared: pseudo-labels from the encoder as it is adapted; False: from the encoder as it was given. The anchors
            that its crops are compared with are the adapted Z* in both cases
        logit_scale: multiplies the student's cosines before the softmax; None is the model's own
        momentum: m of p_bar <- m p_bar + (1 - m) mean of the batch's p_A(x); uniform at the start
        tuning: see `tuning.tune`
        rank: see `tuning.tune`
        epochs: MaxEpochs
        batch_size: images a step; the last batch of an epoch may be smaller
        learning_rate: of AdamW, at the start of a cosine that ends at 0 (1e-6 on Food-101 and SUN397)
        weight_decay: of AdamW, for all that is trained
        seed: of the order, the crops and the augmentations
    """

    n: int = 16
    k: int | None = 4
    crop_scale: tuple[float, float] = (0.5, 0.9)
    weak: Literal["crops", "resized"] = "crops"
    crop_weights: Literal["cls", "softmax"] = "cls"
    classifier: Literal["anchors", "descriptions", "mean"] = "anchors"
    pseudo_weight: Literal["gap", "top", "none"] = "gap"
    gamma: Literal["raw", "batch"] = "raw"
    shared: bool = True
    logit_scale: float | None = None
    momentum: float = 0.9
    tuning: Tuning = "layernorm"
    rank: int = 4
    epochs: int = 15
    batch_size: int = 32
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    seed: int = 0


PAPER = Settings()


def rows(base: Settings = PAPER) -> dict[str, Settings]:
    """The rows of the paper's tables, by their published names.

    In Table 3 each row below "WCA as PL" adds one thing to it ("combining all three" is FAIR w/o PL weight). "FAIR-g"
    stands in two tables: Table 7's has the weight of pseudo-labels, Table 3's has not.

    Args:
        base: what a row does not say

    Source:
        Tables 1-10; "FAIR (batch gamma)" is ours.
    """
    by_wca = base._replace(k=None, crop_weights="softmax", classifier="descriptions", pseudo_weight="none")
    return {
        "FAIR": base,
        "FAIR-LN": base,  # Table 10's name for it
        "FAIR w/o LAS": base._replace(classifier="descriptions"),
        "FAIR w/o PL weight": base._replace(pseudo_weight="none"),
        "FAIR-g": base._replace(weak="resized", classifier="mean", pseudo_weight="none"),
        "FAIR-g + LAS": base._replace(weak="resized", pseudo_weight="none"),
        "FAIR-g + LAS + PL weight": base._replace(weak="resized"),
        "WCA as PL": by_wca,
        "WCA as PL + Crop Selection": by_wca._replace(k=base.k),
        "WCA as PL + [CLS]-based crop weights": by_wca._replace(crop_weights="cls"),
        "WCA as PL + Interaction w/ CDA (LAS)": by_wca._replace(classifier="anchors"),
        "neither factor": base._replace(pseudo_weight="none"),  # Table 5
        "S_i only": base._replace(pseudo_weight="top"),
        "S_i and |S_i - S_j|": base,
        "FAIR (w/ WCA PL)": by_wca._replace(pseudo_weight="gap"),  # Table 7
        "FAIR-g (Table 7)": base._replace(weak="resized", classifier="mean"),
        "FAIR-LoRA": base._replace(tuning="lora"),  # Table 10
        "FAIR-KAdaptation": base._replace(tuning="k-adaptation"),
        "FAIR (batch gamma)": base._replace(gamma="batch"),
    }


ROWS = rows()


class History(NamedTuple):
    """What happened in E epochs.

    Attributes:
        self_training: (E,) float32, mean L_st, eq. 17
        fairness: (E,) float32, mean L_reg; log(C) is its least value
        pseudo_label: (E, n) int64, the label y^ that image i of the data set was given; -1 where it could not be read
        weight: (E, n) float32, its gamma, eq. 16, before any normalisation
    """

    self_training: Tensor
    fairness: Tensor
    pseudo_label: Tensor
    weight: Tensor


class Adapted(NamedTuple):
    """The result of `adapt`.

    Attributes:
        encoder: an adapted copy of the encoder that was given
        anchors: (C, D) Z*, unit norm; `clip.scores(views, text._replace(label=anchors))` is the paper's inference
        history: of the training
    """

    encoder: object
    anchors: Tensor
    history: History


def weights(image_cls: Tensor, crop_cls: Tensor) -> Tensor:
    """w_i: cos(f^[CLS], f_i^[CLS]) over its sum over the image's crops, no softmax.

    Args:
        image_cls: (B, W) [CLS] tokens of the images before projection, any norm
        crop_cls: (B, N, W) the same of the crops

    Returns:
        (B, N), each row sums to 1

    Source:
        Eq. 12.

    Deviates:
        Where an image's cosines add up to 0 or less, the equation divides by 0 or ranks its crops backwards; there all
        crops weigh 1 / N. The [CLS] tokens of a CLIP have positive cosines.
    """
    cosine = cosine_similarity(image_cls[:, None], crop_cls, dim=-1)
    total = cosine.sum(-1, keepdim=True)
    return torch.where(total <= 0, 1 / cosine.shape[-1], cosine / total)


def scores(views: Views, anchors: Tensor, k: int | None = 4) -> Tensor:
    """FAIR's learned alignment score: sum over the k crops of largest weight of w_i cos(f_i, Z*_c).

    Args:
        views: B images, N crops each, with the [CLS] tokens
        anchors: (C, D) Z*, any norm
        k: crops that count; None is all N

    Returns:
        (B, C) float32, larger is better

    Raises:
        ValueError: no [CLS] tokens, no crops, or not 1 <= k <= N

    Source:
        Eqs. 11-14. The sum is (sum_i w_i f_i) . Z*_c, so Theta is never made: memory beyond the inputs is
        B * (D + N * W + C) numbers.

    Deviates:
        Eq. 13 sorts upwards as it stands; the text takes the most relevant crops, so downwards. Of equal weights the
        lower i comes first. The k weights are not normalised again, as in eq. 14.

    Example:
        >>> views = Views(torch.eye(2)[:1], torch.eye(2)[None], None, torch.eye(2)[:1], torch.eye(2)[None])
        >>> scores(views, anchors=torch.eye(2), k=1).tolist()  # the crop whose token is the image's
        [[1.0, 0.0]]
    """
    return _alignment(views, normalize(anchors, dim=-1), k, "cls")


def pseudo_label_weights(scores: Tensor, *, form: Literal["gap", "top", "none"] = "gap") -> Tensor:
    """gamma: how far a pseudo-label is trusted.

    Args:
        scores: (B, C) psi, C >= 2
        form: "gap" is S_i |S_i - S_j|; "top" is S_i; "none" is 1 (Table 5)

    Returns:
        (B,) not negative

    Raises:
        ValueError: another form, or fewer than two classes

    Source:
        Eq. 16.

    Deviates:
        A negative S_i counts as 0: a negative weight would unlearn the pseudo-label without bound.
    """
    _check_choices(pseudo_weight=form)
    if scores.shape[-1] < 2:
        raise ValueError(f"{scores.shape[-1]} class: gamma compares the two best scores, so give at least two")
    first, second = scores.topk(2).values.unbind(-1)
    if form == "none":
        return torch.ones_like(first)
    return first.clamp_min(0) * (first - second if form == "gap" else 1)


def self_training_loss(log_probability: Tensor, pseudo_label: Tensor, weight: Tensor) -> Tensor:
    """L_st: the mean over the batch of -gamma log p_A(x)[y^].

    Args:
        log_probability: (B, C) log p_A(x)
        pseudo_label: (B,) int64
        weight: (B,) gamma

    Source:
        Eq. 17; eq. 15 where the weights are 1.
    """
    return (weight * nll_loss(log_probability, pseudo_label, reduction="none")).mean()


def fairness_loss(log_prediction: Tensor) -> Tensor:
    """L_reg: -1/C sum_j log p_bar_j of (C,) log p_bar; log(C) when it is uniform.

    Logarithms come in, so that a class whose probability underflows still has a gradient.

    Source:
        Section 3.4, between eqs. 15 and 16.
    """
    return -log_prediction.mean()


def moving_average(log_average: Tensor, log_probability: Tensor, momentum: float) -> Tensor:
    """log(m p_bar + (1 - m) mean of p_A(x)); gradients flow through the batch alone.

    Args:
        log_average: (C,) log p_bar
        log_probability: (B, C) log p_A(x)
        momentum: m, 0 <= m < 1
    """
    log_mean = log_probability.logsumexp(0) - math.log(len(log_probability))
    if momentum == 0:
        return log_mean
    return torch.logaddexp(log_average.detach() + math.log(momentum), log_mean + math.log(1 - momentum))


def strong_augmentation(size: int) -> Callable[[Tensor], Tensor]:
    """A(x): RandomResizedCrop (bicubic, antialiased), horizontal flip, RandAugment; uint8 (3, H, W) -> (3, S, S).

    Source:
        Section 6.1.

    Deviates:
        The paper gives no strengths: torchvision's defaults (8 to 100 % of the area; 2 operations of magnitude 9).
    """
    crop = v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), v2.RandAugment()])


def adapt(
    encoder,
    dataset: Dataset,
    text: Text,
    settings: Settings = PAPER,
    *,
    strong: Callable[[Tensor], Tensor] | None = None,
    pseudo_label: Callable[[Tensor], Tensor] | None = None,
    state: State | None = None,
    on_epoch: Callable[[State], None] | None = None,
    **changes,
) -> Adapted:
    """FAIR self-training on the images of a data set, whose labels are never read.

    The encoder that is given stays as it is; a copy of its image tower is adapted, and the text tower, which FAIR no
    longer needs, is shared. A data set of training images is the inductive setting, one of test images the
    transductive. On a CPU the same arguments give the same result, whether a run was interrupted or not. On a GPU
    nothing waits for the device within an epoch.

    Args:
        encoder: `encode.load(...)`, in fp32 or bf16; on its device
        dataset: the unlabelled images, loaded anew each epoch, the next batch by a thread while the encoder works; for
            a GPU by more threads, which keep as many as half of the free memory holds. One that cannot be read is left
            out with a warning that names it
        text: of its C >= 2 classes; the descriptions make Z*
        settings: the paper's, or one of `rows`
        strong: A(x), uint8 (3, H, W) -> (3, S, S), random by torch's global generator; None is `strong_augmentation`
            on a processor, and on a GPU `augment.views`, the same for whole batches from draws of its own
        pseudo_label: labels from elsewhere, (b,) int64 indices of images -> (b,) int64; nothing is then computed
            without gradient, and gamma is 1
        state: what `on_epoch` was given last; training goes on from there
        on_epoch: called after each epoch with all that it takes to go on: a dict of tensors on the CPU, which
            `safetensors.torch.save_file` writes as it is
        changes: fields of `settings` to replace, such as epochs=3

    Returns:
        the adapted copy, Z* and the history of all epochs

    Raises:
        ValueError: an argument out of range, k > N, fewer than two classes, no images that can be read,
            a setting that there is not,
            another number of classes than the data set has, text of another encoder's dimensions, an encoder in fp16,
            an encoder without a [CLS] token where crops are weighted by it, a pseudo-label that is no class, a
            strong view of another size, a state of other arguments
        ImportError: tuning="lora" without peft
        FloatingPointError: a loss that is not finite, at the end of its epoch

    Warns:
        UserWarning: an image cannot be read

    Source:
        Algorithm 1; sections 3.4, 4 and 6.1.

    Deviates:
        - Softmax: eq. 15 and Algorithm 1 have no temperature. With cosines alone p_A(x) is nearly uniform whatever the
          image; the default is the model's logit scale, `logit_scale=1` the equations as they stand. Algorithm 1 gives
          probabilities to a cross entropy; we take their logarithm once, as eq. 15 does.
        - p_bar: "a moving average ... across the batch", of unknown momentum and start: 0.9, uniform. Gradients flow
          through the current batch alone.
        - gamma: eq. 12 normalises over N and eq. 14 sums k of them, so raw gamma is of order 1e-3 and L_reg can drown
          L_st. The default is the paper's; `history` has both losses, and gamma="batch" brings L_st back to size.
        - Gradients do not flow through gamma or y^ (Algorithm 1, line 17).
        - Weak view: crops of the centre square are cut from the original pixels, not from its resized copy, and are
          drawn anew each epoch from (seed, epoch, key). FAIR-g's RandomResizedCrop has torchvision's default scale and
          ratio; strong views are drawn from (seed, epoch, key) too.
        - FAIR w/o LAS is not described; we keep eqs. 12 and 13 and gamma and put the fixed descriptions in the place
          of Z*.
        - AdamW's betas and weight decay are torch's; a cosine without warm-up.
        - "The pseudo-labeling branch shares parameters with the fine-tuned model" is the default (`shared`).
    """
    settings = settings._replace(**changes)
    _check_problem(encoder, dataset, text, settings)
    classes, device = len(text.label), encoder.device
    student = _copy(encoder)
    teacher = student if settings.shared else encoder
    anchors = nn.Parameter(normalize(text.mean(), dim=-1).to(device))
    tuned = tune(student.visual, settings.tuning, rank=settings.rank, seed=settings.seed)
    trained = {"anchors": anchors, **{f"visual.{name}": weight for name, weight in tuned.items()}}
    optimizer = torch.optim.AdamW(trained.values(), settings.learning_rate, weight_decay=settings.weight_decay)
    fixed = None if settings.classifier == "anchors" else FIXED[settings.classifier](text).to(device)

    scale = encoder.logit_scale if settings.logit_scale is None else settings.logit_scale  # asked of a device once

    run = _run(encoder, dataset, text, *settings, strong is None, pseudo_label is None)
    readers, read = 1, _reader(dataset)
    if device.type == "cpu":
        strong = strong or strong_augmentation(encoder.image_size)
    else:
        readers = min(READERS, os.cpu_count() or 1)
        read = _reader(dataset, psutil.virtual_memory().available // 2)
    log_average, history = torch.full((classes,), -math.log(classes), device=device), _no_history(len(dataset))
    if state is not None:
        log_average, history = _resume(state, run, trained, optimizer)
    steps = math.ceil(len(dataset) / settings.batch_size)
    for epoch in range(len(history.fairness), settings.epochs):
        order = torch.from_numpy(seeds.rng(settings.seed, "order", epoch).permutation(len(dataset)))
        batches = []
        for step, (index, pictures) in enumerate(_batches(dataset, order, settings.batch_size, read, readers)):
            if not pictures:
                continue
            keys = [dataset.key[i] for i in index.tolist()]
            pictures = pictures if device.type == "cpu" else _moved(pictures, device)
            if pseudo_label is None:
                classifier = normalize(anchors.detach(), dim=-1) if fixed is None else fixed
                psi = _teach(teacher, pictures, keys, classifier, seeds.derive(settings.seed, "weak", epoch), settings)
                label, weight = psi.argmax(-1), pseudo_label_weights(psi, form=settings.pseudo_weight)
            else:
                label = _given(pseudo_label, index, classes).to(device, non_blocking=True)
                weight = torch.ones(len(index), device=device)
            x = _strong_views(pictures, keys, strong, seeds.derive(settings.seed, "strong", epoch), student)
            done = (epoch * steps + step) / (settings.epochs * steps)
            optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 + math.cos(math.pi * done)) / 2
            log_average, losses = _descend(student, anchors, optimizer, x, label, weight, log_average, settings, scale)
            batches.append((index, label, weight, losses))
        history = _extend(history, batches)
        if on_epoch is not None:
            kept = {"run": run, "log_average": log_average} | {f"history.{k}": v for k, v in history._asdict().items()}
            on_epoch(checkpoint.pack(trained, [optimizer], **kept))
    return Adapted(student, normalize(anchors.detach(), dim=-1), history)


def _descend(
    student,
    anchors: Tensor,
    optimizer,
    x: Tensor,
    label: Tensor,
    weight: Tensor,
    log_average: Tensor,
    settings: Settings,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One step: lines 26-30 of Algorithm 1 for strong views x (B, 3, S, S). Nothing is read back from the device.

    Returns:
        log p_bar (C,) after the batch, and (2,): L_st and L_reg
    """
    log_p = log_softmax(scale * student.features(x) @ normalize(anchors, dim=-1).mT, dim=-1)
    log_average = moving_average(log_average, log_p, settings.momentum)
    gamma = weight / weight.mean().clamp_min(1e-30) if settings.gamma == "batch" else weight
    losses = torch.stack([self_training_loss(log_p, label, gamma), fairness_loss(log_average)])
    optimizer.zero_grad()
    losses.sum().backward()
    optimizer.step()
    return log_average, losses.detach()


def _copy(encoder):
    """An encoder with an image tower of its own; the text tower and the sentences that it remembers are shared."""
    model = encoder.model
    parts = [child for name, child in model.named_children() if name != "visual"]
    parts += [*model.parameters(recurse=False), *model.buffers(recurse=False), encoder.tokenize, encoder._text]
    return copy.deepcopy(encoder, {id(part): part for part in parts})


Read = Callable[[Tensor], tuple[dict[int, Tensor], dict[int, Exception]]]


def _reader(dataset: Dataset, room: int = 0) -> Read:
    """What loads pictures by their indices: those that can be read, and what is wrong with the others.

    Up to `room` bytes of them are kept for the next epochs.
    """
    kept: dict[int, Tensor] = {}

    def read(index: Tensor) -> tuple[dict[int, Tensor], dict[int, Exception]]:
        nonlocal room
        found, lost = {}, {}
        for i in index.tolist():
            picture = kept.get(i)
            if picture is None:
                try:
                    picture = dataset.load(i)
                except ValueError as error:  # a damaged picture; what a disk does wrong ends the run
                    lost[i] = error
                    continue
                if picture.numel() <= room:
                    kept[i], room = picture, room - picture.numel()
            found[i] = picture
        return found, lost

    return read


def _batches(
    dataset: Dataset, order: Tensor, batch_size: int, read: Read, readers: int = 1
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Indices and pictures of an epoch's batches; each of the readers, threads, is a batch ahead of what is used."""
    batches = order.split(batch_size)
    with ThreadPoolExecutor(readers) as reader:
        ahead = deque(reader.submit(read, index) for index in batches[:readers])
        for following in (*batches[readers:], *[None] * len(ahead)):
            found, lost = ahead.popleft().result()
            if following is not None:
                ahead.append(reader.submit(read, following))
            for i, error in lost.items():
                warnings.warn(f"{dataset.key[i]} cannot be read ({error}) and is left out", stacklevel=3)
            yield torch.tensor(list(found)), list(found.values())


def _moved(pictures: list[Tensor], device: torch.device) -> list[Tensor]:
    """The pictures on a device, in one copy that the host does not wait for."""
    flat = crops.upload([picture.reshape(-1) for picture in pictures], device)
    parts = flat.split([picture.numel() for picture in pictures])
    return [part.view(picture.shape) for part, picture in zip(parts, pictures)]


def _alignment(views: Views, classifier: Tensor, k: int | None, crop_weights: str) -> Tensor:
    """Eq. 14 with a (C, D) classifier that need not have unit norm: (B, C) float32."""
    _check_selection(k, views.crop.shape[1])
    if crop_weights == "cls" and (views.image_cls is None or views.crop_cls is None):
        raise ValueError("the views hold no [CLS] tokens, which eq. 12 compares: encode them with cls=True (Plan.cls)")
    w = weights(views.image_cls, views.crop_cls) if crop_weights == "cls" else wca.image_weights(views)
    if k is not None:
        rest = w.argsort(dim=-1, descending=True, stable=True)[:, k:]
        w = w.scatter(-1, rest, 0.0)
    return (torch.einsum("bn,bnd->bd", w, views.crop) @ classifier.mT).float()


@torch.no_grad()
def _teach(teacher, pictures, keys, classifier: Tensor, seed: int, settings: Settings) -> Tensor:
    """Psi of the weak views, (B, C); all of a batch is one call of the encoder."""
    if settings.weak == "resized":
        box = [crops.sample_area_boxes(*x.shape[1:], 1, (0.08, 1.0), seed, key) for x, key in zip(pictures, keys)]
        return teacher.encode_crops(pictures, box)[:, 0] @ classifier.mT
    drawn = (settings.n, settings.crop_scale, seed)
    box = [weak_boxes(*x.shape[1:], *drawn, key) for x, key in zip(pictures, keys)]
    if settings.crop_weights == "softmax":
        feature = teacher.encode_crops(pictures, box)
        views = Views(feature[:, 0], feature[:, 1:])
    else:
        feature, cls = teacher.encode_crops(pictures, box, cls=True)
        views = Views(feature[:, 0], feature[:, 1:], None, cls[:, 0], cls[:, 1:])
    return _alignment(views, classifier, settings.k, settings.crop_weights)


def weak_boxes(height: int, width: int, n: int, scale: tuple[float, float], seed: int, key: str) -> Tensor:
    """The centre square of a picture and `n` random square crops of it: (1 + n, 4), the square first."""
    side = min(height, width)
    corner = torch.tensor([(width - side) // 2, (height - side) // 2] * 2, dtype=torch.float32)
    whole = torch.tensor([[0.0, 0.0, side, side]])
    return corner + torch.cat([whole, crops.sample_boxes(side, side, n, scale, seed, key)])


def _strong_views(pictures, keys, strong, seed, encoder) -> Tensor:
    """A(x) of a batch, normalised (B, 3, S, S) on the encoder's device; without `strong` all are made there at once."""
    if strong is None:
        x = augment.views(pictures, keys, encoder.image_size, seed, encoder.device)
        facts = zip(x.unbind(1), encoder.mean, encoder.std)
        return torch.stack([(channel / 255 - mean) / std for channel, mean, std in facts], 1)
    views = []
    with torch.random.fork_rng(devices=[]):
        for picture, key in zip(pictures, keys):
            torch.default_generator.manual_seed(seeds.derive(seed, key))
            views.append(strong(picture))
    size = (3, encoder.image_size, encoder.image_size)
    if wrong := [view for view in views if view.shape != size or view.dtype != torch.uint8]:
        raise ValueError(f"strong gave {wrong[0].dtype} {tuple(wrong[0].shape)}: it must give uint8 {size}")
    x = torch.stack(views).to(encoder.device).float() / 255
    return v2.functional.normalize(x, list(encoder.mean), list(encoder.std))


def _given(pseudo_label: Callable[[Tensor], Tensor], index: Tensor, classes: int) -> Tensor:
    label = torch.as_tensor(pseudo_label(index))
    if label.shape != index.shape or label.is_floating_point() or not ((label >= 0) & (label < classes)).all():
        raise ValueError(f"pseudo_label must give each of {len(index)} images a class 0..{classes - 1}, not {label}")
    return label.long()


def _no_history(n: int) -> History:
    return History(torch.empty(0), torch.empty(0), torch.empty(0, n, dtype=torch.int64), torch.empty(0, n))


def _extend(history: History, batches: list[tuple[Tensor, ...]]) -> History:
    """The history with one more epoch: (index, label, weight, losses) of each batch."""
    if not batches:
        raise ValueError("none of the pictures can be read: see the warnings")
    index, label, weight, losses = zip(*batches)
    loss = torch.stack(losses).mean(0).cpu()
    if not loss.isfinite().all():
        raise FloatingPointError(
            f"the losses of epoch {len(history.fairness) + 1} are {loss.tolist()}: lower learning_rate, or fp32"
        )
    index, n = torch.cat(index), history.weight.shape[1]
    label = torch.full((1, n), -1).index_copy(1, index, torch.cat(label).cpu()[None])
    weight = torch.zeros(1, n).index_copy(1, index, torch.cat(weight).cpu()[None])
    return History(*(torch.cat(pair) for pair in zip(history, (loss[:1], loss[1:], label, weight))))


def _run(encoder, dataset: Dataset, text: Text, *settings: object) -> Tensor:
    """(1,) int64, a hash of all that decides the result of a run."""
    sentences = hashlib.sha256(b"".join(part.cpu().numpy().tobytes() for part in text)).hexdigest()
    return torch.tensor([seeds.derive(0, encoder.fingerprint, dataset.fingerprint, sentences, *settings)])


def _resume(state: State, run: Tensor, trained: dict[str, Tensor], optimizer) -> tuple[Tensor, History]:
    """Put a state back where it was; the logarithm of its moving average and its history."""
    if "run" not in state or not torch.equal(state["run"], run):
        raise ValueError(
            "the state belongs to a run with other weights, images, sentences or arguments: "
            "call adapt as that run was called, or start anew with state=None"
        )
    checkpoint.unpack(state, trained, [optimizer])
    history = History(*(state[f"history.{field}"] for field in History._fields))
    return state["log_average"].to(trained["anchors"].device), history


def _check_choices(**chosen: str) -> None:
    for name, value in chosen.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, CHOICES[name]))}, not {value!r}")


def _check_selection(k: int | None, n: int) -> None:
    if n < 1 or (k is not None and not 1 <= k <= n):
        raise ValueError(f"k={k} crops cannot be selected from N={n}: choose 1 <= k <= N, or None for all")


def _check_problem(encoder, dataset: Dataset, text: Text, settings: Settings) -> None:
    _check_choices(**{name: getattr(settings, name) for name in CHOICES})
    _check_selection(settings.k, settings.n)
    momentum, epochs, batch_size = settings.momentum, settings.epochs, settings.batch_size
    if len(text.label) < 2:
        raise ValueError(f"{len(text.label)} class: FAIR compares the two best, so give it at least two")
    if len(text.label) != len(dataset.class_names):
        raise ValueError(f"text has {len(text.label)} classes but {dataset.name} has {len(dataset.class_names)}")
    if text.label.shape[1] != encoder.dim:
        raise ValueError(f"text has {text.label.shape[1]} dimensions but the encoder has {encoder.dim}: embed it anew")
    if len(dataset) == 0:
        raise ValueError(f"{dataset.name} has no images to adapt to")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), not {momentum}: with 1 the fairness loss has no gradient")
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs={epochs} and batch_size={batch_size} must be at least 1")
    if (settings.weak, settings.crop_weights) == ("crops", "cls"):
        encoder.check_cls()
    if encoder.precision == "fp16":
        raise ValueError("gradients of order gamma = 1e-3 vanish in fp16: load the encoder in bf16 or fp32")


METHODS = (
    Method(
        "FAIR",
        adapt,
        ("crops", "descriptions", "cls", "encoder"),
        "#fbafe4",
        lambda crops: crops + 1 + 3,  # the strong view's forward and backward pass are three more
        rows=tuple(ROWS),
    ),
)
