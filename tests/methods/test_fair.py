"""FAIR against loops written from its equations and open_clip's own forward, on a random small ViT."""

import copy
import inspect
import math
import threading
from concurrent.futures import Future
from math import log

import numpy as np
import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import load, save
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.functional import cosine_similarity, cross_entropy, normalize
from torchvision.transforms import v2

from upclose import compare, crops, encode, seeds
from upclose.encode import sources, tiny
from upclose.features import Text, Views
from upclose.methods import augment, clip, fair, wca

SIDE, DIM, WIDTH = 32, 16, 32


class Pictures:
    """Striped pictures of several sizes, class by colour; the label is not for FAIR."""

    name, split, domain, domain_names = "striped", "train", None, []

    def __init__(self, n, classes=3, present=None, seed=0):
        self.class_names = [f"colour {c}" for c in range(classes)]
        self.key = [f"{seed}/{i}" for i in range(n)]
        self.fingerprint = f"{n} {classes} {present} {seed}"
        self.truth = torch.arange(n) % (present or classes)
        self.pixels = []
        for i, c in enumerate(self.truth.tolist()):
            draw = seeds.generator(seed, "striped", i)
            x = torch.randint(0, 120, (3, 36 + i % 3, 44 - i % 5), generator=draw, dtype=torch.uint8)
            x[c % 3, :: 2 + c // 3] += 100
            self.pixels.append(x)

    @property
    def label(self):
        raise AssertionError("a label was read")

    def __len__(self):
        return len(self.key)

    def load(self, i):
        return self.pixels[i]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    vision = {"image_size": SIDE, "patch_size": 16, "width": WIDTH, "head_width": 16, "layers": 2}
    words = {"context_length": 8, "vocab_size": 80, "width": 16, "heads": 1, "layers": 1}
    model = CLIP(DIM, vision, words)
    with torch.no_grad():
        for module in model.visual.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.add_(0.3 * torch.randn_like(module.weight))
                module.bias.add_(0.3 * torch.randn_like(module.bias))
    parts = sources.Parts(model, tiny.tokenizer(("bird",), 8), SIDE, (0.5, 0.4, 0.3), (0.3, 0.2, 0.1), False)
    return encode.Encoder(parts, "small")


def text_of(classes=3, dim=DIM, counts=(3, 1, 4, 2, 4), near=None):
    """Random descriptions, or descriptions near (C, D) `near`."""
    draw = seeds.generator(0, "text", classes)

    def rows(c, m):
        noise = torch.randn(m, dim, generator=draw)
        return normalize(noise if near is None else near[c] + noise, dim=-1)

    lists = [rows(c, counts[c]) for c in range(classes)]
    return Text.from_lists(torch.stack([normalize(x.mean(0), dim=-1) for x in lists]), lists)


def views_of(batch=5, n=7, dim=DIM, width=WIDTH, dtype=torch.float32):
    draw = seeds.generator(0, "views", batch, n)

    def unit(*shape):
        return normalize(torch.randn(*shape, generator=draw, dtype=dtype), dim=-1)

    cls = 3 + torch.randn(batch, n + 1, width, generator=draw, dtype=dtype)
    return Views(unit(batch, dim), unit(batch, n, dim), None, cls[:, 0], cls[:, 1:])


def resize(picture):
    return v2.functional.resize(picture, [SIDE, SIDE])


def adapt(encoder, dataset, text, **options):
    """`fair.adapt`, short and with a strong view that a naive loop can repeat."""
    return fair.adapt(encoder, dataset, text, **{"strong": resize, "epochs": 1, "n": 5, "k": 2, **options})


def accuracy(adapted, dataset):
    feature = adapted.encoder.encode_images(dataset.pixels)
    return (((feature @ adapted.anchors.mT).argmax(-1)) == dataset.truth).float().mean().item()


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


# eqs. 11 to 17


def test_weights_equal_equation_12():
    views = views_of()
    found = fair.weights(views.image_cls, views.crop_cls)
    for b in range(5):
        sims = [cosine(views.image_cls[b], views.crop_cls[b, i]) for i in range(7)]
        assert found[b].tolist() == pytest.approx([s / sum(sims) for s in sims], abs=1e-6)
    assert torch.allclose(found.sum(-1), torch.ones(5))
    assert torch.allclose(fair.weights(9 * views.image_cls, 0.1 * views.crop_cls), found)


@pytest.mark.parametrize("k", [1, 2, 4, 7, None])
def test_scores_equal_equations_11_to_14(k):
    views, anchors = views_of(), 3 * torch.randn(4, DIM, generator=seeds.generator(0))
    found = fair.scores(views, anchors, k)
    for b in range(5):
        sims = [cosine(views.image_cls[b], views.crop_cls[b, i]) for i in range(7)]
        best = sorted(range(7), key=lambda i: -sims[i])[: k or 7]
        for c in range(4):
            psi = sum(sims[i] / sum(sims) * cosine(views.crop[b, i], anchors[c]) for i in best)
            assert found[b, c].item() == pytest.approx(psi, abs=1e-6)
    assert found.dtype == torch.float32
    assert torch.allclose(fair.scores(views.select(slice(2, 3)), anchors, k), found[2:3], atol=1e-6)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    mixed = views._replace(crop=views.crop[:, order], crop_cls=views.crop_cls[:, order])
    assert torch.allclose(fair.scores(mixed, anchors.flip(0), k).flip(1), found, atol=1e-6)


def test_cosines_that_do_not_add_up_to_more_than_nothing_weigh_alike():
    image = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    other = torch.tensor([[[1.0, 0], [-1, 0]], [[-1.0, 0], [-0.1, 1]], [[0.0, 1], [0, -1]], [[1.0, 0], [-0.1, 1]]])
    found = fair.weights(image, other)
    assert torch.equal(found[:3], torch.full((3, 2), 0.5))
    assert found[3, 0] > 1 > 0 > found[3, 1]  # eq. 12 as it stands
    assert fair.weights(image[:1], torch.full((1, 2, 2), math.nan)).isnan().all()


def test_equal_tokens_and_all_crops_are_the_multi_crop_control():
    views, text = views_of(), text_of(counts=(1, 1, 1))
    alike = views._replace(crop_cls=views.image_cls[:, None].expand_as(views.crop_cls))
    assert torch.allclose(fair.scores(alike, text.description, None), clip.multi_crop_scores(views, text), atol=1e-6)
    first = fair.scores(alike, text.description, 1)  # ties: the lower crop first
    assert torch.allclose(first, views.crop[:, 0] @ text.description.mT / 7, atol=1e-6)


@pytest.mark.parametrize("k", [0, -1, 8])
def test_k_that_cannot_be_selected_is_an_error(k):
    with pytest.raises(ValueError, match=f"k={k} .*N=7"):
        fair.scores(views_of(), torch.randn(3, DIM), k)


def test_views_without_tokens_are_an_error():
    with pytest.raises(ValueError, match=r"\[CLS\]"):
        fair.scores(Views(*views_of()[:2]), torch.randn(3, DIM))


def test_gamma_equals_equation_16():
    psi = torch.tensor([[0.1, 0.3, 0.25], [0.2, 0.2, 0.1], [-0.3, -0.1, -0.2], [0.5, -0.5, 0.0]])
    assert fair.pseudo_label_weights(psi).tolist() == pytest.approx([0.3 * 0.05, 0, 0, 0.25], abs=1e-7)
    assert fair.pseudo_label_weights(psi, form="top").tolist() == pytest.approx([0.3, 0.2, 0, 0.5])
    assert fair.pseudo_label_weights(psi, form="none").tolist() == [1, 1, 1, 1]
    assert fair.pseudo_label_weights(psi[:, :2]).tolist() == pytest.approx([0.06, 0, 0, 0.5])


def test_gamma_of_another_form_or_of_one_class_is_an_error():
    with pytest.raises(ValueError, match="'gap', 'top', 'none', not 'foo'"):
        fair.pseudo_label_weights(torch.rand(2, 3), form="foo")
    with pytest.raises(ValueError, match="1 class"):
        fair.pseudo_label_weights(torch.rand(2, 1))


@pytest.mark.parametrize("momentum", [0.0, 0.6, 0.9])
def test_the_moving_average_accumulates(momentum):
    average, log_average = torch.full((4,), 0.25), torch.full((4,), -log(4))
    for step in range(3):
        p = torch.randn(5, 4, generator=seeds.generator(step)).softmax(-1)
        average = momentum * average + (1 - momentum) * p.mean(0)
        log_average = fair.moving_average(log_average, p.log(), momentum)
        assert torch.allclose(log_average.exp(), average, atol=1e-6)


def test_a_class_that_has_died_still_has_a_gradient():
    logits = torch.tensor([[0.0, 0.0, -300.0]] * 2, requires_grad=True)  # exp(-300) is 0 in float32
    log_average = torch.full((3,), -400.0)
    fair.fairness_loss(fair.moving_average(log_average, logits.log_softmax(-1), 0.9)).backward()
    assert (logits.grad[:, 2] < -0.1).all()


def test_losses_equal_equations_15_and_17():
    logits, label, gamma = torch.randn(6, 4), torch.tensor([0, 3, 1, 1, 2, 0]), torch.rand(6)
    log_p = logits.log_softmax(-1)
    naive = sum(-gamma[b] * log(log_p[b].exp()[label[b]]) for b in range(6)) / 6
    assert fair.self_training_loss(log_p, label, gamma).item() == pytest.approx(naive.item(), rel=1e-5)
    unit = fair.self_training_loss(log_p, label, torch.ones(6))
    assert unit.item() == pytest.approx(cross_entropy(logits, label).item(), rel=1e-6)
    p = [0.7, 0.1, 0.2]
    assert fair.fairness_loss(torch.tensor(p).log()).item() == pytest.approx(-sum(map(log, p)) / 3, rel=1e-6)
    assert fair.fairness_loss(torch.full((3,), -log(3))).item() == pytest.approx(log(3), rel=1e-6)


def test_scores_need_no_device_and_no_synchronisation():
    with FakeTensorMode(), torch.device("cuda"):
        cls = torch.empty(2, 7, WIDTH)
        views = Views(torch.empty(2, DIM), torch.empty(2, 7, DIM), None, cls[:, 0], cls)
        psi = fair.scores(views, torch.empty(3, DIM), 4)
        assert psi.shape == (2, 3)
        assert fair.pseudo_label_weights(psi).device.type == "cuda"


# views


@pytest.mark.parametrize(("height", "width"), [(40, 61), (61, 40), (40, 40)])
def test_weak_crops_lie_in_the_centre_square_and_have_the_papers_side(height, width):
    whole, *box = fair.weak_boxes(height, width, 200, (0.5, 0.9), 3, "a").tolist()
    assert (whole[2] - whole[0], whole[3] - whole[1]) == (40, 40)
    assert abs(whole[0] - (width - 40) / 2) <= 0.5
    assert abs(whole[1] - (height - 40) / 2) <= 0.5
    for x0, y0, x1, y1 in box:
        assert whole[0] <= x0 < x1 <= whole[2]
        assert whole[1] <= y0 < y1 <= whole[3]
        assert x1 - x0 == y1 - y0
        assert 20 <= x1 - x0 <= 36


def test_strong_views_depend_on_seed_epoch_and_key_alone(encoder):
    pictures, strong = Pictures(3), fair.strong_augmentation(SIDE)

    def draw(items, seed=1):
        return fair._strong_views(
            [pictures.load(i) for i in items], [pictures.key[i] for i in items], strong, seed, encoder
        )

    torch.manual_seed(5)
    before = torch.get_rng_state()
    three = draw([0, 1, 2])
    assert torch.equal(torch.get_rng_state(), before)
    assert three.shape == (3, 3, SIDE, SIDE)
    torch.rand(9)
    assert torch.equal(draw([2, 0]), three[[2, 0]])
    assert not torch.equal(draw([0, 1, 2], 2), three)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (encoder.mean, encoder.std))
    plain = fair._strong_views(pictures.pixels[:1], ["a"], resize, 0, encoder)[0]
    assert torch.allclose(plain, (resize(pictures.load(0)).float() / 255 - mean) / std, atol=1e-5)


def test_strong_views_of_a_device_are_made_at_once_and_normalised(encoder):
    pictures = Pictures(3)
    found = fair._strong_views(pictures.pixels, pictures.key, None, 5, encoder)
    pixels = augment.views(pictures.pixels, pictures.key, SIDE, 5, encoder.device)
    expected = v2.functional.normalize(pixels.float() / 255, list(encoder.mean), list(encoder.std))
    assert torch.allclose(found, expected, atol=1e-6)


def test_pictures_move_in_one_copy():
    pixels = Pictures(3).pixels
    assert all(map(torch.equal, fair._moved(pixels, torch.device("cpu")), pixels))
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = fair._moved(pixels, torch.device("cuda"))
        assert [(x.device.type, x.shape) for x in there] == [("cuda", x.shape) for x in pixels]


def outside(call):
    """The call, made on real tensors whatever mode is on."""

    def inner(tensor, *given, **named):
        with unset_fake_temporarily():
            return call(tensor, *given, **named)

    return inner


@pytest.mark.filterwarnings("ignore:Accessing the data pointer", "ignore:CUDA is not available")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_epoch_on_a_device_looks_at_nothing(monkeypatch, precision):
    """Fake tensors have no values: whatever looks at one raises, from the first batch to the end of the epoch."""
    seen, dataset = [], Pictures(5)
    monkeypatch.setattr(torch.Tensor, "numpy", outside(torch.Tensor.numpy))
    monkeypatch.setattr(torch.Tensor, "tolist", outside(torch.Tensor.tolist))
    monkeypatch.setattr(torch.Tensor, "backward", lambda _: None)  # its engine asks the driver
    batches = list(fair._batches(dataset, torch.arange(5), 3, fair._reader(dataset)))
    monkeypatch.setattr(fair, "_batches", lambda *_: batches)
    monkeypatch.setattr(fair, "_run", lambda *_: torch.zeros(1))
    monkeypatch.setattr(fair, "_extend", lambda history, batches: seen.extend(batches) or history)
    boxes = {key: crops.sample_boxes(36, 40, 6, key=key) for key in dataset.key}
    monkeypatch.setattr(fair, "weak_boxes", lambda *given: boxes[given[-1]])
    draws = {key: augment.draw(36, 40, 0, key) for key in dataset.key}
    monkeypatch.setattr(augment, "draw", lambda *given: draws[given[-1]])
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        vision = {"image_size": SIDE, "patch_size": 16, "width": WIDTH, "head_width": 16, "layers": 2}
        words = {"context_length": 8, "vocab_size": 80, "width": 16, "heads": 1, "layers": 1}
        model = CLIP(DIM, vision, words)
        monkeypatch.setattr(model, "to", lambda device: model)
        parts = sources.Parts(model, tiny.tokenizer(("bird",), 8), SIDE, (0.5, 0.4, 0.3), (0.3, 0.2, 0.1), False)
        encoder = encode.Encoder(parts, "small", "cuda", precision)
        monkeypatch.setattr(encode.Encoder, "logit_scale", 100.0)
        text = Text(torch.empty(3, DIM), torch.empty(6, DIM), torch.zeros(6, dtype=torch.int64))
        found = fair.adapt(encoder, dataset, text, epochs=1, n=5, k=2, batch_size=3)
        assert found.anchors.device.type == "cuda"
        assert [[x.device.type for x in batch] for batch in seen] == [["cpu", "cuda", "cuda", "cuda"]] * 2


@pytest.mark.parametrize(("room", "loads"), [(0, [0, 1, 2, 0, 1, 2]), (10**6, [0, 1, 2, 2]), (6000, [0, 1, 2, 1, 2])])
def test_pictures_are_kept_while_there_is_room(room, loads):
    dataset, seen = Pictures(3), []
    pixels = dataset.pixels

    def load(i):
        seen.append(i)
        if i == 2:
            raise ValueError("torn")
        return pixels[i]

    dataset.load = load
    read = fair._reader(dataset, room)
    for _ in range(2):
        found, lost = read(torch.arange(3))
        assert [found[i] is pixels[i] for i in (0, 1)] == [True, True]
        assert list(lost) == [2]
    assert seen == loads


@pytest.mark.parametrize("readers", [1, 3, 9])
def test_batches_come_in_order_however_many_threads_read(readers):
    dataset = Pictures(7)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    found = list(fair._batches(dataset, order, 2, fair._reader(dataset), readers))
    assert torch.equal(torch.cat([index for index, _ in found]), order)
    for index, pictures in found:
        assert all(x is dataset.pixels[i] for i, x in zip(index.tolist(), pictures))


def test_strong_views_are_cropped_mirrored_and_changed_in_colour():
    strong = fair.strong_augmentation(SIDE)
    assert [type(step) for step in strong.transforms] == [v2.RandomResizedCrop, v2.RandomHorizontalFlip, v2.RandAugment]
    plain = torch.full((3, 40, 40), 100, dtype=torch.uint8)
    ramp = torch.arange(40, dtype=torch.uint8).mul(3).expand(3, 40, 40)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        colours = [strong(plain)[:, 10:20, 10:20].float().mean().round().item() for _ in range(40)]
        rises = [(x[0, 16, 20] > x[0, 16, 12]).item() for x in (strong(ramp).int() for _ in range(40))]
    assert 100 in colours
    assert len(set(colours)) > 3
    assert 5 < sum(rises) < 35


# Algorithm 1


def naive_views(encoder, dataset, epoch, n, seed=0):
    """(n, 1 + N, D) embeddings and [CLS] tokens of the weak views, one crop at a time by open_clip's forward."""
    features, tokens = [], []
    for x, key in zip(dataset.pixels, dataset.key):
        for box in fair.weak_boxes(*x.shape[1:], n, (0.5, 0.9), seeds.derive(seed, "weak", epoch), key):
            pixels = crops.extract(x, box[None], SIDE, mean=encoder.mean, std=encoder.std)
            with torch.no_grad():
                found = encoder.visual.forward_intermediates(
                    pixels, indices=1, normalize_intermediates=True, output_fmt="NLC", output_extra_tokens=True
                )
            features.append(normalize(found["image_features"][0], dim=-1))
            tokens.append(found["image_intermediates_prefix"][0][0, 0])
    return torch.stack(features).view(len(dataset), 1 + n, -1), torch.stack(tokens).view(len(dataset), 1 + n, -1)


@pytest.mark.parametrize("gamma", ["raw", "batch"])
def test_a_step_equals_algorithm_1(encoder, gamma):
    dataset, text, states = Pictures(6), text_of(), []
    found = adapt(encoder, dataset, text, gamma=gamma, momentum=0.6, on_epoch=states.append).history

    anchors = torch.stack([text.description[text.owner == c].mean(0) for c in range(3)])
    anchors = nn.Parameter(normalize(anchors, dim=-1))
    feature, token = naive_views(encoder, dataset, 0, 5)
    labels, gammas = [], []
    for b in range(6):
        sims = torch.stack([cosine_similarity(token[b, 0], token[b, i], dim=0) for i in range(1, 6)])
        w = sims / sims.sum()
        chosen = sorted(range(5), key=lambda i: -w[i])[:2]
        psi = [sum(w[i] * (feature[b, 1 + i] @ anchors[c].detach()) for i in chosen).item() for c in range(3)]
        best, second = sorted(psi, reverse=True)[:2]
        labels.append(psi.index(best))
        gammas.append(max(best, 0) * abs(best - second))
    assert found.pseudo_label[0].tolist() == labels
    assert found.weight[0].tolist() == pytest.approx(gammas, abs=1e-5)
    assert max(gammas) > 1e-3

    share = [g / (sum(gammas) / 6) for g in gammas] if gamma == "batch" else gammas
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (encoder.mean, encoder.std))
    x = torch.stack([(resize(p).float() / 255 - mean) / std for p in dataset.pixels])
    f = normalize(encoder.visual(x), dim=-1)
    p = (encoder.logit_scale * f @ anchors.T / anchors.norm(dim=-1)).softmax(-1)
    self_training = sum(-share[b] * p[b, labels[b]].log() for b in range(6)) / 6
    fairness = -(0.6 / 3 + 0.4 * p.mean(0)).log().sum() / 3
    assert found.self_training.item() == pytest.approx(self_training.item(), rel=2e-3)
    assert found.fairness.item() == pytest.approx(fairness.item(), rel=1e-4)

    names = [name for name in states[0] if name.startswith("exp_avg.")]
    weights = [
        anchors if name == "exp_avg.anchors" else encoder.visual.get_parameter(name.removeprefix("exp_avg.visual."))
        for name in names
    ]
    gradient = torch.autograd.grad(self_training + fairness, weights)
    for name, wanted in zip(names, gradient):
        assert torch.allclose(states[0][name] / 0.1, wanted, rtol=5e-3, atol=5e-3 * wanted.abs().max().item()), name


def test_the_defaults_are_the_papers():
    given = fair.PAPER._asdict()
    paper = dict(n=16, k=4, crop_scale=(0.5, 0.9), batch_size=32, epochs=15, learning_rate=1e-4)
    paper |= dict(weak="crops", crop_weights="cls", classifier="anchors", pseudo_weight="gap", gamma="raw")
    paper |= dict(shared=True, tuning="layernorm", logit_scale=None, momentum=0.9, weight_decay=0.01)
    assert {name: given[name] for name in paper} == paper
    assert inspect.signature(fair.scores).parameters["k"].default == 4


def test_two_epochs_of_two_batches_equal_a_naive_loop(encoder):
    dataset, text = Pictures(6), text_of()
    found = fair.adapt(
        encoder,
        dataset,
        text,
        strong=resize,
        epochs=2,
        batch_size=4,
        learning_rate=1e-2,
        momentum=0.6,
        seed=3,
        pseudo_label=lambda index: dataset.truth[index],
    )
    visual = copy.deepcopy(encoder.visual).requires_grad_(False)
    anchors = torch.stack([text.description[text.owner == c].mean(0) for c in range(3)])
    anchors = nn.Parameter(normalize(anchors, dim=-1))
    tuned = [w for m in visual.modules() if isinstance(m, nn.LayerNorm) for w in (m.weight, m.bias)]
    optimizer = torch.optim.AdamW([anchors, *(w.requires_grad_() for w in tuned)], lr=1e-2)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (encoder.mean, encoder.std))
    average, step = torch.full((3,), 1 / 3), 0
    for epoch in range(2):
        order = seeds.rng(3, "order", epoch).permutation(6)
        losses = []
        for rows in (order[:4], order[4:]):
            x = torch.stack([(resize(dataset.pixels[i]).float() / 255 - mean) / std for i in rows])
            p = (encoder.logit_scale * normalize(visual(x), dim=-1) @ normalize(anchors, dim=-1).T).softmax(-1)
            average = 0.6 * average.detach() + 0.4 * p.mean(0)
            self_training = -p[range(len(rows)), dataset.truth[rows]].log().mean()
            fairness = -average.log().mean()
            optimizer.param_groups[0]["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * step / 4))
            optimizer.zero_grad()
            (self_training + fairness).backward()
            optimizer.step()
            losses.append((self_training.item(), fairness.item()))
            step += 1
        wanted = [sum(part) / 2 for part in zip(*losses)]
        assert [found.history.self_training[epoch].item(), found.history.fairness[epoch].item()] == pytest.approx(
            wanted, rel=1e-3
        )
    start = normalize(text.mean(), dim=-1)
    assert (found.anchors - start).abs().max() > 5e-3
    assert torch.allclose(found.anchors, normalize(anchors.detach(), dim=-1), atol=2e-4)
    for (name, weight), naive in zip(found.encoder.visual.named_parameters(), visual.parameters()):
        assert torch.allclose(weight, naive, atol=5e-4), name
    assert any((a - b).abs().max() > 1e-2 for a, b in zip(visual.parameters(), encoder.visual.parameters()))


def test_the_rows_are_those_of_the_paper():
    paper = compare.published("FAIR")
    names = {t: set(paper[paper.table == t].method) for t in ("Table 3", "Table 7", "Table 10")}
    assert names["Table 3"] - {"CLIP"} <= set(fair.ROWS)
    assert names["Table 7"] - {"FAIR (w/ CODER PL)"} <= set(fair.ROWS)
    assert names["Table 10"] <= set(fair.ROWS)
    assert set(paper[paper.table == "Table 5"].setting) <= set(fair.ROWS)
    assert fair.rows(fair.PAPER._replace(k=7))["WCA as PL + Crop Selection"].k == 7


@pytest.mark.parametrize("row", fair.ROWS)
def test_the_rows_of_the_tables_label_as_they_say(encoder, row):
    if row == "FAIR-LoRA":
        pytest.importorskip("peft")
    row_settings = fair.rows(fair.Settings(n=5, epochs=1))[row]
    options = row_settings._asdict()
    dataset, text, seed = Pictures(4), text_of(), seeds.derive(0, "weak", 0)
    found = fair.adapt(encoder, dataset, text, row_settings, strong=resize).history
    anchors = normalize(text.mean(), dim=-1)
    if options["weak"] == "resized":
        box = [
            crops.sample_area_boxes(*x.shape[1:], 1, (0.08, 1.0), seed, k) for x, k in zip(dataset.pixels, dataset.key)
        ]
        views = Views(encoder.encode_crops(dataset.pixels, torch.stack(box))[:, 0], torch.empty(4, 0, DIM))
        own = options["classifier"] == "anchors"
        psi = views.image @ anchors.mT if own else clip.description_scores(views, text)
    else:
        feature, token = naive_views(encoder, dataset, 0, 5)
        views = Views(feature[:, 0], feature[:, 1:], None, token[:, 0], token[:, 1:])
        softmax = options["crop_weights"] == "softmax"
        w = wca.image_weights(views) if softmax else fair.weights(views.image_cls, views.crop_cls)
        if options["k"] is not None:
            w = w * (w >= w.sort(descending=True).values[:, options["k"] - 1 : options["k"]])
        label = wca.class_means(text) if options["classifier"] == "descriptions" else anchors
        psi = torch.einsum("bn,bnd,cd->bc", w, views.crop, label)
        if row in ("WCA as PL", "FAIR (w/ WCA PL)"):
            assert torch.allclose(psi, wca.scores(views, text), atol=1e-6)
        if row == "FAIR":
            assert torch.allclose(psi, fair.scores(views, anchors, 4), atol=1e-6)
    assert torch.equal(found.pseudo_label[0], psi.argmax(-1))
    expected = fair.pseudo_label_weights(psi, form=options["pseudo_weight"])
    assert torch.allclose(found.weight[0], expected, atol=1e-5)


def test_only_layernorm_and_anchors_change(encoder):
    dataset, text, states = Pictures(8), text_of(), []
    before = {name: weight.detach().clone() for name, weight in encoder.model.state_dict().items()}
    grads = [weight.requires_grad for weight in encoder.model.parameters()]
    print_before = encoder.fingerprint
    found = fair.adapt(
        encoder, dataset, text, n=5, k=2, epochs=2, batch_size=4, learning_rate=1e-2, on_epoch=states.append
    )

    assert encoder.fingerprint == print_before
    assert [weight.requires_grad for weight in encoder.model.parameters()] == grads
    assert found.encoder.fingerprint != print_before
    norms = {
        f"visual.{name}.{kind}"
        for name, module in encoder.visual.named_modules()
        if isinstance(module, nn.LayerNorm)
        for kind in ("weight", "bias")
    }
    after = found.encoder.model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == norms
    assert {name.removeprefix("weight.") for name in states[-1] if name.startswith("weight.")} == norms | {"anchors"}
    for name in norms | {"anchors"}:  # a gradient reached every one of them
        assert states[0][f"exp_avg_sq.{name}"].sum() > 0, name
    start = normalize(text.mean(), dim=-1)
    assert (found.anchors - start).norm(dim=-1).min() > 0
    assert torch.allclose(found.anchors.norm(dim=-1), torch.ones(3))


def test_frozen_weights_keep_no_activations(encoder):
    def held(visual):
        seen = {}

        def pack(x):
            seen[x.data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            tiny.image_features(visual, torch.randn(4, 3, SIDE, SIDE))
        return sum(seen.values())

    adapted = adapt(encoder, Pictures(2), text_of())
    assert held(adapted.encoder.visual) < 0.8 * held(encoder.visual)
    with torch.no_grad():
        assert held(encoder.visual) == 0


@pytest.mark.parametrize("tuning", ["layernorm", "lora", "k-adaptation"])
def test_a_resumed_run_equals_an_undisturbed_one(encoder, tuning):
    if tuning == "lora":
        pytest.importorskip("peft")
    dataset, text, states = Pictures(7), text_of(), []
    options = dict(n=4, k=2, epochs=3, batch_size=3, learning_rate=1e-2, tuning=tuning, rank=2)
    whole = fair.adapt(encoder, dataset, text, **options, on_epoch=states.append)
    torch.manual_seed(99)
    again = []
    resumed = fair.adapt(encoder, dataset, text, **options, state=load(save(states[0])), on_epoch=again.append)
    restored = fair.adapt(encoder, dataset, text, **options, state=states[-1])  # nothing left to do
    for other in (resumed, restored):
        assert other.encoder.fingerprint == whole.encoder.fingerprint
        assert torch.equal(other.anchors, whole.anchors)
        assert all(map(torch.equal, other.history, whole.history))
    assert all(torch.equal(states[-1][name], again[-1][name]) for name in states[-1])
    assert whole.history.pseudo_label.shape == (3, 7)
    assert not torch.equal(fair.adapt(encoder, dataset, text, **options, seed=1).anchors, whole.anchors)
    with pytest.raises(ValueError, match="belongs to a run with other"):
        fair.adapt(encoder, dataset, text, **{**options, "epochs": 4}, state=states[0])


def test_a_run_does_not_depend_on_the_global_random_state(encoder):
    found = []
    for state in (1, 2):
        torch.manual_seed(state)
        found.append(
            fair.adapt(encoder, Pictures(5), text_of(), n=4, k=2, epochs=2, batch_size=2, tuning="k-adaptation")
        )
    assert torch.equal(found[0].anchors, found[1].anchors)
    assert found[0].encoder.fingerprint == found[1].encoder.fingerprint
    assert all(map(torch.equal, found[0].history, found[1].history))


class Serial:
    """An executor that does the work at once, in the thread that asks for it."""

    def __init__(self, threads):
        assert threads == 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args):
        done = Future()
        done.set_result(function(*args))
        return done


def test_pictures_that_are_read_ahead_change_nothing(encoder, monkeypatch):
    options = dict(n=4, k=2, epochs=2, batch_size=2, learning_rate=1e-2)
    ahead = fair.adapt(encoder, Pictures(7), text_of(), **options)
    monkeypatch.setattr(fair, "ThreadPoolExecutor", Serial)
    serial = fair.adapt(encoder, Pictures(7), text_of(), **options)
    assert torch.equal(ahead.anchors, serial.anchors)
    assert ahead.encoder.fingerprint == serial.encoder.fingerprint
    assert all(map(torch.equal, ahead.history, serial.history))


def test_the_next_batch_is_read_while_this_one_is_used(encoder):
    dataset, readers, more = Pictures(4), [], threading.Event()
    load = dataset.load

    def watched(i):
        readers.append(threading.current_thread())
        if len(readers) == 4:
            more.set()
        return load(i)

    def label(index):
        assert more.wait(10), "the second batch is not read before the first one is done"
        return torch.zeros_like(index)

    dataset.load = watched
    adapt(encoder, dataset, text_of(), batch_size=2, pseudo_label=label)
    assert len(readers) == 4
    assert threading.main_thread() not in readers


def test_a_picture_that_cannot_be_read_is_named_and_left_out(encoder):
    dataset, text = Pictures(5), text_of()
    load = dataset.load

    def broken(i):
        if i in lost:
            raise ValueError("cut short")
        return load(i)

    dataset.load, lost = broken, {3}
    options = dict(n=4, k=2, epochs=2, batch_size=1)
    with pytest.warns(UserWarning, match=r"0/3 cannot be read \(cut short\)"):
        found = fair.adapt(encoder, dataset, text, **options)
    assert found.history.pseudo_label[:, 3].tolist() == [-1, -1]
    assert found.history.weight[:, 3].tolist() == [0, 0]
    assert (found.history.pseudo_label[:, [0, 1, 2, 4]] >= 0).all()
    lost = set()
    whole = fair.adapt(encoder, dataset, text, **options, learning_rate=0.0)
    assert torch.equal(whole.history.pseudo_label[0, [0, 1, 2, 4]], found.history.pseudo_label[0, [0, 1, 2, 4]])
    lost = set(range(5))
    with pytest.warns(UserWarning, match="cannot be read"), pytest.raises(ValueError, match="none of the pictures"):
        fair.adapt(encoder, dataset, text, **options)


def test_a_failing_disk_stops_the_adaptation(encoder):
    dataset = Pictures(5)

    def fail(i):
        raise OSError(5, "Input/output error", f"{i}.jpg")

    dataset.load = fail
    with pytest.raises(OSError, match=r"Input/output error: '\d.jpg'"):
        fair.adapt(encoder, dataset, text_of(), n=4, k=2, epochs=1, batch_size=1)


def test_the_text_tower_is_shared_and_stays_as_it_was(encoder):
    encoder.encode_text(["a bird"])
    found = adapt(encoder, Pictures(2), text_of())
    assert found.encoder.visual is not encoder.visual
    assert found.encoder.model.transformer is encoder.model.transformer
    assert found.encoder.model.token_embedding.weight is encoder.model.token_embedding.weight
    assert found.encoder.model.text_projection is encoder.model.text_projection
    assert found.encoder._text is encoder._text
    assert torch.equal(found.encoder.encode_text(["a bird"]), encoder.encode_text(["a bird"]))
    mine = {id(w) for w in found.encoder.visual.parameters()}
    assert not mine & {id(w) for w in encoder.model.parameters()}


def test_a_frozen_teacher_labels_with_the_given_encoder(encoder):
    dataset, text = Pictures(5), text_of()
    options = dict(classifier="mean", epochs=2, learning_rate=0.3, k=2)
    found = adapt(encoder, dataset, text, shared=False, **options).history
    feature, token = naive_views(encoder, dataset, 1, 5)
    views = Views(feature[:, 0], feature[:, 1:], None, token[:, 0], token[:, 1:])
    psi = fair._alignment(views, text.mean(), 2, "cls")
    assert torch.allclose(found.weight[1], fair.pseudo_label_weights(psi), atol=1e-5)
    moved = adapt(encoder, dataset, text, **options).history
    assert not torch.allclose(moved.weight[1], found.weight[1], atol=1e-4)
    states, options = [], options | dict(classifier="anchors")  # Z* labels as it is adapted, whoever the teacher is
    found = adapt(encoder, dataset, text, shared=False, **options, on_epoch=states.append).history
    psi = fair.scores(views, states[0]["weight.anchors"], 2)
    assert torch.allclose(found.weight[1], fair.pseudo_label_weights(psi), atol=1e-5)


# oracles


@pytest.fixture(scope="module")
def problem(encoder):
    """Training and test pictures, a text side that is roughly right, and the accuracy of a supervised classifier."""
    train, test = Pictures(60, seed=1), Pictures(60, seed=2)
    x, y = encoder.encode_images(train.pixels), torch.eye(3)[train.truth]
    centre = torch.stack([x[train.truth == c].mean(0) for c in range(3)])
    text = text_of(near=6 * (centre - centre.mean(0)) / centre.std(0).norm() + x.mean(0))
    bias = torch.ones(60, 1)
    solution = torch.linalg.lstsq(torch.cat([x, bias], 1), y, driver="gelsd").solution
    guess = torch.cat([encoder.encode_images(test.pixels), bias], 1) @ solution
    ceiling = (guess.argmax(-1) == test.truth).float().mean().item()
    before = accuracy(fair.Adapted(encoder, normalize(text.mean(), dim=-1), None), test)
    return train, test, text, before, ceiling


ORACLE = dict(epochs=8, batch_size=12, learning_rate=2e-2, logit_scale=30.0)


def test_with_true_labels_adapt_approaches_the_supervised_ceiling(encoder, problem):
    train, test, text, before, ceiling = problem
    assert before < ceiling - 0.1
    found = adapt(encoder, train, text, **ORACLE, pseudo_label=lambda index: train.truth[index])
    assert torch.equal(found.history.pseudo_label, train.truth.expand(8, -1))
    assert accuracy(found, test) > ceiling - 0.05


def test_with_one_constant_class_adapt_does_not_help(encoder, problem):
    train, test, text, before, _ = problem
    found = adapt(encoder, train, text, **ORACLE, pseudo_label=lambda index: torch.zeros_like(index))
    assert accuracy(found, test) <= before


# what is degenerate, what is an error


@pytest.mark.parametrize(
    ("dataset", "classes"),
    [(Pictures(1), 3), (Pictures(5, classes=2), 2), (Pictures(5, classes=5, present=2), 5)],
    ids=["one image", "two classes", "classes that never appear"],
)
def test_degenerate_problems_have_a_result(encoder, dataset, classes):
    found = adapt(encoder, dataset, text_of(classes), epochs=2, batch_size=4, momentum=0.0)
    assert found.anchors.shape == (classes, DIM)
    assert found.anchors.isfinite().all()
    assert all(part.isfinite().all() for part in found.history)
    assert (found.history.fairness >= log(classes) - 1e-5).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(n=2, k=4), "k=4 .*N=2"),
        (dict(k=0), "k=0"),
        (dict(n=0, k=None), "N=0"),
        (dict(momentum=1.0), "momentum"),
        (dict(epochs=0), "epochs=0"),
        (dict(weak="middle"), "'crops', 'resized', not 'middle'"),
        (dict(tuning="all"), "tuning must be one of"),
        (dict(pseudo_label=lambda index: index + 3), "class 0..2"),
        (dict(rank=0), "rank=0"),
        (dict(state={}), "belongs to a run with other"),
        (dict(strong=lambda x: x), r"it must give uint8 \(3, 32, 32\)"),
        (dict(strong=lambda x: resize(x) / 255), r"strong gave torch.float32"),
    ],
)
def test_arguments_out_of_range_are_errors(encoder, options, message):
    with pytest.raises(ValueError, match=message):
        adapt(encoder, Pictures(2), text_of(), **options)


def test_problems_that_cannot_be_are_errors(encoder):
    with pytest.raises(ValueError, match="at least two"):
        adapt(encoder, Pictures(2, classes=1), text_of(1))
    with pytest.raises(ValueError, match="2 classes but striped has 3"):
        adapt(encoder, Pictures(2), text_of(2))
    with pytest.raises(ValueError, match="text has 8 dimensions but the encoder has 16"):
        adapt(encoder, Pictures(2), text_of(dim=8))
    with pytest.raises(ValueError, match="no images"):
        adapt(encoder, Pictures(0), text_of())
    with pytest.raises(FloatingPointError, match="epoch 1"):
        adapt(encoder, Pictures(2), text_of(), logit_scale=math.nan)


# tuning


def test_k_adaptation_trains_additions_and_nothing_else(encoder):
    dataset, text = Pictures(4), text_of()
    found = adapt(encoder, dataset, text, tuning="k-adaptation", rank=2, epochs=2)
    layer = found.encoder.visual.transformer.resblocks[1].attn
    addition = layer.parametrizations.in_proj_weight[0]
    delta = layer.in_proj_weight - encoder.visual.transformer.resblocks[1].attn.in_proj_weight
    naive = [
        sum(torch.kron(a, u @ v) for a, u, v in zip(addition.shared, addition.u[i], addition.v[i])) for i in (0, 1)
    ]
    assert naive[0].abs().max() > 0
    assert torch.allclose(delta, torch.cat([naive[0], torch.zeros(WIDTH, WIDTH), naive[1]]), atol=1e-6)
    frozen = dict(encoder.visual.named_parameters())
    for name, weight in found.encoder.visual.named_parameters():
        base = name.replace("parametrizations.in_proj_weight.original", "in_proj_weight")
        if base in frozen:
            assert torch.equal(weight, frozen[base]), name
        else:
            assert weight.requires_grad, name


def test_lora_trains_additions_and_nothing_else(encoder):
    pytest.importorskip("peft")
    found = adapt(encoder, Pictures(4), text_of(), tuning="lora", rank=2, epochs=2)
    frozen = dict(encoder.visual.named_parameters())
    names = set()
    for name, weight in found.encoder.visual.named_parameters():
        base = name.replace(".base_layer", "")
        if base in frozen:
            assert torch.equal(weight, frozen[base]), name
        else:
            names.add(name.split(".")[4])
            assert weight.requires_grad, name
            assert weight.abs().max() > 0, name
    assert names == {"c_fc", "c_proj"}


@pytest.mark.parametrize("tuning", ["lora", "k-adaptation"])
def test_before_training_a_tuned_tower_computes_the_same(encoder, tuning):
    if tuning == "lora":
        pytest.importorskip("peft")
    found = adapt(encoder, Pictures(2), text_of(), tuning=tuning, learning_rate=0.0)
    x = torch.randn(2, 3, SIDE, SIDE)
    assert torch.allclose(found.encoder.features(x), encoder.features(x), atol=1e-6)


def test_order_is_a_permutation_that_the_seed_decides(encoder):
    seen = []

    def label(index):
        seen.append(index)
        return torch.zeros_like(index)

    adapt(encoder, Pictures(7), text_of(), epochs=2, batch_size=3, pseudo_label=label)
    assert [len(index) for index in seen] == [3, 3, 1] * 2
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert np.array_equal(np.sort(first), np.arange(7))
    assert not torch.equal(first, second)


def test_crop_scale_and_seed_reach_the_weak_views(encoder):
    base = adapt(encoder, Pictures(4), text_of(), learning_rate=0.0).history.weight
    for change in (dict(crop_scale=(0.2, 0.3)), dict(seed=1)):
        other = adapt(encoder, Pictures(4), text_of(), learning_rate=0.0, **change).history.weight
        assert not torch.allclose(other, base, atol=1e-4)


def test_strong_views_are_drawn_from_seed_epoch_and_key(encoder):
    drawn = []

    def strong(picture):
        drawn.append(torch.randint(2**40, ()).item())
        return resize(picture)

    for seed in (0, 1):
        fair.adapt(encoder, Pictures(3), text_of(), strong=strong, n=2, k=1, epochs=2, seed=seed)
    assert len(set(drawn)) == 2 * 2 * 3


@pytest.mark.parametrize(
    "change",
    [
        dict(learning_rate=2e-2),
        dict(weight_decay=0.5),
        dict(momentum=0.5),
        dict(logit_scale=7.0),
        dict(seed=1),
        dict(gamma="batch"),
        dict(crop_scale=(0.2, 0.3)),
    ],
)
def test_a_state_belongs_to_one_set_of_arguments(encoder, change):
    states = []
    adapt(encoder, Pictures(4), text_of(), epochs=1, on_epoch=states.append)
    with pytest.raises(ValueError, match="belongs to a run with other"):
        adapt(encoder, Pictures(4), text_of(), **{"epochs": 1, "state": states[0], **change})
