"""LARE's two stages for five seeds: all at once on one tensor, against a DataLoader loop, one seed after the other.

Both have the same f_Box, losses, minibatch size and number of steps, and both draw their samples inside stage 2. What
is not arithmetic is what remains above a floor, and there are two floors:

- bare: the matrix products that no step can do without, forward and backward, and those of validation, on tensors that
  lie ready. Softmax, normalisation, AdamW's update of all weights and the drawing of random numbers remain above it.
- steps: the same with these, that is whole steps (forward, backward, AdamW) on a minibatch that lies ready, and draws
  from boxes that lie ready; the faster of the two programs. Orders, minibatches, tables, checks, the choice of the best
  epoch, and what makes the slower program's steps slower remain above it. As many steps are taken in a row as the
  programs take, and in turn with them, for the fastest single step is a tenth faster than any row of them and the
  machine's speed drifts by as much.

Short last minibatches count in the floors by their rows.
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

from upclose.methods import ensemble, lare, probe
from upclose.seeds import generator

N, V, D, C, SAMPLES, BATCH, ALPHA = 10_000, 2000, 512, 200, 5, 512, 0.9
SEEDS = ensemble.SEEDS
S = len(SEEDS)
OPTIONS = dict(lr=1e-3, weight_decay=0.05)


def world(n: int, key: str) -> tuple[Tensor, Tensor, Tensor]:
    """Unit embeddings around the label embedding of their class."""
    label = F.normalize(torch.randn(C, D, generator=generator(0, "label")), dim=1)
    y = torch.randint(C, (n,), generator=generator(0, key, "y"))
    return F.normalize(label[y] + 0.1 * torch.randn(n, D, generator=generator(0, key)), dim=1), y, label


def loader(seed: int, *tensors: Tensor) -> DataLoader:
    """A plain shuffled DataLoader over rows."""
    return DataLoader(TensorDataset(*tensors), BATCH, shuffle=True, generator=generator(seed))


def layers() -> torch.nn.Sequential:
    """f_Box of one seed."""
    return torch.nn.Sequential(torch.nn.Linear(D, D // 2), torch.nn.ReLU(), torch.nn.Linear(D // 2, 2 * D))


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Backward, AdamW."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def plain_loss(network: torch.nn.Module, rows: Tensor, classes: Tensor, label: Tensor) -> Tensor:
    """Eq. 7 of one seed."""
    minus, plus = (F.normalize(corner, dim=1) for corner in network(rows).chunk(2, 1))
    points = (minus, plus, (minus + plus) / 2)
    consistency = sum(F.cross_entropy(point @ label.T, classes, reduction="sum") for point in points) / 3
    return (1 - ALPHA) * (minus * plus).sum() + ALPHA * consistency


def plain_draw(minus: Tensor, plus: Tensor) -> list[Tensor]:
    """The points of one seed, (N, D) each."""
    return [minus + (plus - minus) * torch.rand_like(minus) for _ in range(SAMPLES)]


def plain_boxes(x: Tensor, y: Tensor, label: Tensor, seed: int, epochs: int) -> tuple[Tensor, Tensor]:
    """Stage 1 of one seed."""
    torch.manual_seed(seed)
    network = layers()
    optimizer = torch.optim.AdamW(network.parameters(), **OPTIONS)
    batches = loader(seed, x, y)
    for _ in range(epochs):
        for rows, classes in batches:
            descend(optimizer, plain_loss(network, rows, classes, label))
    with torch.no_grad():
        minus, plus = (F.normalize(corner, dim=1) for corner in network(x).chunk(2, 1))
    return minus, plus


def plain_probe(
    x: Tensor, y: Tensor, corners: tuple[Tensor, Tensor], x_val: Tensor, y_val: Tensor, seed: int, epochs: int
) -> float:
    """Stage 2 of one seed."""
    torch.manual_seed(seed)
    batches = loader(seed, torch.cat([x, *plain_draw(*corners)]), y.repeat(SAMPLES + 1))
    layer = torch.nn.Linear(D, C)
    optimizer = torch.optim.AdamW(layer.parameters(), **OPTIONS)
    best, state = -1.0, None
    for _ in range(epochs):
        for rows, classes in batches:
            descend(optimizer, F.cross_entropy(layer(rows), classes))
        with torch.no_grad():
            right = (layer(x_val).argmax(1) == y_val).float().mean().item()
        if right > best:
            best, state = right, copy.deepcopy(layer.state_dict())
    assert state is not None
    return best


def our_probe(x: Tensor, y: Tensor, boxes: lare.Boxes, x_val: Tensor, y_val: Tensor, epochs: int) -> probe.Probe:
    """Stage 2 of all seeds."""
    points = lare.sample(boxes, SAMPLES, [generator(seed) for seed in SEEDS])
    return probe.fit(x, y, x_val, y_val, SEEDS, sample=points, epochs=epochs, learning_rate=OPTIONS["lr"])


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def fastest(*works: Callable[[], object], repeat: int) -> list[float]:
    """The shortest wall times of calls that take turns."""
    return [min(times) for times in zip(*([seconds(work) for work in works] for _ in range(repeat)))]


def products(*shapes: tuple[int, int, int]) -> Callable[[], object]:
    """Products (a, b) x (b, c), one after the other."""
    pairs = [(torch.randn(a, b), torch.randn(b, c)) for a, b, c in shapes]
    return lambda: [left @ right for left, right in pairs]


def bare_floor() -> tuple[float, float, float]:
    """Seconds of all seeds: the products of a step of stage 1, of a step of stage 2, and of one validation."""
    h = D // 2
    forward = [(BATCH, D, h), (BATCH, h, 2 * D), (2 * BATCH, D, C)]  # both layers, the labels with the two corners
    backward = [(2 * BATCH, C, D), (BATCH, 2 * D, h), (h, BATCH, 2 * D), (D, BATCH, h)]
    works = products(*forward, *backward), products((BATCH, D, C), (D, BATCH, C)), products((V, D, C))
    return tuple(S * t for t in fastest(*works, repeat=30))


def ready_steps(x: Tensor, y: Tensor, label: Tensor) -> tuple[list[Callable[[], None]], list[Callable[[], None]]]:
    """Steps of stage 1 and of stage 2 on a minibatch that lies ready: ours of all seeds, plain ones of one seed."""
    rows, classes = x[:BATCH], y[:BATCH]
    many, every = rows.expand(S, -1, -1).contiguous(), classes.expand(S, -1)
    single, network = layers(), ensemble.network(SEEDS, D, 2 * D, None, "floor", like=x)
    layer, linear = torch.nn.Linear(D, C), ensemble.linear(SEEDS, D, C, "floor", like=x)

    def our_loss() -> Tensor:
        return lare.objective(lare.corner_losses(network(many).unflatten(2, (2, -1)), label, every), ALPHA)

    def our_scores() -> Tensor:
        return ensemble.cross_entropy(ensemble.affine(many, *linear), every) / BATCH

    def stepping(parameters: object, loss: Callable[[], Tensor], **options: bool) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(parameters, **OPTIONS, **options)
        return lambda: descend(optimizer, loss())

    ours = [stepping(network, our_loss, fused=True), stepping(linear, our_scores, fused=True)]
    plain = [
        stepping(single.parameters(), lambda: plain_loss(single, rows, classes, label)),
        stepping(layer.parameters(), lambda: F.cross_entropy(layer(rows), classes)),
    ]
    return ours, plain


def often(work: Callable[[], object], times: int) -> Callable[[], object]:
    """The same work many times in a row."""
    return lambda: [work() for _ in range(times)]


def draws_floor(boxes: lare.Boxes) -> float:
    """Seconds of the draws of all seeds by the faster program."""
    minus, plus = boxes.minus[0], boxes.plus[0]
    draw, plain_draws = fastest(
        lambda: lare.sample(boxes, SAMPLES, [generator(seed) for seed in SEEDS]),
        lambda: plain_draw(minus, plus),
        repeat=2,
    )
    return min(draw, S * plain_draws)


def fetch_plain(*tensors: Tensor) -> float:
    """One epoch of the DataLoader alone, one seed."""
    return fastest(lambda: [None for _ in loader(0, *tensors)], repeat=2)[0]


def fetch_ours(rows: Tensor, y: Tensor) -> float:
    """One epoch of drawing orders and gathering minibatches, for all seeds."""

    def work() -> None:
        order = torch.stack([torch.randperm(len(y), generator=generator(seed)) for seed in SEEDS])
        for index in order.split(BATCH, 1):
            ensemble.take(rows, index), ensemble.take(y, index)

    return fastest(work, repeat=2)[0]


def main(epochs: int = 100, probe_epochs: int = 10, rounds: int = 15) -> None:
    """Print the table."""
    x, y, label = world(N, "train")
    x_val, y_val, _ = world(V, "val")
    all_y = y.repeat(SAMPLES + 1)
    print(f"{S} seeds, {N} embeddings, d = {D}, {C} classes, {SAMPLES} samples an image, batch {BATCH},")
    print(f"{epochs} epochs of stage 1, {probe_epochs} of stage 2; {torch.get_num_threads()} threads; seconds.")
    print(f"Stage 1: an epoch measured, times {epochs}, for both; stage 2 in full. The plain loop: one seed measured,")
    print(f"times {S}. The shortest of {rounds} rounds, of {rounds // 3} in stage 2; programs and floors take turns.")
    print(f"{'measure':48} {'plain':>9} {'ours':>9} {'ratio':>7}  target")

    def row(name: str, plain: float, ours: float, target: str = "") -> None:
        print(f"{name:48} {plain:9.2f} {ours:9.2f} {plain / ours:7.2f}  {target}", flush=True)

    def stage(
        ours: Callable, plain: Callable, steps: float, ours_ready: Callable, plain_ready: Callable, rounds: int
    ) -> tuple[float, float, float]:
        """Seconds of the plain loop, of ours, and of the steps alone on a ready minibatch."""
        count = round(steps)
        plain, ours, plain_steps, our_steps = fastest(
            plain, ours, often(plain_ready, count), often(ours_ready, count), repeat=rounds
        )
        return S * plain, ours, min(S * plain_steps, our_steps) * steps / count

    ours, plain = ready_steps(x, y, label)
    plain1, ours1, floor1 = (
        epochs * t
        for t in stage(
            lambda: lare.fit_network(x, y, label, ALPHA, SEEDS, epochs=1),
            lambda: plain_boxes(x, y, label, 0, 1),
            N / BATCH,
            ours[0],
            plain[0],
            rounds,
        )
    )
    row("stage 1", plain1, ours1)

    boxes = lare.fit_boxes(x, y, label, ALPHA, SEEDS, epochs=1)
    corners = boxes.minus[0], boxes.plus[0]
    steps, probe_steps = epochs * N / BATCH, probe_epochs * len(all_y) / BATCH
    plain2, ours2, floor2 = stage(
        lambda: our_probe(x, y, boxes, x_val, y_val, probe_epochs),
        lambda: plain_probe(x, y, corners, x_val, y_val, 0, probe_epochs),
        probe_steps,
        ours[1],
        plain[1],
        rounds // 3,
    )
    row("stage 2, draws included", plain2, ours2)
    plain, ours = plain1 + plain2, ours1 + ours2
    row("both", plain, ours, ">= 1.5")

    box, layer, validation = bare_floor()
    bare = steps * box + probe_steps * layer + probe_epochs * validation
    floor = floor1 + floor2 + probe_epochs * validation + draws_floor(boxes)
    row("floor, bare: matrix products", bare, bare)
    row("floor, steps: on ready minibatches, and draws", floor, floor)
    row("both, above the bare floor", plain - bare, ours - bare)
    row("both, above the floor of steps", plain - floor, ours - floor, ">= 10")

    rows = torch.cat([x, *plain_draw(*corners)])
    plain_fetch = S * (epochs * fetch_plain(x, y) + probe_epochs * fetch_plain(rows, all_y))
    our_fetch = epochs * fetch_ours(x, y) + probe_epochs * fetch_ours(rows.expand(S, -1, -1).contiguous(), all_y)
    row("orders and minibatches alone", plain_fetch, our_fetch, ">= 10")
    right = plain_probe(x, y, corners, x_val, y_val, 0, 1)
    fitted = our_probe(x, y, boxes, x_val, y_val, 1)
    print(f"validation accuracy after an epoch: plain {right:.4f}, ours {fitted.accuracy.mean():.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=100, help="of stage 1")
    parser.add_argument("--probe-epochs", type=int, default=10, help="of stage 2")
    main(**vars(parser.parse_args()))
