import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from upclose.methods import ensemble, lads, probe
from upclose.seeds import generator

SEEDS = (3, 1, 7)


def world(n=120, d=16, classes=5, dtype=torch.float64):
    """Unit embeddings around their class's label embedding, and the same classes' texts in another domain."""
    g = generator(0, "world")
    label = F.normalize(torch.randn(classes, d, generator=g, dtype=dtype), dim=1)
    y = torch.arange(n) % classes
    x = F.normalize(label[y] + 0.7 * torch.randn(n, d, generator=g, dtype=dtype) / math.sqrt(d), dim=1)
    unseen = F.normalize(label + torch.randn(d, generator=g, dtype=dtype) / math.sqrt(d), dim=1)
    return x, y, label, unseen


def alignment(x, moved, direction):
    return F.cosine_similarity(moved - x, direction, dim=-1)


def test_fit_equals_a_plain_loop_over_seeds_and_images():
    x, y, label, unseen = world()
    d, options = 16, dict(epochs=3, batch_size=50, learning_rate=0.01, weight_decay=0.1)
    fitted = lads.augment(lads.fit(x, y, label, label, unseen, SEEDS, alpha=0.3, logit_scale=7.0, **options), x)
    for s, seed in enumerate(SEEDS):
        start = ensemble.network([seed], d, d, None, "lads", like=x)
        layers = torch.nn.Sequential(torch.nn.Linear(d, d // 2), torch.nn.ReLU(), torch.nn.Linear(d // 2, d)).to(x)
        with torch.no_grad():
            for parameter, value in zip(layers.parameters(), start):
                parameter.copy_(value[0].T if parameter.ndim == 2 else value[0, 0])
        optimizer = torch.optim.AdamW(layers.parameters(), lr=0.01, weight_decay=0.1)
        order = generator(seed, "order")
        for _ in range(options["epochs"]):
            for rows in torch.randperm(len(x), generator=order).split(options["batch_size"]):
                loss = 0
                for i in rows.tolist():
                    moved = layers(x[i])
                    step, wanted = moved - x[i], unseen[y[i]] - label[y[i]]
                    logits = 7.0 * label @ (moved / moved.norm())
                    loss = loss + 0.3 * (1 - step @ wanted / (step.norm() * wanted.norm()))
                    loss = loss + 0.7 * (logits.exp().sum().log() - logits[y[i]])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        torch.testing.assert_close(fitted[s], F.normalize(layers(x), dim=1).detach(), rtol=0, atol=1e-8)


def test_alpha_trades_domain_for_class():
    x, y, label, unseen = world(dtype=torch.float32)
    direction = (unseen - label)[y]
    options = dict(epochs=200, learning_rate=3e-3)
    networks = {a: lads.fit(x, y, label, label, unseen, SEEDS, alpha=a, **options) for a in (0.0, 1.0)}
    assert alignment(x, networks[1.0](x), direction).mean() > 0.9
    assert alignment(x, networks[0.0](x), direction).mean() < 0.5
    moved = {a: lads.augment(network, x) for a, network in networks.items()}
    assert ((moved[0.0] @ label.T).argmax(2) == y).float().mean() > 0.99
    assert moved[0.0].shape == (3, 120, 16)
    torch.testing.assert_close(moved[1.0].norm(dim=2), torch.ones(3, 120))


def test_seeds_together_equal_seeds_alone_after_ten_steps():
    x, y, label, unseen = world(100)
    together = lads.fit(x, y, label, label, unseen, SEEDS, epochs=5, batch_size=50)
    for s, seed in enumerate(SEEDS):
        alone = lads.fit(x, y, label, label, unseen, [seed], epochs=5, batch_size=50)
        for a, b in zip(together, alone):
            torch.testing.assert_close(a[s], b[0], rtol=0, atol=1e-8)


def test_one_text_for_all_classes_is_that_text_for_each():
    x, y, label, unseen = world()
    one = lads.fit(x, y, label, label[0], unseen[0], [0], epochs=2)
    each = lads.fit(x, y, label, label[0].expand(5, -1), unseen[0].expand(5, -1), [0], epochs=2)
    for a, b in zip(one, each):
        assert torch.equal(a, b)


def test_the_moved_embeddings_are_samples_of_the_probe():
    x, y, label, unseen = world()
    moved = lads.augment(lads.fit(x, y, label, label, unseen, SEEDS, epochs=1), x)
    assert probe.fit(x, y, x, y, SEEDS, sample=moved[:, :, None], epochs=1).weight.shape == (3, 16, 5)


def spoil(x, index, value):
    x = x.clone()
    x[index] = value
    return x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y, label, unseen: dict(y=spoil(y, 9, 5)), r"y\[9\] is 5: .* to 4"),
        (lambda x, y, label, unseen: dict(x=spoil(x, (4, 2), torch.nan)), r"x\[4\] has norm nan"),
        (lambda x, y, label, unseen: dict(y=y.int()), r"y is torch.int32 .* int64"),
        (lambda x, y, label, unseen: dict(label=label[:, :8]), r"label is \(5, 8\): give \(C, D\) with D = 16"),
        (lambda x, y, label, unseen: dict(text_unseen=2 * unseen), r"text_unseen\[0\] has norm 2"),
        (lambda x, y, label, unseen: dict(text_train=2 * label[0]), r"text_train\[0\] has norm 2"),
        (lambda x, y, label, unseen: dict(text_train=label[:4]), r"text_train is \(4, 16\): .* C = 5, D = 16"),
        (lambda x, y, label, unseen: dict(text_unseen=unseen[0, :8]), r"text_unseen is \(5, 8\): .* D = 16"),
        (lambda x, y, label, unseen: dict(text_train=label[0], text_unseen=label[0]), r"text_train\[0\] equals"),
        (lambda x, y, label, unseen: dict(epochs=0), "epochs is 0"),
        (lambda x, y, label, unseen: dict(batch_size=0), "batch_size is 0"),
        (lambda x, y, label, unseen: dict(text_unseen=spoil(unseen, 2, label[2])), r"text_train\[2\] equals"),
        (lambda x, y, label, unseen: dict(alpha=-0.1), "alpha is -0.1"),
    ],
)
def test_errors_name_the_index(change, message):
    x, y, label, unseen = world(50)
    given = {"x": x, "y": y, "label": label, "text_train": label, "text_unseen": unseen}
    with pytest.raises(ValueError, match=message):
        lads.fit(**{**given, **change(x, y, label, unseen)})


def test_tensors_stay_on_their_device():
    with FakeTensorMode():
        x = torch.empty(6, 16, device="cuda")
        shapes = ((3, 16, 8), (3, 1, 8), (3, 8, 16), (3, 1, 16))
        network = ensemble.Network(*(torch.empty(shape, device="cuda") for shape in shapes))
        moved = lads.augment(network, x)
        results = [moved, lads.domain_alignment_loss(x, network(x), torch.empty(6, 16, device="cuda"))]
        assert all(result.device.type == "cuda" for result in results)


def unit(*shape, key):
    return F.normalize(torch.randn(*shape, generator=generator(0, key), dtype=torch.float64), dim=-1)


def test_the_direction_is_from_the_training_domain():
    x, y = unit(6, 16, key="x"), torch.arange(6) % 3
    label, train, unseen = (unit(3, 16, key=key) for key in ("label", "train", "unseen"))
    moved = lads.fit(x, y, label, train, unseen, [0], alpha=1.0, epochs=300, learning_rate=3e-3)(x)[0] - x
    assert F.cosine_similarity(moved, (unseen - train)[y], dim=-1).mean() > 0.9
    assert F.cosine_similarity(moved, (unseen - label)[y], dim=-1).mean() < 0.8
