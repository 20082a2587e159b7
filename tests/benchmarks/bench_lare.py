"""LARE's two stages for five seeds: all at once on one tensor, against a DataLoader loop, one seed after the other.

Both have the same f_Box, losses, minibatch size and number of steps. The arithmetic floor is the time of the bare
matrix products that a step cannot do without (forward and backward), once a step and seed, on tensors in memory: the
fastest of several measurements before and after the runs.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from upclose.methods import lare, probe
from upclose.seeds import generator

N, D, C, SAMPLES, BATCH, ALPHA = 10_000, 512, 200, 5, 512, 0.9
SEEDS = probe.SEEDS
OPTIONS = dict(lr=1e-3, weight_decay=0.05)


def world(n: int, key: str) -> tuple[Tensor, Tensor, Tensor]:
    """Unit embeddings around the label embedding of their class."""
    label = F.normalize(torch.randn(C, D, generator=generator(0, "label")), dim=1)
    y = torch.randint(C, (n,), generator=generator(0, key, "y"))
    return F.normalize(label[y] + 0.1 * torch.randn(n, D, generator=generator(0, key)), dim=1), y, label


def loader(seed: int, *tensors: Tensor) -> DataLoader:
    """A plain shuffled DataLoader over rows."""
    return DataLoader(TensorDataset(*tensors), BATCH, shuffle=True, generator=generator(seed))


def plain_boxes(x: Tensor, y: Tensor, label: Tensor, seed: int, epochs: int) -> tuple[Tensor, Tensor]:
    """Stage 1 of one seed."""
    torch.manual_seed(seed)
    network = torch.nn.Sequential(torch.nn.Linear(D, D // 2), torch.nn.ReLU(), torch.nn.Linear(D // 2, 2 * D))
    optimiser = torch.optim.AdamW(network.parameters(), **OPTIONS)
    batches = loader(seed, x, y)
    for _ in range(epochs):
        for rows, classes in batches:
            minus, plus = (F.normalize(corner, dim=1) for corner in network(rows).chunk(2, 1))
            volume = (minus * plus).sum()
            points = (minus, plus, (minus + plus) / 2)
            consistency = sum(F.cross_entropy(point @ label.T, classes, reduction="sum") for point in points) / 3
            optimiser.zero_grad()
            ((1 - ALPHA) * volume + ALPHA * consistency).backward()
            optimiser.step()
    with torch.no_grad():
        minus, plus = (F.normalize(corner, dim=1) for corner in network(x).chunk(2, 1))
    return minus, plus


def plain_probe(
    x: Tensor, y: Tensor, corners: tuple[Tensor, Tensor], x_val: Tensor, y_val: Tensor, seed: int, epochs: int
) -> float:
    """Stage 2 of one seed."""
    torch.manual_seed(seed)
    minus, plus = corners
    points = [minus + (plus - minus) * torch.rand_like(minus) for _ in range(SAMPLES)]
    batches = loader(seed, torch.cat([x, *points]), y.repeat(SAMPLES + 1))
    layer = torch.nn.Linear(D, C)
    optimiser = torch.optim.AdamW(layer.parameters(), **OPTIONS)
    best, state = -1.0, None
    for _ in range(epochs):
        for rows, classes in batches:
            loss = F.cross_entropy(layer(rows), classes)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            right = (layer(x_val).argmax(1) == y_val).float().mean().item()
        if right > best:
            best, state = right, copy.deepcopy(layer.state_dict())
    assert state is not None
    return best


def seconds(work: Callable[[], object]) -> tuple[float, object]:
    """Wall time of one call, and what it returned."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def matmul_seconds(*shapes: tuple[int, int, int], repeat: int = 30) -> float:
    """Shortest wall time of products (a, b) x (b, c), one after the other."""
    pairs = [(torch.randn(a, b), torch.randn(b, c)) for a, b, c in shapes]
    return min(seconds(lambda: [left @ right for left, right in pairs])[0] for _ in range(repeat))


def floor_boxes() -> float:
    """A stage 1 step of one seed: both layers, the label products of the two corners, and their gradients."""
    h = D // 2
    forward = [(BATCH, D, h), (BATCH, h, 2 * D), (2 * BATCH, D, C)]
    backward = [(2 * BATCH, C, D), (BATCH, 2 * D, h), (h, BATCH, 2 * D), (D, BATCH, h)]
    return matmul_seconds(*forward, *backward)


def floor_probe() -> float:
    """A stage 2 step of one seed: the layer and its gradient."""
    return matmul_seconds((BATCH, D, C), (D, BATCH, C))


def fetch_plain(seed: int, *tensors: Tensor) -> float:
    """One epoch of the DataLoader alone."""
    return seconds(lambda: [None for _ in loader(seed, *tensors)])[0]


def fetch_ours(rows: Tensor, y: Tensor) -> float:
    """One epoch of drawing orders and gathering minibatches, for all seeds."""

    def work() -> None:
        order = torch.stack([torch.randperm(len(y), generator=generator(seed)) for seed in SEEDS])
        for index in order.split(BATCH, 1):
            probe.take(rows, index), probe.take(y, index)

    return seconds(work)[0]


def main(epochs: int = 100, probe_epochs: int = 20) -> None:
    """Print the table."""
    x, y, label = world(N, "train")
    x_val, y_val, _ = world(2000, "val")
    steps = -(-N // BATCH) * epochs * len(SEEDS)
    probe_steps = -(-N * (SAMPLES + 1) // BATCH) * probe_epochs * len(SEEDS)

    before = floor_boxes(), floor_probe()
    stage1, boxes = seconds(lambda: lare.fit_boxes(x, y, label, ALPHA, SEEDS, epochs=epochs))
    points = lare.sample(boxes, SAMPLES, [generator(seed) for seed in SEEDS])
    stage2, fitted = seconds(
        lambda: probe.fit(x, y, x_val, y_val, SEEDS, sample=points, epochs=probe_epochs, learning_rate=1e-3)
    )
    plain1, corners = seconds(lambda: [plain_boxes(x, y, label, seed, epochs) for seed in SEEDS])
    plain2, right = seconds(
        lambda: [plain_probe(x, y, corners[s], x_val, y_val, seed, probe_epochs) for s, seed in enumerate(SEEDS)]
    )
    floor = steps * min(before[0], floor_boxes()) + probe_steps * min(before[1], floor_probe())

    rows = torch.cat([x.expand(len(SEEDS), N, D), points.flatten(1, 2)], 1)
    all_y = y.repeat(SAMPLES + 1)
    plain_fetch = len(SEEDS) * (epochs * fetch_plain(0, x, y) + probe_epochs * fetch_plain(0, rows[0], all_y))
    our_fetch = epochs * fetch_ours(x, y) + probe_epochs * fetch_ours(rows, all_y)

    print(f"{len(SEEDS)} seeds, {N} embeddings, d = {D}, {C} classes, {SAMPLES} samples an image, batch {BATCH},")
    print(f"{epochs} epochs of stage 1, {probe_epochs} of stage 2; {torch.get_num_threads()} threads; seconds")
    print(f"validation accuracy: plain {sum(right) / len(SEEDS):.4f}, ours {fitted.accuracy.mean():.4f}")
    print(f"{'measure':44} {'plain':>9} {'ours':>9} {'ratio':>7}  target")
    table = [
        ("stage 1", plain1, stage1, ""),
        ("stage 2", plain2, stage2, ""),
        ("both", plain1 + plain2, stage1 + stage2, ">= 1.5"),
        ("arithmetic floor (bare matrix products)", floor, floor, ""),
        ("both, above the floor", plain1 + plain2 - floor, stage1 + stage2 - floor, ""),
        ("orders and minibatches (nothing computed)", plain_fetch, our_fetch, ">= 10"),
    ]
    for name, plain, ours, target in table:
        print(f"{name:44} {plain:9.2f} {ours:9.2f} {plain / ours:7.2f}  {target}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=100, help="of stage 1")
    parser.add_argument("--probe-epochs", type=int, default=20, help="of stage 2")
    main(**vars(parser.parse_args()))
