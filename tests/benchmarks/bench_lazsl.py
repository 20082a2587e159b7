"""LaZSL on 200 classes of 3 to 9 attributes, 90 crops, D = 512, against loops over images and classes.

Both loops solve one image and one class at a time and stop when u moves by less than 1e-2 on average. `program` works
out anew for every class what the authors' program works out anew; `loop` does only what it must, and is the harder one
to beat. What limits the second ratio: the matrix product of crops and attributes takes two thirds of our time (with it
alone the ratio would be about 65), the passes over the plans (exponential, two rounds, score) and their calls the rest.
"""

from __future__ import annotations

from functools import partial

import torch
from measure import peak_growth, rates
from torch import Tensor
from torch.nn.functional import normalize

from upclose.features import Text, Views
from upclose.methods import lazsl


def features(classes: int, images: int, crops: int = 90, dim: int = 512) -> tuple[Views, Text]:
    """CLIP-like features: two cones, image-text cosines of about 0.26 with a deviation of 0.03."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator) / dim**0.5  # noqa: E731
    counts = torch.arange(classes) % 7 + 3
    owner = torch.arange(classes).repeat_interleave(counts)
    words, pictures, topic = draw(dim), draw(dim), draw(classes, dim)
    description = normalize(1.2 * words + 0.25 * pictures + 0.6 * topic[owner] + 0.5 * draw(len(owner), dim), dim=-1)
    image = pictures + 0.25 * words + 0.4 * topic[torch.arange(images) % classes] + 0.5 * draw(images, dim)
    image = normalize(image, dim=-1)
    crop = normalize(image[:, None] + 0.5 * draw(images, crops, dim), dim=-1)
    return Views(image, crop), Text(normalize(words + topic, dim=-1), description, owner)


def program(views: Views, text: Text, stop: float, theta: float = 0.8, epsilon: float = 0.1) -> Tensor:
    """Batches of one image, a class at a time, in the steps of the authors' program without those it makes no use of.

    Every class selects the crops again, mixes image and crops after their products, turns the kernel over in memory
    in each round, forms the plan and looks for numbers that are none.
    """
    attributes = text.description.split(text.counts.tolist())
    result = []
    for image, crop in zip(views.image, views.crop):
        both, cosine = torch.cat([image[None], crop]), (crop @ image)[None]
        for q in attributes:
            sim = (both @ q.T)[None]
            sim = (1 - theta) * sim[:, :1] + theta * sim[:, 1:]
            dropped = cosine < cosine.mean(1, keepdim=True)
            row, column = torch.full_like(cosine, 1 / len(crop)), sim.new_full((1, len(q)), 1 / len(q))
            row[dropped] = 0
            row = torch.where(dropped, row, 1 / row.count_nonzero(1)[:, None])
            kernel = torch.exp(-(1 - sim) / epsilon)
            u, v = torch.ones_like(row), torch.ones_like(column)
            for _ in range(100):
                before = u
                u = row / (kernel @ v[..., None])[..., 0]
                v = column / (kernel.mT.contiguous() @ u[..., None])[..., 0]
                if (u - before).abs().mean().item() < stop:
                    break
            plan = (u[..., None] @ v[:, None]) * kernel
            if plan.isnan().any():
                raise ValueError("the kernel has underflown")
            result.append((plan * sim).sum((1, 2)))
    return torch.stack(result).view(len(views.image), -1)


def loop(views: Views, text: Text, stop: float, theta: float = 0.8, epsilon: float = 0.1) -> Tensor:
    """One image, one class at a time; what classes share is worked out once an image."""
    attributes = text.description.split(text.counts.tolist())
    result = []
    for image, crop in zip(views.image, views.crop):
        cosine = crop @ image
        keep = (cosine >= cosine.mean()).float()
        row = keep / keep.sum()
        for q in attributes:
            sim = theta * (crop @ q.T) + (1 - theta) * (image @ q.T)
            kernel = torch.exp((sim - 1) / epsilon)
            u, v, column = torch.ones(len(crop)), torch.ones(len(q)), torch.full((len(q),), 1 / len(q))
            for _ in range(100):
                before = u
                u = row / (kernel @ v)
                v = column / (kernel.T @ u)
                if (u - before).abs().mean().item() < stop:
                    break
            result.append((u[:, None] * kernel * v * sim).sum())
    return torch.stack(result).view(len(views.image), -1)


def scoring(classes: int):
    """The call whose memory is measured, after a small one."""
    views, text = features(classes, 32)
    lazsl.scores(views.select(slice(0, 1)), text)
    return lambda: lazsl.scores(views, text)


@torch.no_grad()
def main() -> None:
    """Print one line a measure."""
    views, text = features(200, 128)
    few = views.select(slice(0, 2))
    programs = partial(program, few, text, 1e-2), partial(loop, few, text, 1e-2)
    *slow, fast = rates(1, *programs, lambda: lazsl.scores(views, text), rounds=100)
    theirs, bare = (1 / rate / len(few.image) for rate in slow)
    ours = 1 / fast / len(views.image)
    print(f"threads {torch.get_num_threads()}")
    print("measure | baseline | ours | ratio | target")
    for name, baseline, target in (("the authors' steps", theirs, 40), ("bare loop", bare, "")):
        print(f"ms an image, {name} | {baseline * 1e3:.1f} | {ours * 1e3:.2f} | {baseline / ours:.1f} | {target}")
    some = views.select(slice(0, 16))
    scores, converged, stopped = lazsl.scores(some, text), loop(some, text, 1e-7), program(some, text, 1e-2)
    same = (scores.argmax(-1) == stopped.argmax(-1)).float().mean()
    print(f"same predictions | 1 | {same:.3f} | | 1")
    print(f"largest difference, converged loop | | {(scores - converged).abs().max():.1e} | | 1e-5")
    print(f"largest difference, the authors' steps | | {(scores - stopped).abs().max():.1e} | | 1e-4")
    few, many = rates(1, *(partial(lazsl.scores, *features(classes, 32)) for classes in (250, 1000)))
    print(f"time of 1000 classes over 250 | | | {few / many:.2f} | 4")
    grown = peak_growth("bench_lazsl", "scoring", 1000) / 1024
    print(f"growth of peak memory at 1000 classes, GiB | | {grown:.2f} | | 2")


if __name__ == "__main__":
    main()
