import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from upclose.methods import ensemble, lare, probe
from upclose.seeds import generator

SEEDS = (3, 1, 7)


def world(n=120, d=16, classes=5, dtype=torch.float64, spread=0.7, seed=0):
    """Unit embeddings around their class's label embedding."""
    label = F.normalize(torch.randn(classes, d, generator=generator(0, "label"), dtype=dtype), dim=1)
    y = torch.arange(n) % classes
    noise = torch.randn(n, d, generator=generator(seed, "noise"), dtype=dtype) / math.sqrt(d)
    return F.normalize(label[y] + spread * noise, dim=1), y, label


def random_boxes(*shape, dtype=torch.float64):
    minus, plus = torch.randn(2, *shape, generator=generator(0, "boxes"), dtype=dtype)
    return lare.Boxes(F.normalize(minus, dim=-1), F.normalize(plus, dim=-1))


def cosine(boxes):
    return (boxes.minus * boxes.plus).sum(-1)


def naive_losses(boxes, label, y, scale):
    """Equations 3-6, one image and one class at a time."""
    volume = minus = plus = centre = 0.0
    for s in range(len(y)):
        for i in range(y.shape[1]):
            low, high = boxes.minus[s, i], boxes.plus[s, i]
            volume += torch.dot(low, high).item()
            entropies = []
            for point in (low, high, (low + high) / 2):
                exponent = [math.exp(scale * torch.dot(point, text).item()) for text in label]
                entropies.append(-math.log(exponent[y[s, i]] / sum(exponent)))
            minus, plus, centre = minus + entropies[0], plus + entropies[1], centre + entropies[2]
    return volume, minus, plus, centre


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_losses_equal_naive_loops(scale):
    _, _, label = world()
    boxes, y = random_boxes(2, 6, 16), torch.randint(5, (2, 6), generator=generator(2))
    volume, minus, plus, centre = naive_losses(boxes, label, y, scale)
    ours = lare.losses(boxes, label, y, logit_scale=scale)
    for value, wanted in zip(ours, (volume, minus, plus, centre)):
        assert value.item() == pytest.approx(wanted, rel=1e-10)
    wanted = (1 - 0.3) * volume + 0.3 * (minus + plus + centre) / 3
    assert lare.objective(ours, 0.3).item() == pytest.approx(wanted, rel=1e-10)


def test_losses_depend_on_the_corners_directions_only():
    _, _, label = world()
    boxes, y = random_boxes(2, 6, 16), torch.randint(5, (2, 6), generator=generator(2))
    longer = lare.Boxes(3 * boxes.minus, 0.2 * boxes.plus)
    torch.testing.assert_close(lare.losses(longer, label, y), lare.losses(boxes, label, y))


def test_gradients_of_the_losses():
    _, _, label = world()
    label, y = label.double(), torch.randint(5, (2, 3), generator=generator(2))
    corners = [(2 * part).requires_grad_() for part in random_boxes(2, 3, label.shape[1])]
    assert torch.autograd.gradcheck(
        lambda *corners: tuple(lare.losses(lare.Boxes(*corners), label, y, logit_scale=5.0)), corners
    )


def plain_network(x, y, label, alpha, seed, epochs, batch_size, learning_rate, weight_decay):
    """One seed: two layers, normalised corners, the equations."""
    d = x.shape[1]
    start = ensemble.network([seed], d, 2 * d, None, "lare", like=x)
    layers = torch.nn.Sequential(torch.nn.Linear(d, d // 2), torch.nn.ReLU(), torch.nn.Linear(d // 2, 2 * d)).to(x)
    with torch.no_grad():
        for parameter, value in zip(layers.parameters(), start):
            parameter.copy_(value[0].T if parameter.ndim == 2 else value[0, 0])
    optimizer = torch.optim.AdamW(layers.parameters(), lr=learning_rate, weight_decay=weight_decay)
    order = generator(seed, "order")
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=order).split(batch_size):
            low, high = (F.normalize(part, dim=1) for part in layers(x[rows]).split(d, 1))
            terms = [F.cross_entropy(p @ label.T, y[rows], reduction="sum") for p in (low, high, (low + high) / 2)]
            loss = (1 - alpha) * (low * high).sum() + alpha * sum(terms) / 3
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [F.normalize(part, dim=1).detach() for part in layers(x).split(d, 1)]


def test_fit_equals_a_plain_loop_over_seeds():
    x, y, label = world()
    options = dict(epochs=4, batch_size=50, learning_rate=0.01, weight_decay=0.1)
    boxes = lare.fit_boxes(x, y, label, 0.6, SEEDS, **options)
    for s, seed in enumerate(SEEDS):
        minus, plus = plain_network(x, y, label, 0.6, seed, **options)
        torch.testing.assert_close(boxes.minus[s], minus, rtol=0, atol=1e-8)
        torch.testing.assert_close(boxes.plus[s], plus, rtol=0, atol=1e-8)


def test_seeds_together_equal_seeds_alone_after_ten_steps():
    x, y, label = world(100)
    together = lare.fit_network(x, y, label, 0.7, SEEDS, epochs=5, batch_size=50)
    for s, seed in enumerate(SEEDS):
        alone = lare.fit_network(x, y, label, 0.7, [seed], epochs=5, batch_size=50)
        for a, b in zip(together, alone):
            torch.testing.assert_close(a[s], b[0], rtol=0, atol=1e-8)
    assert not torch.allclose(together.weight_in[0], together.weight_in[1])


def test_final_accuracies_together_and_alone():
    x, y, label = world(300, dtype=torch.float32, spread=2.0)
    x_test, y_test, _ = world(2000, dtype=torch.float32, spread=2.0, seed=1)

    def accuracy(seeds):
        boxes = lare.fit_boxes(x, y, label, 0.9, seeds, epochs=10)
        points = lare.sample(boxes, 3, [generator(seed, "sample") for seed in seeds])
        fitted = probe.fit(x, y, x_test[:500], y_test[:500], seeds, sample=points, epochs=10)
        return (probe.predict(fitted, x_test) == y_test).float().mean(1)

    together = accuracy(SEEDS)
    alone = torch.cat([accuracy([seed]) for seed in SEEDS])
    assert (together - alone).abs().max() <= 0.001 + 1e-6


def test_alpha_trades_volume_for_class():
    x, y, label = world(dtype=torch.float32)
    fits = {a: lare.fit_boxes(x, y, label, a, SEEDS, epochs=150, learning_rate=3e-3) for a in (0.0, 0.9, 1.0)}
    mean = {a: cosine(boxes).mean().item() for a, boxes in fits.items()}
    assert mean[0.0] < -0.99
    assert mean[0.0] < mean[0.9] < mean[1.0]
    right = ((fits[1.0].minus @ label.T).argmax(2) == y).float().mean()
    assert right > 0.95
    assert lare.log_volume(fits[0.0]).mean() > lare.log_volume(fits[1.0]).mean()


def test_corners_are_normalised_and_their_order_is_free():
    x, y, label = world()
    boxes = lare.fit_boxes(x, y, label, 0.5, SEEDS, epochs=2)
    for corner in boxes:
        assert corner.shape == (3, 120, 16)
        torch.testing.assert_close(corner.norm(dim=2), torch.ones(3, 120, dtype=x.dtype))
    assert (boxes.minus > boxes.plus).any()
    assert (boxes.minus < boxes.plus).any()


def test_a_centre_of_norm_zero_is_an_ordinary_value():
    _, _, label = world()
    minus = random_boxes(1, 4, 16).minus.requires_grad_()
    plus = (-minus.detach()).requires_grad_()
    losses = lare.losses(lare.Boxes(minus, plus), label, torch.zeros(1, 4, dtype=torch.int64))
    assert losses.centre.item() == pytest.approx(4 * math.log(5))
    assert losses.volume.item() == pytest.approx(-4)
    lare.objective(losses, 0.5).backward()
    assert minus.grad.isfinite().all()
    assert plus.grad.isfinite().all()


def test_a_corner_of_norm_zero_has_finite_losses_and_gradients():
    _, _, label = world()
    minus = torch.zeros(1, 2, 16, dtype=torch.float64, requires_grad=True)
    losses = lare.losses(lare.Boxes(minus, random_boxes(1, 2, 16).plus), label, torch.zeros(1, 2, dtype=torch.int64))
    lare.objective(losses, 0.5).backward()
    assert losses.volume.item() == 0
    assert minus.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_lie_in_the_box_and_fill_it(dtype):
    boxes = random_boxes(2, 5, 16, dtype=dtype)
    points = lare.sample(boxes, 500, generator(0))
    assert points.shape == (2, 5, 500, 16)
    low, high = torch.minimum(*boxes)[:, :, None], torch.maximum(*boxes)[:, :, None]
    assert (points >= low).all()
    assert (points <= high).all()
    share = ((points - low) / (high - low)).flatten()
    assert share.mean().item() == pytest.approx(1 / 2, abs=0.01)
    assert share.var().item() == pytest.approx(1 / 12, abs=0.005)
    one = points[0, 0].T.corrcoef() - torch.eye(16, dtype=dtype)
    assert one.abs().max() < 0.25  # dimensions are drawn each by itself: no diagonal of the box


def test_a_seeds_samples_do_not_depend_on_the_others():
    boxes = random_boxes(2, 5, 16)
    both = lare.sample(boxes, 3, [generator(4), generator(9)])
    alone = lare.sample(lare.Boxes(boxes.minus[1:], boxes.plus[1:]), 3, [generator(9)])
    assert torch.equal(both[1:], alone)
    with pytest.raises(ValueError, match="1 generators for 2 seeds"):
        lare.sample(boxes, 3, [generator(4)])


def test_a_box_without_sides_gives_its_corner():
    corner = random_boxes(1, 4, 16).minus
    assert torch.equal(lare.sample(lare.Boxes(corner, corner), 2, generator(0)), corner[:, :, None].expand(1, 4, 2, 16))


def test_log_volume():
    small = random_boxes(2, 3, 4)
    product = (small.plus - small.minus).abs().prod(2)
    torch.testing.assert_close(lare.log_volume(small).exp(), product)
    torch.testing.assert_close(lare.log_volume(lare.Boxes(small.plus, small.minus)), lare.log_volume(small))
    for side in (1e-6, 1e30):  # side^1024 is no float
        wide = lare.Boxes(torch.zeros(1, 1, 1024), torch.full((1, 1, 1024), side))
        assert lare.log_volume(wide).item() == pytest.approx(1024 * math.log(side), rel=1e-5)
    real = random_boxes(2, 3, 1024, dtype=torch.float32)
    assert (real.plus - real.minus).abs().prod(2).eq(0).all()
    assert lare.log_volume(real).isfinite().all()


@pytest.mark.parametrize(("dtype", "resolution"), [(torch.float32, 2**-23), (torch.float64, 2**-52)])
def test_a_dimension_in_which_the_corners_agree_has_the_side_of_the_floats_resolution(dtype, resolution):
    boxes = random_boxes(2, 3, 1024, dtype=dtype)
    plus = boxes.plus.clone()
    plus[..., 7] = boxes.minus[..., 7]
    volume = lare.log_volume(lare.Boxes(boxes.minus, plus))
    assert volume.isfinite().all()
    others = torch.arange(1024) != 7
    rest = lare.log_volume(lare.Boxes(boxes.minus[..., others], plus[..., others]))
    torch.testing.assert_close(volume - rest, torch.full_like(rest, math.log(resolution)), rtol=1e-4, atol=0)
    point = lare.log_volume(lare.Boxes(boxes.minus, boxes.minus))
    torch.testing.assert_close(point, torch.full_like(point, 1024 * math.log(resolution)))


def test_noise_is_as_far_from_the_image_as_points_of_the_box():
    x, _, _ = world(4, d=64)
    boxes = random_boxes(2, 4, 64)
    generators = [generator(0), generator(1)]
    box = (lare.sample(boxes, 4000, generators) - x[:, None]).square().sum(3).mean(2)
    noise = lare.noise(x, boxes, 4000, generators)
    torch.testing.assert_close((noise - x[:, None]).square().sum(3).mean(2), box, rtol=0.02, atol=0)
    torch.testing.assert_close(noise.mean(2), x.expand(2, -1, -1), rtol=0, atol=0.02)


def test_mixup_mixes_embeddings_and_classes_alike():
    x, y, _ = world(40)
    mixed = lare.mixup(x, y, 200, 5, [generator(0), generator(1)])
    assert mixed.sample.shape == (2, 40, 200, 16)
    assert mixed.target.shape == (2, 40, 200, 5)
    torch.testing.assert_close(mixed.target.sum(3), torch.ones(2, 40, 200, dtype=x.dtype))
    corners = torch.eye(5, dtype=x.dtype)
    simplex = lare.mixup(corners, torch.arange(5), 50, 5, [generator(0)])
    torch.testing.assert_close(simplex.sample, simplex.target)
    own = F.one_hot(y, 5).to(x)[:, None]
    assert (mixed.target * own).sum(3).mean().item() == pytest.approx(0.5 + 0.5 / 5, abs=0.01)


@pytest.mark.parametrize("images", [0, 1])
def test_a_class_with_no_or_one_image(images):
    x, y, label = world(50)
    keep = (y != 4) | (torch.arange(50) == 4) if images else y != 4
    boxes = lare.fit_boxes(x[keep], y[keep], label, 0.5, [0], epochs=3)
    assert boxes.minus.shape == (1, 40 + images, 16)
    assert boxes.minus.isfinite().all()
    one = lare.fit_boxes(x[:1], y[:1], label, 0.5, [0], epochs=3)
    assert one.plus.isfinite().all()


def spoil(x, index, value):
    x = x.clone()
    x[index] = value
    return x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y, label: dict(y=spoil(y, 7, -1)), r"y\[7\] is -1"),
        (lambda x, y, label: dict(y=spoil(y, 9, 5)), r"y\[9\] is 5: .* to 4"),
        (lambda x, y, label: dict(x=spoil(x, (4, 2), torch.nan)), r"x\[4\] has norm nan"),
        (lambda x, y, label: dict(x=spoil(x, 6, 2 * x[6])), r"x\[6\] has norm 2, not 1"),
        (lambda x, y, label: dict(x=spoil(x, 6, 0 * x[6])), r"x\[6\] has norm 0, not 1"),
        (lambda x, y, label: dict(label=spoil(label, 3, 2 * label[3])), r"label\[3\] has norm 2, not 1"),
        (lambda x, y, label: dict(y=y.int()), r"y is torch.int32 .* int64"),
        (lambda x, y, label: dict(y=y > 2), r"y is torch.bool .* int64"),
        (lambda x, y, label: dict(x=x[0]), r"x is \(16,\): give \(N, D\)"),
        (lambda x, y, label: dict(label=label[:, :8]), r"label is \(5, 8\): give \(C, D\) with D = 16"),
        (lambda x, y, label: dict(epochs=0), "epochs is 0"),
        (lambda x, y, label: dict(batch_size=0), "batch_size is 0"),
        (lambda x, y, label: dict(alpha=1.5), "alpha is 1.5"),
        (lambda x, y, label: dict(alpha=math.nan), "alpha is nan"),
        (lambda x, y, label: dict(seeds=[2, 2]), r"seeds are \[2, 2\]"),
    ],
)
def test_errors_name_the_index(change, message):
    x, y, label = world(50)
    with pytest.raises(ValueError, match=message):
        lare.fit_boxes(**{"x": x, "y": y, "label": label, "alpha": 0.5, "seeds": [0], **change(x, y, label)})


def test_mixup_refuses_a_class_out_of_range():
    x, y, _ = world(50)
    with pytest.raises(ValueError, match=r"y\[4\] is 4: .* to 3"):
        lare.mixup(x, y, 2, 4, [generator(0)])


def test_tensors_stay_on_their_device():
    with FakeTensorMode():
        x, label = torch.empty(6, 16, device="cuda"), torch.empty(5, 16, device="cuda")
        shapes = ((3, 16, 8), (3, 1, 8), (3, 8, 32), (3, 1, 32))
        network = ensemble.Network(*(torch.empty(shape, device="cuda") for shape in shapes))
        boxes = lare.f_box(network, x)
        y = torch.empty(3, 6, dtype=torch.int64, device="cuda")
        generators = [torch.Generator() for _ in range(3)]  # of the CPU: the same points on every device
        results = [
            *boxes,
            lare.objective(lare.losses(boxes, label, y), 0.5),
            lare.log_volume(boxes),
            lare.sample(boxes, 4, generators),
            lare.noise(x, boxes, 4, generators),
        ]
        assert all(result.device.type == "cuda" for result in results)


def test_noise_is_isotropic():
    minus = torch.zeros(1, 1, 4, dtype=torch.float64)
    plus = minus.clone()
    plus[..., 0] = 2
    points = lare.noise(minus[0], lare.Boxes(minus, plus), 20_000, generator(0))
    variance = points[0, 0].var(0)
    torch.testing.assert_close(variance, torch.full_like(variance, (1 + 4 / 12) / 4), rtol=0.05, atol=0)


def test_mixup_takes_partners_and_weights_uniformly():
    mixed = lare.mixup(torch.eye(8, dtype=torch.float64), torch.arange(8), 5000, 8, [generator(0)]).target[0]
    others = ~torch.eye(8, dtype=torch.bool)
    partner = (mixed * others[:, None]).sum(-1)
    weight = partner[partner > 0]
    assert abs(weight.mean() - 1 / 2) < 0.01
    assert abs(weight.var() - 1 / 12) < 0.003
    share = ((mixed > 0) & others[:, None]).double().mean(1)[others]
    assert (share - 1 / 8).abs().max() < 0.02


def test_samples_of_two_images_are_drawn_apart():
    boxes = lare.Boxes(-torch.ones(2, 3, 5), torch.ones(2, 3, 5))
    assert len(lare.sample(boxes, 4, generator(0)).flatten(0, 2).unique(dim=0)) == 24


def test_boxes_are_fitted_with_every_option():
    x, y, label = world(12, classes=3)
    options = dict(
        alpha=0.3, seeds=[4], epochs=2, batch_size=5, learning_rate=0.02, weight_decay=0.3, hidden=7, logit_scale=30.0
    )
    network = lare.fit_network(x, y, label, **options)
    assert network.weight_in.shape == (1, 16, 7)
    for found, expected in zip(lare.fit_boxes(x, y, label, **options), lare.f_box(network, x)):
        assert torch.equal(found, expected)
    for other in (dict(alpha=0.9), dict(logit_scale=1.0)):
        assert not torch.allclose(lare.fit_network(x, y, label, **options | other).weight_in, network.weight_in)
