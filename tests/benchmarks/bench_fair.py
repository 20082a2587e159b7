"""Epochs of FAIR over Birdlets: seconds, the share spent in the encoder, and one teacher call a batch against many.

The encoder is the image tower's forward passes and the backward pass. The rest is cutting the crops, augmenting, the
scores and AdamW, and waiting for pictures, which a thread reads ahead. Birdlets are drawn in the first epoch and
remembered (2,048 of them) afterwards: a later epoch is what decoded pictures cost. The baseline encodes the same crops
image by image.
"""

import argparse
import resource
import time
from collections import Counter

import torch

from upclose import birdlets, crops, encode
from upclose.methods import fair


def timed(owner: object, name: str, clock: Counter) -> None:
    """Replace owner.name by itself with its seconds added to clock[name]."""
    function = getattr(owner, name)

    def run(*args, **options):
        start = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            clock[name] += time.perf_counter() - start

    setattr(owner, name, run)


def seconds(function) -> float:
    """Best of three."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--domain", default="painting")
    parser.add_argument("--encoder", default="birdlets-tiny")
    n = parser.parse_args()

    encoder = encode.load(n.encoder)
    dataset = birdlets.dataset(domain=n.domain, n=n.images)
    sentences = birdlets.sentences(dataset.species)
    names = dataset.class_names
    text = encode.embed_text(encoder, [f"a photo of a {name}." for name in names], [sentences[x] for x in names])

    few = birdlets.dataset(domain=n.domain, n=min(32, n.images), seed=1)
    pictures = [few.load(i) for i in range(len(few))]
    shape = [x.shape[1:] for x in pictures]
    box = torch.stack([fair.weak_boxes(*s, 16, (0.5, 0.9), 0, str(i)) for i, s in enumerate(shape)])
    each = seconds(lambda: [encoder.encode_crops(x, rows, cls=True) for x, rows in zip(pictures, box)])
    once = seconds(lambda: encoder.encode_crops(pictures, box, cls=True))

    clock = Counter()
    for owner, name in (
        (encode.Encoder, "features"),
        (torch.Tensor, "backward"),
        (birdlets.Birdlets, "load"),
        (crops, "extract"),
        (fair, "_strong_views"),
        (torch.optim.AdamW, "step"),
    ):
        timed(owner, name, clock)
    clock["all"] = -time.perf_counter()
    marks = [Counter(clock)]

    def mark(_):
        now = Counter(clock)
        now["all"] += time.perf_counter()
        marks.append(now)

    marks[0]["all"] = 0
    history = fair.adapt(encoder, dataset, text, epochs=2, on_epoch=mark).history

    count = f"{n.images} {n.domain} images, {len(names)} classes, N=16, k=4, batch 32"
    print(f"{count}, {torch.get_num_threads()} threads")
    shares = []
    for title, before, after in zip(("first", "later"), marks, marks[1:]):
        spent = {name: after[name] - before[name] for name in after}
        total = spent.pop("all")
        shares.append((spent["features"] + spent["backward"]) / total)
        parts = "; ".join(f"{name} {part:.1f} s" for name, part in sorted(spent.items(), key=lambda item: -item[1]))
        print(f"{title} epoch in {total:.1f} s, in which {parts} (load in its own thread)")
    print(f"L_st {history.self_training[-1]:.2e}, L_reg {history.fairness[-1]:.2e}, raw gamma")
    print("measure | baseline | ours | ratio | target")
    print(f"teacher, s a batch of {len(pictures)} | {each:.3f} | {once:.3f} | {each / once:.2f}x | 1x")
    for title, share in zip(("first", "later"), shares):
        print(f"share in the encoder, {title} epoch | - | {share:.0%} | - | 70%")
    print(f"peak memory, MiB | - | {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} | - | -")


if __name__ == "__main__":
    main()
