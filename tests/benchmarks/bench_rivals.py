"""TransCLIP, TDA and TPT on made features: what they cost, and what that is in forward passes of the text tower."""

import torch
from measure import peak_growth, rates
from torch.nn.functional import normalize

from upclose import birdlets, encode, seeds
from upclose.features import Views
from upclose.methods import tda, tpt, transclip


def features(n, classes, dim):
    draw = seeds.generator(0, "rivals")
    label = normalize(torch.randn(classes, dim, generator=draw), dim=-1)
    own = torch.randint(classes, (n,), generator=draw)
    return normalize(0.3 * label[own] + torch.randn(n, dim, generator=draw) / dim**0.5, dim=-1), label


def largest():
    """TransCLIP over an ImageNet of 50,000 pictures, two updates."""
    image, label = features(50_000, 1_000, 512)
    return lambda: transclip.scores(image, label, iterations=2)


if __name__ == "__main__":
    from time import perf_counter

    image, label = features(10_000, 200, 512)
    start = perf_counter()
    transclip.scores(image, label)
    print(f"TransCLIP, 10,000 images, 200 classes, D = 512: {perf_counter() - start:.1f} s (aim 20)")
    held = peak_growth("bench_rivals", "largest") / 1024
    print(f"TransCLIP, 50,000 images, 1,000 classes, D = 512: {held:.1f} GiB over the inputs (bound 4)")
    torch.set_num_threads(1)
    start = perf_counter()
    tda.stream(image, label)
    print(f"TDA, the same as a stream, one thread: {len(image) / (perf_counter() - start):,.0f} images/s (aim 2,000)")

    encoder, data = encode.load("birdlets-tiny", device="cpu"), birdlets.dataset(n=1)
    names = data.class_names
    tokens, context = encoder.embed_prompts([f"{tpt.CONTEXT} {name}." for name in names], tpt.CONTEXT)
    image, crop = features(8, 1, encoder.dim)[0], features(8 * 16, 1, encoder.dim)[0].unflatten(0, (8, 16))

    @torch.no_grad()
    def forward():
        encoder.encode_embedded(tokens, context[None])

    def tuned():
        tpt.scores(encoder, Views(image, crop), names)

    plain, slow = rates(1, forward, tuned)
    print(f"TPT, {len(names)} classes: an image costs {plain / slow / len(image):.1f} forwards of all prompts")
