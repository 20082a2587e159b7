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

The rows of the paper's tables as arguments of `adapt`:

    row                                                arguments
    Tables 1-10, FAIR                                  the defaults
    Tables 1-10, FAIR on Food-101 and SUN397           learning_rate=1e-6
    3  FAIR w/o LAS                                    classifier="descriptions"
    3  FAIR w/o PL weight; 5 (no, no)                  pseudo_weight="none"
    5  (S_i, no)                                       pseudo_weight="top"
    3  FAIR-g                                          weak="resized", classifier="mean", pseudo_weight="none"
    3  FAIR-g + LAS                                    weak="resized", pseudo_weight="none"
    3  FAIR-g + LAS + PL weight                        weak="resized"
    3  WCA as PL (star)                                k=None, crop_weights="softmax", classifier="descriptions",
                                                       pseudo_weight="none"
    3  star + crop selection                           star with k=4
    3  star + [CLS]-based crop weights                 star with crop_weights="cls"
    3  star + interaction with CDA (LAS)               star with classifier="anchors"
    7  FAIR (w/ WCA PL)                                star with pseudo_weight="gap"
    7  FAIR-g                                          weak="resized", classifier="mean"
    10 FAIR-LoRA, FAIR-KAdaptation                     tuning="lora", tuning="k-adaptation"

In Table 3 each row below the star adds one thing to the star ("combining all three" is FAIR w/o PL weight).

Source: Ali et al. 2025, "Towards fine-grained adaptation of CLIP via a self-trained alignment score"
(arXiv 2507.09615), equations by number, Algorithm 1.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, log_softmax, nll_loss, normalize
from torch.nn.utils import parametrize
from torchvision.transforms import v2

from upclose import crops, seeds
from upclose.features import Dataset, Text, Views
from upclose.methods import clip, wca

Tuning = Literal["layernorm", "lora", "k-adaptation"]
State = dict[str, Tensor]

CHOICES = {
    "weak": ("crops", "resized"),
    "crop_weights": ("cls", "softmax"),
    "classifier": ("anchors", "descriptions", "mean"),
    "pseudo_weight": ("gap", "top", "none"),
    "gamma": ("raw", "batch"),
    "tuning": ("layernorm", "lora", "k-adaptation"),
}
FIXED = {"descriptions": wca.class_means, "mean": clip.class_means}
KRONECKER = 4
"""t, the number and side of K-Adaptation's shared matrices."""


class History(NamedTuple):
    """What happened in E epochs.

    Attributes:
        self_training: (E,) float32, mean L_st, eq. 17
        fairness: (E,) float32, mean L_reg; log(C) is its least value
        pseudo_label: (E, n) int64, the label y^ that image i of the data set was given
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
        Eq. 12. The [CLS] tokens of a CLIP have positive cosines; where an image's cosines add up to less than 0, the
        equation ranks its crops backwards.
    """
    cosine = cosine_similarity(image_cls[:, None], crop_cls, dim=-1)
    return cosine / cosine.sum(-1, keepdim=True)


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
    """
    return _alignment(views, normalize(anchors, dim=-1), k, "cls")


def pseudo_label_weights(scores: Tensor, form: Literal["gap", "top", "none"] = "gap") -> Tensor:
    """gamma: how far a pseudo-label is trusted.

    Args:
        scores: (B, C) psi, C >= 2
        form: "gap" is S_i |S_i - S_j|; "top" is S_i; "none" is 1 (Table 5)

    Returns:
        (B,) not negative

    Source:
        Eq. 16.

    Deviates:
        A negative S_i counts as 0: a negative weight would unlearn the pseudo-label without bound.
    """
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


def fairness_loss(prediction: Tensor) -> Tensor:
    """L_reg: -1/C sum_j log p_bar_j of the (C,) moving average of predictions; log(C) when it is uniform.

    Source:
        Section 3.4, between eqs. 15 and 16.
    """
    return -prediction.clamp_min(torch.finfo(prediction.dtype).tiny).log().mean()


def strong_augmentation(size: int) -> Callable[[Tensor], Tensor]:
    """A(x): RandomResizedCrop (bicubic, antialiased), horizontal flip, RandAugment; uint8 (3, H, W) -> (3, S, S).

    Source:
        Section 6.1.

    Deviates:
        The paper gives no strengths: torchvision's defaults (8 to 100 % of the area; 2 operations of magnitude 9).
    """
    crop = v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), v2.RandAugment()])


def tune(visual: nn.Module, tuning: Tuning = "layernorm", rank: int = 4, seed: int = 0) -> dict[str, nn.Parameter]:
    """Freeze an image tower, in place, but for what a way of tuning trains.

    Args:
        visual: an open_clip image tower
        tuning: "layernorm": the affine parameters of all LayerNorms. "lora": low-rank additions to the two matrices of
            every MLP, by the peft library. "k-adaptation": sum_s A_s (x) u_s v_s^T added to the query and value
            matrices of every block, A shared between the blocks
        rank: of LoRA's matrices, and of u_s v_s^T
        seed: of the additions' initial values; the tower computes the same as before

    Returns:
        name -> parameter, all that is trained in the tower

    Raises:
        ValueError: an unknown tuning, or a tower that has nothing that it could train
        ImportError: "lora" without peft

    Source:
        Section 4, "we focus on fine-tuning the layer-normalization weights"; Figure 9 and Table 10. Hu et al. 2022
        (LoRA); He et al. 2023 (K-Adaptation, arXiv 2203.16329).

    Deviates:
        The paper does not say where its LoRA and K-Adaptation sit, nor their sizes. LoRA: the MLPs, since open_clip
        packs query, key and value in one parameter that is no Linear layer; lora_alpha = rank. K-Adaptation: query and
        value, t = `KRONECKER` matrices of side t.
    """
    _check_choices(tuning=tuning)
    visual.requires_grad_(False)
    if tuning == "layernorm":
        for module in visual.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(True)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seeds.derive(seed, tuning))
            _add_lora(visual, rank) if tuning == "lora" else _add_kronecker(visual, rank)
    found = {name: weight for name, weight in visual.named_parameters() if weight.requires_grad}
    if not found:
        raise ValueError(f"tuning={tuning!r} finds nothing to train in a {type(visual).__name__}: take a ViT")
    return found


def adapt(
    encoder,
    dataset: Dataset,
    text: Text,
    *,
    n: int = 16,
    k: int | None = 4,
    crop_scale: tuple[float, float] = (0.5, 0.9),
    weak: Literal["crops", "resized"] = "crops",
    crop_weights: Literal["cls", "softmax"] = "cls",
    classifier: Literal["anchors", "descriptions", "mean"] = "anchors",
    pseudo_weight: Literal["gap", "top", "none"] = "gap",
    gamma: Literal["raw", "batch"] = "raw",
    shared: bool = True,
    logit_scale: float | None = None,
    momentum: float = 0.9,
    tuning: Tuning = "layernorm",
    rank: int = 4,
    strong: Callable[[Tensor], Tensor] | None = None,
    epochs: int = 15,
    batch_size: int = 32,
    learning_rate: float = 1e-4,
    weight_decay: float = 0.01,
    seed: int = 0,
    pseudo_label: Callable[[Tensor], Tensor] | None = None,
    state: State | None = None,
    on_epoch: Callable[[State], None] | None = None,
) -> Adapted:
    """FAIR self-training on the images of a data set, whose labels are never read.

    The encoder that is given stays as it is; a copy is adapted. A data set of training images is the inductive
    setting, one of test images the transductive. On a CPU the same arguments give the same result, whether a run was
    interrupted or not.

    Args:
        encoder: `encode.load(...)`, in fp32 or bf16; on its device
        dataset: the unlabelled images; what it draws or decodes is loaded anew each epoch
        text: of its C >= 2 classes; the descriptions make Z*
        n: N, crops an image
        k: crops that count; None is all
        crop_scale: (alpha, beta), the share of the short side
        weak: "crops": of the centre square; "resized": one RandomResizedCrop instead, the whole view (FAIR-g)
        crop_weights: "cls" is eq. 12; "softmax" is WCA's eq. 8
        classifier: what the crops are compared with: "anchors" Z*; "descriptions" WCA's eqs. 9 and 10, fixed; "mean"
            CuPL's eq. 5, fixed. The student trains Z* in any case
        pseudo_weight: form of gamma, see `pseudo_label_weights`
        gamma: "raw" is eq. 16; "batch" divides by the mean over the batch
        shared: pseudo-labels from the encoder as it is adapted; False: from the encoder as it was given
        logit_scale: multiplies the student's cosines before the softmax; None is the model's own
        momentum: m of p_bar <- m p_bar + (1 - m) mean of the batch's p_A(x); uniform at the start
        tuning: see `tune`
        rank: see `tune`
        strong: A(x), uint8 (3, H, W) -> (3, S, S), random by torch's global generator; None is `strong_augmentation`
        epochs: MaxEpochs
        batch_size: images a step; the last batch of an epoch may be smaller
        learning_rate: of AdamW, at the start of a cosine that ends at 0 (1e-6 on Food-101 and SUN397)
        weight_decay: of AdamW, for all that is trained
        seed: of the order, the crops and the augmentations
        pseudo_label: labels from elsewhere, (b,) int64 indices of images -> (b,) int64; nothing is then computed
            without gradient, and gamma is 1
        state: what `on_epoch` was given last; training goes on from there
        on_epoch: called after each epoch with all that it takes to go on: a dict of tensors on the CPU, which
            `safetensors.torch.save_file` writes as it is

    Returns:
        the adapted copy, Z* and the history of all epochs

    Raises:
        ValueError: an argument out of range, k > N, fewer than two classes, no images, another number of classes than
            the data set has, an encoder in fp16, a pseudo-label that is no class, a state of other arguments
        ImportError: tuning="lora" without peft
        FloatingPointError: a loss that is not finite, at the end of its epoch

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
    view = (n, k, crop_scale, weak, crop_weights)
    settings = (*view, classifier, pseudo_weight, gamma, shared, logit_scale, momentum)
    settings += (tuning, rank, epochs, batch_size, learning_rate, weight_decay, strong is None, pseudo_label is None)
    _check_choices(
        weak=weak, crop_weights=crop_weights, classifier=classifier, pseudo_weight=pseudo_weight, gamma=gamma
    )
    _check_problem(encoder, dataset, text, n, k, momentum, epochs, batch_size)
    classes, device = len(text.label), encoder.device
    student = copy.deepcopy(encoder)
    student.model.requires_grad_(False)
    teacher = student if shared else encoder
    anchors = nn.Parameter(normalize(clip.class_means(text), dim=-1).to(device))
    tuned = tune(student.visual, tuning, rank, seed)
    trained = {"anchors": anchors, **{f"visual.{name}": weight for name, weight in tuned.items()}}
    optimiser = torch.optim.AdamW(trained.values(), learning_rate, weight_decay=weight_decay)
    fixed = None if classifier == "anchors" else FIXED[classifier](text).to(device)
    strong = strong or strong_augmentation(encoder.image_size)
    logit_scale = encoder.logit_scale if logit_scale is None else logit_scale

    run = _run(encoder, dataset, text, seed, *settings)
    prediction, history = torch.full((classes,), 1 / classes, device=device), _no_history(len(dataset))
    if state is not None:
        prediction, history = _resume(state, run, trained, optimiser)
    steps = math.ceil(len(dataset) / batch_size)
    for epoch in range(len(history.fairness), epochs):
        order = torch.from_numpy(seeds.rng(seed, "order", epoch).permutation(len(dataset)))
        labels, confidences, losses = [], [], []
        for step, index in enumerate(order.split(batch_size)):
            pictures = [dataset.load(i) for i in index.tolist()]
            keys = [dataset.key[i] for i in index.tolist()]
            if pseudo_label is None:
                target = normalize(anchors.detach(), dim=-1) if fixed is None else fixed
                psi = _teach(teacher, pictures, keys, target, seeds.derive(seed, "weak", epoch), *view)
                label, confidence = psi.argmax(-1), pseudo_label_weights(psi, pseudo_weight)
            else:
                label = _given(pseudo_label, index, classes).to(device)
                confidence = torch.ones(len(index), device=device)
            share = confidence / confidence.mean().clamp_min(1e-30) if gamma == "batch" else confidence

            x = _strong_views(pictures, keys, strong, seeds.derive(seed, "strong", epoch), student)
            log_p = log_softmax(logit_scale * student.features(x) @ normalize(anchors, dim=-1).mT, dim=-1)
            prediction = momentum * prediction.detach() + (1 - momentum) * log_p.exp().mean(0)
            self_training, fairness = self_training_loss(log_p, label, share), fairness_loss(prediction)

            done = (epoch * steps + step) / (epochs * steps)
            optimiser.param_groups[0]["lr"] = learning_rate * (1 + math.cos(math.pi * done)) / 2
            optimiser.zero_grad()
            (self_training + fairness).backward()
            optimiser.step()
            labels.append(label)
            confidences.append(confidence)
            losses.append(torch.stack([self_training, fairness]).detach())
        history = _extend(history, order, labels, confidences, losses)
        if on_epoch is not None:
            on_epoch(_state(run, trained, optimiser, prediction, history))
    return Adapted(student, normalize(anchors.detach(), dim=-1), history)


def _alignment(views: Views, classifier: Tensor, k: int | None, crop_weights: str) -> Tensor:
    """Eq. 14 with a (C, D) classifier that need not have unit norm: (B, C) float32."""
    n = views.crop.shape[1]
    if not 1 <= (n if k is None else k) <= n:
        raise ValueError(f"k={k} crops cannot be selected from N={n}: choose 1 <= k <= N, or None for all")
    if crop_weights == "cls" and (views.image_cls is None or views.crop_cls is None):
        raise ValueError("the views hold no [CLS] tokens, which eq. 12 compares: encode them with cls=True (Plan.cls)")
    w = weights(views.image_cls, views.crop_cls) if crop_weights == "cls" else wca.image_weights(views)
    if k is not None:
        rest = w.argsort(dim=-1, descending=True, stable=True)[:, k:]
        w = w.scatter(-1, rest, 0.0)
    return (torch.einsum("bn,bnd->bd", w, views.crop) @ classifier.mT).float()


@torch.no_grad()
def _teach(teacher, pictures, keys, classifier, seed, n, k, crop_scale, weak, crop_weights) -> Tensor:
    """Psi of the weak views, (B, C); all of a batch is one call of the encoder."""
    if weak == "resized":
        box = [crops.sample_area_boxes(*x.shape[1:], 1, (0.08, 1.0), seed, key) for x, key in zip(pictures, keys)]
        return teacher.encode_crops(pictures, torch.stack(box))[:, 0] @ classifier.mT
    box = torch.stack([weak_boxes(*x.shape[1:], n, crop_scale, seed, key) for x, key in zip(pictures, keys)])
    if crop_weights == "softmax":
        feature = teacher.encode_crops(pictures, box)
        return _alignment(Views(feature[:, 0], feature[:, 1:]), classifier, k, crop_weights)
    feature, cls = teacher.encode_crops(pictures, box, cls=True)
    views = Views(feature[:, 0], feature[:, 1:], None, cls[:, 0], cls[:, 1:])
    return _alignment(views, classifier, k, crop_weights)


def weak_boxes(height: int, width: int, n: int, scale: tuple[float, float], seed: int, key: str) -> Tensor:
    """The centre square of a picture and `n` random square crops of it: (1 + n, 4), the square first."""
    side = min(height, width)
    corner = torch.tensor([(width - side) // 2, (height - side) // 2] * 2, dtype=torch.float32)
    whole = torch.tensor([[0.0, 0.0, side, side]])
    return corner + torch.cat([whole, crops.sample_boxes(side, side, n, scale, seed, key)])


def _strong_views(pictures, keys, strong, seed, encoder) -> Tensor:
    """A(x) of a batch, normalised (B, 3, S, S) on the encoder's device."""
    views = []
    with torch.random.fork_rng(devices=[]):
        for picture, key in zip(pictures, keys):
            torch.default_generator.manual_seed(seeds.derive(seed, key))
            views.append(strong(picture))
    x = torch.stack(views).to(encoder.device).float() / 255
    return v2.functional.normalize(x, list(encoder.mean), list(encoder.std))


def _given(pseudo_label: Callable[[Tensor], Tensor], index: Tensor, classes: int) -> Tensor:
    label = torch.as_tensor(pseudo_label(index))
    if label.shape != index.shape or label.is_floating_point() or not ((label >= 0) & (label < classes)).all():
        raise ValueError(f"pseudo_label must give each of {len(index)} images a class 0..{classes - 1}, not {label}")
    return label.long()


class _Kronecker(nn.Module):
    """W_qkv (3W, W) -> the same with sum_s A_s (x) u_s v_s^T added to W_q and W_v; 0 at the start."""

    def __init__(self, shared: nn.Parameter, width: int, rank: int):
        super().__init__()
        t, side = len(shared), width // len(shared)
        self.shared = shared
        self.u = nn.Parameter(torch.zeros(2, t, side, rank))
        self.v = nn.Parameter(torch.randn(2, t, rank, side) / math.sqrt(side))

    def forward(self, weight: Tensor) -> Tensor:
        query, key, value = weight.chunk(3)
        delta = torch.einsum("sab,psmr,psrn->pambn", self.shared, self.u, self.v).reshape(2, *query.shape)
        return torch.cat([query + delta[0], key, value + delta[1]])


def _add_kronecker(visual: nn.Module, rank: int) -> None:
    layers = [m for m in visual.modules() if isinstance(m, nn.MultiheadAttention) and m.in_proj_weight is not None]
    shared = nn.Parameter(torch.randn(KRONECKER, KRONECKER, KRONECKER) / KRONECKER)
    for layer in layers:
        if layer.embed_dim % KRONECKER:
            raise ValueError(f"k-adaptation needs a width that {KRONECKER} divides, not {layer.embed_dim}")
        addition = _Kronecker(shared, layer.embed_dim, rank).to(layer.in_proj_weight.device)
        parametrize.register_parametrization(layer, "in_proj_weight", addition)


def _add_lora(visual: nn.Module, rank: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError('tuning="lora" uses the peft library: install it with `pip install peft`') from error
    target = r".*mlp\.(c_fc|c_proj|fc1|fc2)"
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=target), visual)


def _no_history(n: int) -> History:
    return History(torch.empty(0), torch.empty(0), torch.empty(0, n, dtype=torch.int64), torch.empty(0, n))


def _extend(history: History, order: Tensor, labels: list, confidences: list, losses: list) -> History:
    loss = torch.stack(losses).mean(0).cpu()
    if not loss.isfinite().all():
        raise FloatingPointError(
            f"the losses of epoch {len(history.fairness) + 1} are {loss.tolist()}: lower learning_rate, or fp32"
        )
    back = order.argsort()
    label, weight = (torch.cat(parts).cpu()[back][None] for parts in (labels, confidences))
    return History(*(torch.cat(pair) for pair in zip(history, (loss[:1], loss[1:], label, weight))))


def _run(encoder, dataset: Dataset, text: Text, seed: int, *settings: object) -> Tensor:
    """(1,) int64, a hash of all that decides the result of a run."""
    sentences = hashlib.sha256(b"".join(part.cpu().numpy().tobytes() for part in text)).hexdigest()
    return torch.tensor([seeds.derive(seed, encoder.fingerprint, dataset.fingerprint, sentences, *settings)])


def _state(run: Tensor, trained: dict, optimiser, prediction: Tensor, history: History) -> State:
    found = {"run": run, "prediction": prediction, **{f"history.{k}": v for k, v in history._asdict().items()}}
    for name, weight in trained.items():
        found[f"weight.{name}"] = weight
        found |= {f"{fact}.{name}": value for fact, value in optimiser.state[weight].items()}
    return {key: value.detach().clone().cpu().contiguous() for key, value in found.items()}


@torch.no_grad()
def _resume(state: State, run: Tensor, trained: dict, optimiser) -> tuple[Tensor, History]:
    """Put a state back where it was; its moving average and its history."""
    if not torch.equal(state["run"], run):
        raise ValueError(
            "the state belongs to a run with other weights, images, sentences or arguments: "
            "call adapt as that run was called, or start anew with state=None"
        )
    moments = {}
    for i, (name, weight) in enumerate(trained.items()):
        weight.copy_(state[f"weight.{name}"])
        facts = ("step", "exp_avg", "exp_avg_sq")
        moments[i] = {fact: state[f"{fact}.{name}"].clone() for fact in facts if f"{fact}.{name}" in state}
    optimiser.load_state_dict({"state": moments, "param_groups": optimiser.state_dict()["param_groups"]})
    history = History(*(state[f"history.{field}"] for field in History._fields))
    return state["prediction"].to(trained["anchors"].device), history


def _check_choices(**chosen: str) -> None:
    for name, value in chosen.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, CHOICES[name]))}, not {value!r}")


def _check_problem(encoder, dataset, text, n, k, momentum, epochs, batch_size) -> None:
    if len(text.label) < 2:
        raise ValueError(f"{len(text.label)} class: FAIR compares the two best, so give it at least two")
    if len(text.label) != len(dataset.class_names):
        raise ValueError(f"text has {len(text.label)} classes but {dataset.name} has {len(dataset.class_names)}")
    if len(dataset) == 0:
        raise ValueError(f"{dataset.name} has no images to adapt to")
    if n < 1 or (k is not None and not 1 <= k <= n):
        raise ValueError(f"k={k} crops cannot be selected from N={n}: choose 1 <= k <= N, or None for all")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), not {momentum}: with 1 the fairness loss has no gradient")
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs={epochs} and batch_size={batch_size} must be at least 1")
    if encoder.precision == "fp16":
        raise ValueError("gradients of order gamma = 1e-3 vanish in fp16: load the encoder in bf16 or fp32")
