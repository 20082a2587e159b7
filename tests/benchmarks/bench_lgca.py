"""LGCA's selection and scoring against a loop over images and classes on the same cores, in one run.

The baseline is written for speed within its loop: rows by index, one small matrix product a step, `torch.sort`.
"""

import argparse
import time

import torch
from measure import peak_growth
from torch import Tensor
from torch.nn.functional import normalize

from upclose.features import Ladder, Text
from upclose.methods import lgca


def loop(ladder: Tensor, image: Tensor, label: Tensor, description: list[Tensor]) -> Tensor:
    """The naive algorithm: (B, T, N, D), (B, D), (C, D), C of (M, D) -> (B, C)."""
    batch, steps, crops, _ = ladder.shape
    out = torch.empty(batch, len(label))
    for b in range(batch):
        for c in range(len(label)):
            v = (description[c] @ label[c]).softmax(0)
            members, similarity = torch.arange(crops), 0.0
            for t in range(steps):
                crop = ladder[b, t, members]
                w = (crop @ image[b]).softmax(0)
                a = w[:, None] * v * (crop @ description[c].mT)
                similarity = similarity + a.sum() / steps
                z = a.flatten().sort(descending=True, stable=True).indices[: max(1, crops >> (t + 1))]
                members = members[(z // len(v)).unique()]
            out[b, c] = similarity
    return out


def inputs(images: int, classes: int, crops: int, descriptions: int, steps: int, dim: int) -> tuple[Tensor, ...]:
    """(B, T, N, D), (B, D), (C, D), (C, M, D) random unit vectors."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((images, steps, crops), (images,), (classes,), (classes, descriptions))
    return tuple(normalize(torch.randn(*shape, dim, generator=generator), dim=-1) for shape in shapes)


def scoring(*sizes: int):
    """The call whose memory is measured, after a small one."""
    ladder, image, label, description = inputs(*sizes)
    text = Text.from_lists(label, list(description))
    lgca.scores(Ladder(image[:1], ladder[:1]), Text.from_lists(label[:2], list(description[:2])))
    return lambda: lgca.scores(Ladder(image, ladder), text)


def main() -> None:
    """Print the table. `--sample` classes go through the loop; its time is scaled to all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--crops", type=int, default=100)
    parser.add_argument("--descriptions", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--sample", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    n = parser.parse_args()

    sizes = n.images, n.classes, n.crops, n.descriptions, n.steps, n.dim
    memory = peak_growth("bench_lgca", "scoring", *sizes)
    ladder, image, label, description = inputs(*sizes)
    text = Text.from_lists(label, list(description))
    found, ours, baseline = lgca.scores(Ladder(image, ladder), text), [], []
    for _ in range(n.repeats):
        start = time.perf_counter()
        lgca.scores(Ladder(image, ladder), text)
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        expected = loop(ladder, image, label[: n.sample], description[: n.sample])
        baseline.append((time.perf_counter() - start) * n.classes / n.sample)
    error = (found[:, : n.sample] - expected).abs().max()
    assert error < 1e-5, f"the loop and lgca.scores differ by {error:.1e}"

    print(f"{n.images} images, {n.classes} classes, N={n.crops}, M={n.descriptions}, T={n.steps}, D={n.dim}")
    print(
        f"{torch.get_num_threads()} threads, best of {n.repeats}; the loop's {n.sample} classes, scaled to {n.classes}"
    )
    print("measure | baseline | ours | ratio | target")
    print(f"seconds | {min(baseline):.2f} | {min(ours):.2f} | {min(baseline) / min(ours):.1f}x | 20x")
    print(f"memory over the inputs, MiB | - | {memory:.0f} | - | 1024")
    print(f"largest difference | - | {error:.1e} | - | 1e-05")


if __name__ == "__main__":
    main()
