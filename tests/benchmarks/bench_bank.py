"""The bank: reading over re-encoding in a sweep, the memory of a build, and what float16 and bf16 cost."""

import math
import tempfile
import time
import warnings

from measure import peak_growth

from upclose import bank, birdlets, encode
from upclose.features import Plan
from upclose.methods import wca

PLAN = Plan(n=30, scale=(0.5, 0.9))
EQUAL = 2000  # images of the comparison of precisions
IMAGES, SETTINGS = 300, [(math.exp(i), math.exp(j)) for i in range(5) for j in range(4)]
SMALL, LARGE, MEMORY_PLAN = 200, 2000, Plan(n=2, scale=(0.5, 0.9))
SHARD = 64


def encoder(precision="fp32"):
    return encode.load("birdlets-tiny", device="cpu", precision=precision)


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


def bf16_over_fp32(root):
    """Share of equal predictions of WCA, and the largest cosine error of a crop; both encoded here, kept in float32."""
    dataset, model = birdlets.dataset(n=EQUAL), encoder()
    words = text(model, dataset)
    full, half = (
        bank.build(dataset, m, PLAN, root, dtype="float32", progress=False).read()[0] for m in (model, encoder("bf16"))
    )
    error = (1 - (half.crop.double() * full.crop.double()).sum(-1)).max().item()
    equal = (wca.scores(half, words).argmax(1) == wca.scores(full, words).argmax(1)).float().mean().item()
    return error, equal


def build_of(images):
    """A build of so many images, in a process that has built a shard before."""
    model, dataset, root = encoder(), birdlets.dataset(n=images), tempfile.TemporaryDirectory()
    dataset._draw = (
        dataset._draw.__wrapped__
    )  # Birdlets keeps the pictures that it drew, which no data set on disk does
    bank.build(birdlets.dataset(n=SHARD, seed=1), model, MEMORY_PLAN, root.name, progress=False)

    def build():
        with root:
            bank.build(dataset, model, MEMORY_PLAN, root.name, progress=False)

    return build


def main():
    print("measure | baseline | ours | ratio | target")
    with tempfile.TemporaryDirectory() as root:
        encoding, scoring = sweep_over_encoding(root)
        print(f"20 settings of WCA, seconds | {encoding:.1f} | {scoring:.3f} | {encoding / scoring:.0f}x | 100x")
        error, equal = half_over_full(root)
        print(f"float16 on disk, largest cosine error | 0 | {error:.1e} | | < 1e-3")
        print(f"float16 on disk, equal predictions | 100 % | {equal:.1%} | | > 99.5 %")
        warnings.simplefilter("ignore")  # of a processor without bf16, where it is slower and as exact
        error, equal = bf16_over_fp32(root)
        print(f"bf16 encoding, largest cosine error of a crop | 0 | {error:.1e} | | -")
        print(f"bf16 encoding, equal predictions of {EQUAL:,} | 100 % | {equal:.2%} | | > 99 %")
    small, large = (peak_growth("bench_bank", "build_of", images) for images in (SMALL, LARGE))
    print(f"memory that a build adds, MiB, {SMALL} and {LARGE:,} images | {small:.0f} | {large:.0f} | | flat")


if __name__ == "__main__":
    main()
