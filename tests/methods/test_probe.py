import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from upclose.methods import ensemble, probe
from upclose.seeds import generator

SEEDS = (3, 1, 7)


def world(n=120, d=16, classes=5, dtype=torch.float64, seed=0):
    """Unit embeddings around one centre a class; another seed has other images of the same classes."""
    centre = torch.randn(classes, d, generator=generator(0, "centre"), dtype=dtype)
    y = torch.arange(n) % classes
    return F.normalize(centre[y] + 1.5 * torch.randn(n, d, generator=generator(seed, "world"), dtype=dtype), dim=1), y


def plain_fit(x, y, x_val, y_val, seed, epochs, batch_size, learning_rate, weight_decay):
    """One seed, one layer, one minibatch at a time."""
    classes = int(max(y.max(), y_val.max())) + 1
    weight, bias = ensemble.linear([seed], x.shape[1], classes, "probe", like=x)
    layer = torch.nn.Linear(x.shape[1], classes, dtype=x.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight[0].T)
        layer.bias.copy_(bias[0, 0])
    optimizer = torch.optim.AdamW(layer.parameters(), lr=learning_rate, weight_decay=weight_decay)
    order, best = generator(seed, "order"), (-1.0,)
    for epoch in range(epochs):
        for rows in torch.randperm(len(x), generator=order).split(batch_size):
            loss = 0
            for i in rows.tolist():
                score = layer(x[i])
                loss = loss - (score[y[i]] - score.exp().sum().log()) / len(rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        right = (layer(x_val).argmax(1) == y_val).double().mean().item()
        if right > best[0]:
            best = right, epoch, layer.weight.detach().T.clone(), layer.bias.detach().clone()
    return best


def test_equals_a_plain_loop_over_seeds_and_images():
    x, y = world()
    x_val, y_val = world(60, seed=1)
    options = dict(epochs=4, batch_size=50, learning_rate=0.05, weight_decay=0.1)
    fitted = probe.fit(x, y, x_val, y_val, SEEDS, **options)
    for s, seed in enumerate(SEEDS):
        right, epoch, weight, bias = plain_fit(x, y, x_val, y_val, seed, **options)
        assert fitted.epoch[s] == epoch
        assert fitted.accuracy[s].item() == pytest.approx(right, abs=1e-6)
        torch.testing.assert_close(fitted.weight[s], weight, rtol=0, atol=1e-8)
        torch.testing.assert_close(fitted.bias[s, 0], bias, rtol=0, atol=1e-8)


def test_seeds_together_equal_seeds_alone_with_samples_of_their_own():
    x, y = world(100)
    sample = 0.5 * torch.randn(len(SEEDS), 100, 3, 16, generator=generator(0), dtype=x.dtype)
    options = dict(epochs=5, batch_size=200)  # 10 steps over 400 rows
    together = probe.fit(x, y, x, y, SEEDS, sample=sample, **options)
    for s, seed in enumerate(SEEDS):
        alone = probe.fit(x, y, x, y, [seed], sample=sample[s], **options)
        torch.testing.assert_close(together.weight[s], alone.weight[0], rtol=0, atol=1e-8)
    assert not torch.allclose(together.weight[0], together.weight[1])


def test_final_accuracies_together_and_alone_in_float32():
    x, y = world(600, dtype=torch.float32)
    x_test, y_test = world(1000, seed=1, dtype=torch.float32)
    together = probe.predict(probe.fit(x, y, x[:200], y[:200], SEEDS, epochs=20), x_test)
    for s, seed in enumerate(SEEDS):
        alone = probe.predict(probe.fit(x, y, x[:200], y[:200], [seed], epochs=20), x_test)[0]
        gap = (together[s] == y_test).float().mean() - (alone == y_test).float().mean()
        assert abs(gap.item()) <= 0.001 + 1e-6


def test_the_best_epoch_is_the_one_that_is_returned():
    x, y = world(60)
    x_val, y_val = world(40, seed=2)
    fitted = probe.fit(x, y, x_val, y_val, SEEDS, epochs=15, learning_rate=0.3)
    right = (probe.predict(fitted, x_val) == y_val).float().mean(1)
    torch.testing.assert_close(fitted.accuracy, right)
    assert right.min() > 0.5
    for s, seed in enumerate(SEEDS):
        stopped = probe.fit(x, y, x_val, y_val, [seed], epochs=int(fitted.epoch[s]) + 1, learning_rate=0.3)
        assert stopped.epoch[0] == fitted.epoch[s]
        torch.testing.assert_close(stopped.weight[0], fitted.weight[s])


def test_hard_targets_are_one_hot_targets():
    x, y = world(50)
    sample = world(100, seed=3)[0].view(50, 2, 16)
    hard = F.one_hot(y, 5).double()[:, None].expand(50, 2, 5)
    a = probe.fit(x, y, x, y, SEEDS, sample=sample, epochs=3)
    b = probe.fit(x, y, x, y, SEEDS, sample=sample, target=hard, epochs=3)
    torch.testing.assert_close(a.weight, b.weight)


def test_samples_outweigh_the_originals():
    x, y = world(50)
    moved = (y + 1) % 5
    target = F.one_hot(moved, 5).double()[:, None].expand(50, 20, 5)
    fitted = probe.fit(x, y, x, moved, [0], sample=x[:, None].expand(50, 20, 16), target=target, epochs=30)
    assert (probe.predict(fitted, x)[0] == moved).float().mean() > 0.8


@pytest.mark.parametrize("images", [0, 1])
def test_a_class_with_no_or_one_image(images):
    x, y = world(50)
    keep = (y != 4) | (torch.arange(50) == 4) if images else y != 4
    fitted = probe.fit(x[keep], y[keep], x, y, SEEDS, classes=5, epochs=5)
    assert fitted.weight.shape == (3, 16, 5)
    assert fitted.weight.isfinite().all()


def test_predict_is_the_argmax_of_scores_and_chunks_do_not_matter(monkeypatch):
    x, y = world(50)
    fitted = probe.fit(x, y, x, y, SEEDS, epochs=2)
    whole = torch.stack([(x @ w + b).argmax(1) for w, b in zip(fitted.weight, fitted.bias)])
    monkeypatch.setattr(probe, "CHUNK", 7)
    assert torch.equal(probe.predict(fitted, x), whole)


def spoil(x, index, value):
    x = x.clone()
    x[index] = value
    return x


def uniform(n, classes):
    """Targets (50, n, C)."""
    return torch.full((50, n, classes), 1 / classes, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: dict(y=spoil(y, 7, -1)), r"y\[7\] is -1"),
        (lambda x, y: dict(y=spoil(y, 9, 5), classes=5), r"y\[9\] is 5: .* to 4"),
        (lambda x, y: dict(y_val=spoil(y, 2, 6), classes=5), r"y_val\[2\] is 6"),
        (lambda x, y: dict(x=spoil(x, (4, 2), torch.nan)), r"x\[4\] has norm nan"),
        (lambda x, y: dict(x_val=spoil(x, (5, 0), torch.inf)), r"x_val\[5\] has norm inf"),
        (lambda x, y: dict(x=spoil(x, 6, 2 * x[6])), r"x\[6\] has norm 2, not 1"),
        (lambda x, y: dict(sample=spoil(x[:, None], (8, 0, 1), torch.nan)), r"sample\[8, 0\] is not finite"),
        (lambda x, y: dict(x=x[0]), r"x is \(16,\): give \(N, D\)"),
        (lambda x, y: dict(x_val=x[:, :8]), r"x_val is \(50, 8\): give \(V, D\) with D = 16"),
        (lambda x, y: dict(sample=x), r"sample is \(50, 16\): give \(N, n, D\)"),
        (lambda x, y: dict(sample=x[None, :, None].expand(3, -1, 2, -1)), r"sample is \(3, .* S = 1, N = 50, D = 16"),
        (lambda x, y: dict(sample=x[:, None], target=y), r"target is \(50,\)"),
        (lambda x, y: dict(sample=x[:, None], target=uniform(2, 5)), r"target is \(50, 2, 5\): .* n = 1, C = 5"),
        (lambda x, y: dict(sample=x[:, None], target=spoil(uniform(1, 5), (8, 0, 1), torch.nan)), r"target\[8, 0\]"),
        (lambda x, y: dict(sample=x[:, None], target=2 * uniform(1, 5)), r"target\[0, 0\] is no distribution"),
        (lambda x, y: dict(sample=x[:, None], target=spoil(uniform(1, 5), (3, 0, 1), -0.2)), r"target\[3, 0\]"),
        (lambda x, y: dict(y=y.int()), r"y is torch.int32 .* int64"),
        (lambda x, y: dict(y_val=y > 2), r"y_val is torch.bool .* int64"),
        (lambda x, y: dict(epochs=0), "epochs is 0"),
        (lambda x, y: dict(batch_size=0), "batch_size is 0"),
        (lambda x, y: dict(y=y[:3]), r"y is .* for 50 embeddings"),
        (lambda x, y: dict(y=y.double()), r"y is torch.float64"),
        (lambda x, y: dict(x=x[:0], y=y[:0]), "for 0 embeddings"),
        (lambda x, y: dict(seeds=[1, 1]), r"seeds are \[1, 1\]"),
        (lambda x, y: dict(seeds=[]), "one or more"),
    ],
)
def test_errors_name_the_index(change, message):
    x, y = world(50)
    with pytest.raises(ValueError, match=message):
        probe.fit(**{"x": x, "y": y, "x_val": x, "y_val": y, "seeds": [0], **change(x, y)})


def test_norms_of_half_precision_storage_pass():
    x, y = world(50, dtype=torch.float32)
    assert probe.fit(x.half(), y, x.half(), y, [0], epochs=1).weight.dtype == torch.float32


def test_tensors_stay_on_their_device():
    with FakeTensorMode():
        x, y = torch.empty(3, 6, 16, device="cuda"), torch.empty(3, 6, dtype=torch.int64, device="cuda")
        weight, bias = torch.empty(3, 16, 5, device="cuda"), torch.empty(3, 1, 5, device="cuda")
        fitted = probe.Probe(weight, bias, y[:, 0], y[:, 0])
        rows = ensemble.take(x, y)
        results = [
            rows,
            ensemble.take(x[0], y),
            probe.predict(fitted, x[0]),
            ensemble.cross_entropy(probe.scores(fitted, rows), y),
            *ensemble.linear([0, 1, 2], 16, 5, "probe", like=x),
        ]
        assert all(result.device.type == "cuda" for result in results)


def unit(*shape, key):
    return F.normalize(torch.randn(*shape, generator=generator(0, key), dtype=torch.float64), dim=-1)


def test_samples_stand_after_their_original():
    x, y, sample = unit(4, 5, key="x"), torch.tensor([2, 0, 1, 2]), unit(2, 4, 3, 5, key="sample")
    target = torch.full((2, 4, 3, 3), 1 / 3, dtype=torch.float64)
    rows, hard = probe._with_samples(x, y, sample, None, 2, 3)
    _, soft = probe._with_samples(x, y, sample, target, 2, 3)
    for s in range(2):
        for i in range(4):
            assert torch.equal(rows[s, 4 * i], x[i])
            assert torch.equal(rows[s, 4 * i + 1 : 4 * i + 4], sample[s, i])
            assert hard[4 * i : 4 * i + 4].tolist() == [y[i]] * 4
            assert torch.equal(soft[s, 4 * i], F.one_hot(y[i], 3).double())
            assert torch.equal(soft[s, 4 * i + 1 : 4 * i + 4], target[s, i])


def test_there_may_be_classes_without_a_row():
    x, y = unit(6, 8, key="x"), torch.arange(6) % 2
    assert probe.fit(x, y, x, y, [0], classes=4, epochs=1).weight.shape == (1, 8, 4)


def test_a_fifth_of_every_class_is_held_out():
    y = torch.arange(60) % 4
    x = torch.arange(60.0)[:, None]
    train, y_train, held, y_held = probe.split(x, y)
    assert torch.bincount(y_held).tolist() == [3] * 4
    assert torch.cat([train, held]).flatten().sort().values.tolist() == list(range(60))
    assert torch.equal(y[train[:, 0].long()], y_train)
    assert not torch.equal(probe.split(x, y, seed=1)[2], held)


def test_so_many_images_of_every_class_are_picked():
    y = torch.tensor([0] * 5 + [1] * 3 + [3] * 2)
    assert torch.bincount(y[probe.pick(y, 3, generator(0))]).tolist() == [3, 3, 0, 2]
    few = probe.pick(y, torch.tensor([1, 2, 9, 0]), generator(0))
    assert torch.bincount(y[few], minlength=4).tolist() == [1, 2, 0, 0]
    assert len({tuple(probe.pick(y, 1, generator(seed)).tolist()) for seed in range(9)}) > 1
