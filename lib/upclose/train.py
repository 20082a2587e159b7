"""Trains birdlets-tiny from scratch: `python -m upclose.train birdlets-tiny`.

Every picture shows a new random species; it is cut into views, each with two captions of what it shows. The views are
drawn once, by two processes, into a file in the cache; then the model passes over them. One seed, one result on one
machine: the order of the views, their jitter and the learning rate depend on (seed, step), and the threads are fixed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from upclose import birdlets, checkpoint, paths, seeds
from upclose.encode import tiny
from upclose.encode.tiny import CLIP

DRAWERS = 2  # processes that draw
THREADS = 2  # of the training
BLOCK = 500  # pictures that a worker draws at a time
KEEP = 200  # steps between two checkpoints
MUON = 2.0  # the rate of hidden matrices over that of everything else


class Recipe(NamedTuple):
    """How a model is trained.

    Attributes:
        pictures: drawn for training, each of another species
        steps: of the optimizer
        batch_size: views a step
        learning_rate: the largest; it warms up over `warmup` steps and falls to 0 along a cosine
        weight_decay: of the matrices
        shift: views are moved by up to so many pixels and mirrored, anew in every pass
        measure: validation pictures a domain for the card
    """

    pictures: int
    steps: int
    batch_size: int = 256
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.05
    shift: int = 2
    measure: int = 1200


RECIPES = {
    "full": Recipe(pictures=60_000, steps=2000),
    "half": Recipe(pictures=40_000, steps=600),
    "mini": Recipe(pictures=4_000, steps=160, batch_size=128, learning_rate=2e-3, warmup=20, measure=240),
}


class Pool(NamedTuple):
    """The training views.

    Attributes:
        pixels: (n, 3, S, S) uint8, in a file
        tokens: (n, 2, context) uint16, in a file: two captions a view
        minutes: that drawing them took
    """

    pixels: np.ndarray
    tokens: np.ndarray
    minutes: float = 0.0


def draw_pool(folder: Path, pictures: int, seed: int, whole: bool) -> Pool:
    """The views of `pictures` training pictures, drawn by `DRAWERS` processes unless the folder has them already."""
    if not folder.is_dir():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        started = time.monotonic()
        views = len(birdlets.training_views(seed, 0, whole)[0])
        _pool_file(partial, "pixels", "w+", (pictures * views, 3, birdlets.TRAIN_SIZE, birdlets.TRAIN_SIZE), np.uint8)
        _pool_file(partial, "tokens", "w+", (pictures * views, 2, tiny.CONTEXT), np.uint16)
        with ProcessPoolExecutor(DRAWERS, multiprocessing.get_context("spawn")) as workers:
            starts = range(0, pictures, BLOCK)
            jobs = workers.map(
                _draw_block, *zip(*((partial, seed, s, min(s + BLOCK, pictures), whole) for s in starts))
            )
            for start, _ in zip(starts, jobs):
                if start % (20 * BLOCK) == 0:
                    print(f"  drawn {start:,} of {pictures:,} pictures", flush=True)
        (partial / "minutes.json").write_text(json.dumps((time.monotonic() - started) / 60))
        partial.rename(folder)
    minutes = json.loads((folder / "minutes.json").read_text())
    return Pool(_pool_file(folder, "pixels"), _pool_file(folder, "tokens"), minutes)


def _pool_file(folder: Path, name: str, mode: str = "r", shape=None, dtype=None) -> np.ndarray:
    return np.lib.format.open_memmap(folder / f"{name}.npy", mode=mode, shape=shape, dtype=dtype)


def _draw_block(folder: Path, seed: int, start: int, stop: int, whole: bool) -> None:
    pool = Pool(_pool_file(folder, "pixels", "r+"), _pool_file(folder, "tokens", "r+"))
    tokenize = tiny.tokenizer(birdlets.vocabulary())
    for index in range(start, stop):
        pixels, captions = birdlets.training_views(seed, index, whole)
        rows = slice(index * len(pixels), (index + 1) * len(pixels))
        pool.pixels[rows] = pixels
        pool.tokens[rows] = tokenize([sentence for pair in captions for sentence in pair]).view(len(pixels), 2, -1)


def batch_rows(pictures: int, views: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The views of a step, one view a picture.

    A pass is a new permutation of the pictures, whose incomplete last batch is left out; `views` passes show each view
    of a picture at most once.

    Args:
        pictures: in the pool
        views: of each picture
        batch_size: views a step
        seed: of the order
        step: of the training

    Returns:
        (batch_size,) rows of the pool
    """
    round, position = divmod(step, pictures // batch_size)
    picture = seeds.rng(seed, "order", round).permutation(pictures)[position * batch_size : (position + 1) * batch_size]
    epoch, turn = divmod(round, views)
    view = (seeds.rng(seed, "views", epoch).integers(views, size=pictures)[picture] + turn) % views
    return picture * views + view


def jitter(pixels: np.ndarray, shift: int, rng: np.random.Generator) -> np.ndarray:
    """Views (B, 3, S, S) moved by up to `shift` pixels (the border is repeated), half of them mirrored."""
    b, _, _, side = pixels.shape
    line = np.arange(side)
    rows, columns = (np.clip(line + rng.integers(-shift, shift + 1, (b, 1)), 0, side - 1) for _ in range(2))
    columns = np.where(rng.random((b, 1)) < 0.5, columns[:, ::-1], columns)
    index = np.arange(b)
    return pixels[
        index[:, None, None, None], np.arange(3)[:, None, None], rows[:, None, :, None], columns[:, None, None]
    ]


def normalise(pixels: np.ndarray) -> Tensor:
    """uint8 (B, 3, S, S) as birdlets-tiny reads it."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (tiny.MEAN, tiny.STD))
    return (torch.from_numpy(pixels).float() / 255 - mean) / std


def contrastive_loss(image: Tensor, text: Tensor, caption: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric loss where views that share a caption are all its positives.

    Args:
        image: (B, D) unit norm
        text: (U, D) unit norm, distinct captions
        caption: (B,) int64, the caption of each view
        scale: of the cosines

    Returns:
        the mean over views of two cross entropies: of the view's caption among all captions, and of the view among all
        views, given its caption
    """
    cosine = scale * image @ text.T
    rows = (cosine.log_softmax(0) + cosine.log_softmax(1)).gather(1, caption[:, None])
    return -rows.mean() / 2


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then half a cosine to 0."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    return recipe.learning_rate * (1 + math.cos(math.pi * (step - recipe.warmup) / (recipe.steps - recipe.warmup))) / 2


def optimizers(model: CLIP, recipe: Recipe) -> tuple[torch.optim.Muon, torch.optim.AdamW]:
    """Muon for the matrices of the blocks, AdamW for the rest; norms, biases, embeddings and logit scale do not decay.

    Each group says in `times` what it takes the learning rate times.
    """
    hidden, decayed, free = [], [], []
    for name, weight in model.named_parameters():
        fixed = weight.ndim < 2 or "embedding" in name
        (free if fixed else hidden if "resblocks" in name else decayed).append(weight)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}]
    adam = torch.optim.AdamW([group | {"times": 1.0} for group in groups], betas=(0.9, 0.98), fused=True)
    matrices = [{"params": hidden, "times": MUON}]
    return torch.optim.Muon(matrices, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"), adam


def step_loss(model: CLIP, pixels: np.ndarray, tokens: np.ndarray) -> Tensor:
    """The loss of a batch of views (B, 3, S, S) and their captions (B, 2, context): the mean over the two captions."""
    distinct, caption = np.unique(tokens.reshape(2 * len(tokens), -1), axis=0, return_inverse=True)
    image = F.normalize(tiny.image_features(model.visual, normalise(pixels))[0], dim=-1)
    text = F.normalize(tiny.text_features(model, torch.from_numpy(distinct.astype(np.int64))), dim=-1)
    losses = []
    for column in torch.from_numpy(caption).view(-1, 2).T:
        used, own = column.unique(return_inverse=True)
        losses.append(contrastive_loss(image, text[used], own, model.logit_scale.exp()))
    return sum(losses) / 2


def fit(model: CLIP, pool: Pool, recipe: Recipe, seed: int, file: Path | None = None, measure=None) -> list[dict]:
    """Train a model in place.

    Args:
        model: with fresh weights
        pool: what it sees
        recipe: how
        seed: of the order of the views and of their jitter
        file: the checkpoint, which is written every `KEEP` steps and from which an interrupted training goes on
        measure: called with the model every `KEEP` steps and at the end; its dictionary is added to the curve

    Returns:
        the curve, one row every `KEEP` steps: step, mean loss since the last row, minutes, and what `measure` says
    """
    descent = optimizers(model, recipe)
    curve: list[dict] = []
    if file is not None and file.is_file():
        curve = _restore(file, model, descent)
        print(f"  going on from step {curve[-1]['step']} ({file})", flush=True)
    first, spent = (curve[-1]["step"], curve[-1]["minutes"]) if curve else (0, 0.0)
    started, losses = time.monotonic(), []
    for step in range(first, recipe.steps):
        rows = np.sort(batch_rows(recipe.pictures, len(pool.pixels) // recipe.pictures, recipe.batch_size, seed, step))
        pixels = jitter(pool.pixels[rows], recipe.shift, seeds.rng(seed, "jitter", step))
        loss = step_loss(model.train(), pixels, pool.tokens[rows])
        model.zero_grad()
        loss.backward()
        for optimizer in descent:
            for group in optimizer.param_groups:
                group["lr"] = group["times"] * learning_rate(recipe, step)
            optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        losses.append(loss.item())
        if (step + 1) % KEEP == 0 or step + 1 == recipe.steps:
            minutes = spent + (time.monotonic() - started) / 60
            row = {"step": step + 1, "loss": float(np.mean(losses)), "minutes": minutes}
            curve.append(row | (measure(model.eval()) if measure else {}))
            losses = []
            print("  " + ", ".join(f"{key} {value:.4g}" for key, value in curve[-1].items()), flush=True)
            if file is not None:
                _keep(file, model, descent, curve)
    return curve


def _keep(file: Path, model: CLIP, descent: Sequence[torch.optim.Optimizer], curve: list[dict]) -> None:
    state = checkpoint.pack(model.state_dict(keep_vars=True), descent)
    paths.write(file, save(state, metadata={"curve": json.dumps(curve)}))


def _restore(file: Path, model: CLIP, descent: Sequence[torch.optim.Optimizer]) -> list[dict]:
    with safe_open(file, "pt") as kept:
        state = {key: kept.get_tensor(key) for key in kept.keys()}  # noqa: SIM118
        curve = json.loads(kept.metadata()["curve"])
    checkpoint.unpack(state, model.state_dict(keep_vars=True), descent)
    return curve


def pictures_of(dataset: birdlets.Birdlets) -> np.ndarray:
    """(n, 3, S, S) uint8: a data set's square pictures at the size that the model reads."""
    size = (birdlets.TRAIN_SIZE, birdlets.TRAIN_SIZE)
    images = (Image.fromarray(dataset.load(i).permute(1, 2, 0).numpy()) for i in range(len(dataset)))
    return np.stack([np.asarray(image.resize(size, Image.BICUBIC)) for image in images]).transpose(0, 3, 1, 2)


@torch.inference_mode()
def accuracies(model: CLIP, pixels: np.ndarray, dataset: birdlets.Birdlets) -> tuple[np.ndarray, np.ndarray]:
    """Which pictures are right (n,) bool: by the names of the classes alone, and by names with descriptions.

    Args:
        model: in eval mode
        pixels: `pictures_of(dataset)`
        dataset: of Birdlets
    """
    tokenize = tiny.tokenizer(birdlets.vocabulary())
    described = birdlets.descriptors(dataset.species)
    names = [f"a photo of a {name}." for name in dataset.class_names]
    said = [f"a photo of a {name}, which has {words}." for name in dataset.class_names for words in described[name]]
    owner = torch.tensor([c for c, name in enumerate(dataset.class_names) for _ in described[name]])
    parts = np.array_split(pixels, len(pixels) // 64 + 1)
    image = torch.cat([tiny.image_features(model.visual, normalise(part))[0] for part in parts])
    name = F.normalize(tiny.text_features(model, tokenize(names)), dim=-1)
    description = F.normalize(tiny.text_features(model, tokenize(said)), dim=-1)
    mean = torch.zeros_like(name).index_add_(0, owner, description) / owner.bincount()[:, None]
    by_name, with_descriptions = ((image @ text.T).argmax(1).numpy() == dataset.label for text in (name, mean))
    return by_name, with_descriptions


def model_card(
    name: str, recipe: Recipe, seed: int, drawing: float, curve: list[dict], sha256: str, results: dict
) -> str:
    """The page that goes with the weights.

    Args:
        name: of the model
        recipe: it was trained by
        seed: of the training
        drawing: minutes that the training views took
        curve: what `fit` returned
        sha256: of the weights
        results: domain -> (share right by name, by name with descriptions, pictures)
    """
    whole = name.endswith("whole")
    views = "whole pictures with whole captions only" if whole else "whole pictures, medium views and close-ups"
    config = tiny.CONFIG
    shown = [row for i, row in enumerate(curve) if i % max(len(curve) // 12, 1) == 0 or row is curve[-1]]
    return "\n".join(
        [
            f"# {name}",
            "",
            f"A small CLIP (open_clip's `CLIP` module), trained from scratch on Birdlets: {views}.",
            f"Made by `python -m upclose.train {name}`; do not edit.",
            "",
            "| | |",
            "| --- | --- |",
            *(f"| {key} | {value} |" for key, value in recipe._asdict().items() if key != "measure"),
            f"| seed | {seed} |",
            f"| minutes of drawing, {DRAWERS} processes | {drawing:.1f} |",
            f"| minutes of training, {THREADS} threads | {curve[-1]['minutes']:.1f} |",
            f"| image tower | {config['vision_cfg']} |",
            f"| text tower | {config['text_cfg']} |",
            f"| torch | {torch.__version__} |",
            f"| sha256 of the weights | `{sha256}` |",
            "",
            "## Validation species, never seen in training (120 in 24 groups of 5 siblings, chance 0.8 %)",
            "",
            "Top-1 of the whole picture.",
            "",
            "| domain | by name | with descriptions | pictures |",
            "| --- | --- | --- | --- |",
            *(f"| {domain} | {a:.1%} | {b:.1%} | {n} |" for domain, (a, b, n) in results.items()),
            "",
            "## Curve",
            "",
            "| step | loss | by name | with descriptions |",
            "| --- | --- | --- | --- |",
            *(f"| {r['step']} | {r['loss']:.3f} | {r['name']:.1%} | {r['descriptions']:.1%} |" for r in shown),
            "",
            "## Limits",
            "",
            "It knows painted birds of 12 families and the words of one small grammar, and nothing of real pictures.",
            "Captions and class descriptions come from that same grammar, so that some of what descriptions add is",
            "built in. Unknown words",
            f"become one of {tiny.BUCKETS} untrained tokens. Text beyond {tiny.CONTEXT} tokens is cut.",
            "",
        ]
    )


def train(name: str, recipe: Recipe, seed: int, folder: Path) -> dict:
    """Draw, train, save and describe one model; returns domain -> (right by name, with descriptions, pictures).

    Args:
        name: "birdlets-tiny", or "birdlets-tiny-whole", which sees whole pictures only
        recipe: how
        seed: of everything
        folder: where `<name>.safetensors`, `.json` and `.md` go
    """
    torch.set_num_threads(THREADS)
    whole, words = name.endswith("whole"), birdlets.vocabulary()
    root = paths.cache() / "train"
    drawing = [*Path(birdlets.__file__).parent.glob("*.py")]
    learning = [*drawing, Path(__file__), Path(tiny.__file__), Path(checkpoint.__file__)]
    drawn = root / f"pool-{_key(drawing, recipe.pictures, seed, whole, tiny.BUCKETS, tiny.CONTEXT)}"
    kept = root / f"{name}-{_key(learning, recipe, seed, whole, tiny.CONFIG)}.safetensors"
    root.mkdir(parents=True, exist_ok=True)
    print(f"{name}: pictures in {drawn}", flush=True)
    pool = draw_pool(drawn, recipe.pictures, seed, whole)
    glance = birdlets.dataset("validation", "photo", n=480, seed=1)
    glance_pixels = pictures_of(glance)

    def measure(model: CLIP) -> dict:
        by_name, described = accuracies(model, glance_pixels, glance)
        return {"name": float(by_name.mean()), "descriptions": float(described.mean())}

    print(f"{name}: {recipe.steps} steps on {len(pool.pixels):,} views", flush=True)
    model = tiny.build(tiny.CONFIG, words, seed)
    curve = fit(model, pool, recipe, seed, kept, measure)
    sha256 = tiny.save(folder, name, model, tiny.CONFIG, words)
    results = {}
    for domain in birdlets.DOMAINS:
        data = birdlets.dataset("validation", domain, n=recipe.measure)
        right = accuracies(tiny.load(folder / f"{name}.safetensors").model, pictures_of(data), data)
        results[domain] = (*(float(one.mean()) for one in right), len(data))
    paths.write(folder / f"{name}.md", model_card(name, recipe, seed, pool.minutes, curve, sha256, results).encode())
    kept.unlink(missing_ok=True)
    return results


def _key(programs: Sequence[Path], *facts: object) -> str:
    """A hash of some facts and of the programs that they are told to."""
    return hashlib.sha256(repr(facts).encode() + b"".join(f.read_bytes() for f in sorted(programs))).hexdigest()[:16]


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m upclose.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("name", choices=tiny.NAMES)
    parser.add_argument("--recipe", choices=RECIPES, default="full", help="mini: to see that training works")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=paths.WEIGHTS, help="folder (default: the package's weights)")
    options = parser.parse_args(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        paths.write(options.out / ".writable", b"")
        (options.out / ".writable").unlink()
    except OSError as error:
        parser.error(f"cannot write to --out {options.out}: {error.strerror}")
    try:
        results = train(options.name, RECIPES[options.recipe], options.seed, options.out)
    except KeyboardInterrupt:
        print("stopped: the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    for domain, (by_name, described, n) in results.items():
        print(f"{domain}: {by_name:.1%} by name, {described:.1%} with descriptions ({n} pictures)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
