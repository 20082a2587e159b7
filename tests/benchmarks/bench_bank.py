"""The bank: reading over re-encoding in a sweep, the memory of a build, and what float16 on disk costs."""

import math
import resource
import subprocess
import sys
import tempfile
import time

from upclose import bank, birdlets, encode
from upclose.features import Plan
from upclose.methods import wca

PLAN = Plan(n=30, scale=(0.5, 0.9))
IMAGES, SETTINGS = 300, [(math.exp(i), math.exp(j)) for i in range(5) for j in range(4)]
SMALL, LARGE, MEMORY_PLAN = 200, 2000, Plan(n=2, scale=(0.5, 0.9))


def encoder():
    return encode.load("birdlets-tiny", device="cpu")


def text(model, dataset):
    descriptions = birdlets.sentences(dataset.species)
    return encode.embed_text(
        model,
        [f"a photo of a {name}." for name in dataset.class_names],
        [descriptions[name] for name in dataset.class_names],
        dataset.class_names,
    )


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def sweep_over_encoding(root):
    """20 settings of WCA: the bank is opened and read for each, against encoding for each (one encoding, times 20)."""
    dataset, model = birdlets.dataset(n=IMAGES), encoder()
    words = text(model, dataset)
    encoding = len(SETTINGS) * seconds(lambda: bank.build(dataset, model, PLAN, root, progress=False))

    def sweep():
        for image_scale, text_scale in SETTINGS:
            views, *_ = bank.open(root, dataset, model, PLAN).read()
            wca.scores(views, words, image_scale=image_scale, text_scale=text_scale)

    scoring = min(seconds(sweep) for _ in range(3))
    return encoding, scoring


def half_over_full(root):
    """Largest cosine error of float16 on disk, and the share of equal predictions of WCA."""
    dataset, model = birdlets.dataset(n=IMAGES), encoder()
    words = text(model, dataset)
    half, full = (bank.build(dataset, model, PLAN, root, dtype=d, progress=False).read()[0] for d in bank.shards.DTYPE)
    error = max((1 - (a.double() * b.double()).sum(-1)).abs().max().item() for a, b in zip(half[:2], full[:2]))
    equal = (wca.scores(half, words).argmax(1) == wca.scores(full, words).argmax(1)).float().mean().item()
    return error, equal


def peak_of_a_build(images):
    """MiB that a build of so many images adds to a process that has already encoded a batch."""
    program = f"import bench_bank; bench_bank.print_peak({images})"
    done = subprocess.run([sys.executable, "-c", program], cwd=sys.path[0], capture_output=True, text=True, check=True)
    return float(done.stdout)


def print_peak(images):
    model = encoder()
    with tempfile.TemporaryDirectory() as root:
        bank.build(birdlets.dataset(n=bank.shards.BATCH, seed=1), model, MEMORY_PLAN, root, progress=False)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        bank.build(birdlets.dataset(n=images), model, MEMORY_PLAN, root, progress=False)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main():
    print("measure | baseline | ours | ratio | target")
    with tempfile.TemporaryDirectory() as root:
        encoding, scoring = sweep_over_encoding(root)
        print(f"20 settings of WCA, seconds | {encoding:.1f} | {scoring:.3f} | {encoding / scoring:.0f}x | 100x")
        error, equal = half_over_full(root)
        print(f"float16 on disk, largest cosine error | 0 | {error:.1e} | | < 1e-3")
        print(f"float16 on disk, equal predictions | 100 % | {equal:.1%} | | > 99.5 %")
    small, large = peak_of_a_build(SMALL), peak_of_a_build(LARGE)
    print(f"memory that a build adds, MiB, {SMALL} and {LARGE:,} images | {small:.0f} | {large:.0f} | | flat")


if __name__ == "__main__":
    main()
