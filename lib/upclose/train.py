"""Trains birdlets-tiny from scratch: `python -m upclose.train birdlets-tiny`.

Every picture shows a new random species; it is cut into views, each with two captions of what it shows. The views are
drawn once, by as many processes as there are cores, into a file in the cache, where all seeds find them; then the model
passes over them, jittered on the device, in bf16 with weights in fp32. One seed, one result on one device: the order of
the views, their jitter and the learning rate depend on (seed, step), and a processor uses one thread. An interrupted
command goes on where it was when it is given again; given once more at the end, it writes the card anew.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from upclose import birdlets, card, checkpoint, fetch, paths, seeds
from upclose.encode import tiny
from upclose.encode.tiny import CLIP

BLOCK = 500  # pictures that a worker draws at a time
KEEP = 200  # steps between two checkpoints
FIRST = 64  # steps: the curve has a row there and whenever twice as many were made
TEXTS = 128  # captions that are trimmed to one length
MUON = 2.0  # the rate of hidden matrices over that of everything else
POOL_SEED = 0  # all trainings see the same pictures
SEED = {"birdlets-tiny-1": 1, "birdlets-tiny-2": 2}


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
    "p60k-s2000-b256-cosine": Recipe(pictures=60_000, steps=2000),
    "p60k-s500-b256-cosine": Recipe(pictures=60_000, steps=500),  # a quarter as long, for the card
    "p300k-s16000-b512-cosine": Recipe(pictures=300_000, steps=16_000, batch_size=512),  # for a GPU
    "p4k-s160-b128-cosine": Recipe(4_000, steps=160, batch_size=128, learning_rate=2e-3, warmup=20, measure=240),
}


class Pool(NamedTuple):
    """The training views.

    Attributes:
        pixels: (n, 3, S, S) uint8, in a file
        tokens: (n, 2, context) uint16, in a file: two captions a view
        minutes: that a processor needed to draw them
    """

    pixels: np.ndarray
    tokens: np.ndarray
    minutes: float = 0.0


def draw_pool(folder: Path, pictures: int, seed: int, whole: bool) -> Pool:
    """The views of `pictures` training pictures, drawn by a process a core unless the folder has them already.

    What an interrupted drawing had finished is not drawn again.

    Raises:
        ValueError: a file is cut short (it is removed)
        OSError: the disk has no room for them
    """
    with FileLock(folder.with_suffix(".lock"), mode=paths.mode()):
        if not folder.is_dir():
            _draw(folder, pictures, seed, whole)
        return _opened(folder)


def _draw(folder: Path, pictures: int, seed: int, whole: bool) -> None:
    partial = folder.with_name(folder.name + ".partial")
    if (partial / "minutes.json").is_file():
        _opened(partial)
    else:
        _reserve(partial, pictures * len(birdlets.training_views(seed, 0, whole)[0]))
    starts = [start for start in range(0, pictures, BLOCK) if not (partial / f"{start}.done").exists()]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as workers:
        stops = [min(start + BLOCK, pictures) for start in starts]
        count = len(starts)
        jobs = workers.map(_draw_block, [partial] * count, [seed] * count, starts, stops, [whole] * count)
        for start, _ in zip(starts, jobs):
            if start % (20 * BLOCK) == 0:
                print(f"  drawn {start:,} of {pictures:,} pictures", flush=True)
    done = [*partial.glob("*.done")]
    (partial / "minutes.json").write_text(json.dumps(sum(float(file.read_text()) for file in done) / 60))
    for file in done:
        file.unlink()
    partial.rename(folder)


def _reserve(folder: Path, views: int) -> None:
    """Empty files for so many views."""
    shutil.rmtree(folder, ignore_errors=True)
    shapes = (views, 3, birdlets.TRAIN_SIZE, birdlets.TRAIN_SIZE), (views, 2, tiny.CONTEXT)
    fetch.room(folder, math.prod(shapes[0]) + 2 * math.prod(shapes[1]), "the drawing of the views")
    folder.mkdir(parents=True)
    _pool_file(folder, "pixels", "w+", shapes[0], np.uint8)
    _pool_file(folder, "tokens", "w+", shapes[1], np.uint16)
    (folder / "minutes.json").write_text("0")


def _opened(folder: Path) -> Pool:
    try:
        minutes = json.loads((folder / "minutes.json").read_text())
        return Pool(_pool_file(folder, "pixels"), _pool_file(folder, "tokens"), minutes)
    except (OSError, ValueError) as error:
        shutil.rmtree(folder)
        raise ValueError(
            f"the views in {folder} were cut short ({error}): they are removed, the same command draws them anew"
        ) from None


def _pool_file(folder: Path, name: str, mode: str = "r", shape=None, dtype=None) -> np.ndarray:
    return np.lib.format.open_memmap(folder / f"{name}.npy", mode=mode, shape=shape, dtype=dtype)


def _draw_block(folder: Path, seed: int, start: int, stop: int, whole: bool) -> None:
    began = time.process_time()
    pool = Pool(_pool_file(folder, "pixels", "r+"), _pool_file(folder, "tokens", "r+"))
    tokenize = tiny.tokenizer(birdlets.vocabulary())
    for index in range(start, stop):
        pixels, captions = birdlets.training_views(seed, index, whole)
        rows = slice(index * len(pixels), (index + 1) * len(pixels))
        pool.pixels[rows] = pixels
        pool.tokens[rows] = tokenize([sentence for pair in captions for sentence in pair]).view(len(pixels), 2, -1)
    (folder / f"{start}.done").write_text(str(time.process_time() - began))


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


class Batch(NamedTuple):
    """What a step sees, on its device.

    Attributes:
        pixels: (B, 3, S, S) uint8
        rows, columns: (B, S) int64, which row and column of a view each row and column of the jittered view is
        texts: the distinct captions, the shortest first, in parts (L, length) int64
        used: for each of a view's two captions, (U,) int64: the texts that the batch has there
        caption: for each of the two, (B,) int64: the place of each view's caption in `used`
    """

    pixels: Tensor
    rows: Tensor
    columns: Tensor
    texts: list[Tensor]
    used: list[Tensor]
    caption: list[Tensor]


def batch(pixels: np.ndarray, tokens: np.ndarray, shift: int, rng: np.random.Generator, device: torch.device) -> Batch:
    """Views (B, 3, S, S) uint8 and their captions (B, 2, context), on their way to a device that nobody waits for.

    Each view will be moved by up to `shift` pixels (the border is repeated), half of them mirrored.
    """
    b, _, _, side = pixels.shape
    line = np.arange(side)
    rows, columns = (np.clip(line + rng.integers(-shift, shift + 1, (b, 1)), 0, side - 1) for _ in range(2))
    columns = np.where(rng.random((b, 1)) < 0.5, columns[:, ::-1], columns)
    distinct, caption = np.unique(tokens.reshape(2 * b, -1), axis=0, return_inverse=True)
    length = distinct.argmax(1) + 1
    order = length.argsort(kind="stable")
    caption = order.argsort()[caption.reshape(b, 2)]
    parts = np.split(order, range(TEXTS, len(order), TEXTS))
    used, own = zip(*(np.unique(column, return_inverse=True) for column in caption.T))

    def send(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    texts = [distinct[part, : length[part].max()].astype(np.int64) for part in parts]
    return Batch(send(pixels), send(rows), send(columns), *([send(a) for a in some] for some in (texts, used, own)))


def jitter(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Views (B, 3, S, S) whose rows and columns (B, S) are taken from other places."""
    view, channel = (torch.arange(n, device=pixels.device) for n in pixels.shape[:2])
    return pixels[view[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None]]


def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Attention (B, H, Q, D) written out: with so few tokens, faster in bf16 on a CPU than PyTorch's own."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores if attn_mask is None else scores + attn_mask.to(scores.dtype)).softmax(-1).to(v.dtype) @ v


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


def step_loss(model: CLIP, batch: Batch) -> Tensor:
    """The loss of a batch, the mean over the two captions: matrices in bf16, their sums, norms and the loss in fp32."""
    pixels = tiny.normalise(jitter(batch.pixels, batch.rows, batch.columns))
    views = 64 if pixels.device.type == "cpu" else len(pixels)  # 64 views stay in a CPU's cache
    with torch.autocast(pixels.device.type, torch.bfloat16):
        image = torch.cat([tiny.image_features(model.visual, part, attend)[0] for part in pixels.split(views)])
        text = torch.cat([tiny.trimmed_features(model, part, attend) for part in batch.texts])
    image, text = (F.normalize(side.float(), dim=-1) for side in (image, text))
    scale = model.logit_scale.exp()
    return sum(contrastive_loss(image, text[u], own, scale) for u, own in zip(batch.used, batch.caption)) / 2


def fit(model: CLIP, pool: Pool, recipe: Recipe, seed: int, file: Path | None = None, measure=None) -> list[dict]:
    """Train a model in place.

    Args:
        model: with fresh weights
        pool: what it sees
        recipe: how
        seed: of the order of the views and of their jitter
        file: the checkpoint, which is written with every row and from which an interrupted training goes on
        measure: called with the model for every row, to which its dictionary is added

    Returns:
        the curve, one row every `KEEP` steps, at `FIRST` steps and whenever twice as many were made, and at the end:
        step, mean loss since the last row, minutes, and what `measure` says

    Raises:
        ValueError: the checkpoint is damaged, or of another recipe, seed or device (it is set aside)
    """
    device = next(model.parameters()).device
    descent = optimizers(model, recipe)
    curve: list[dict] = []
    training = json.dumps({**recipe._asdict(), "seed": seed, "device": device.type})
    if file is not None and file.is_file():
        curve = _restore(file, training, model, descent)
        print(f"  going on from step {curve[-1]['step']} ({file})", flush=True)
    first, spent = (curve[-1]["step"], curve[-1]["minutes"]) if curve else (0, 0.0)
    started, losses = time.monotonic(), []
    for step in range(first, recipe.steps):
        rows = np.sort(batch_rows(recipe.pictures, len(pool.pixels) // recipe.pictures, recipe.batch_size, seed, step))
        rng = seeds.rng(seed, "jitter", step)
        loss = step_loss(model.train(), batch(pool.pixels[rows], pool.tokens[rows], recipe.shift, rng, device))
        model.zero_grad()
        loss.backward()
        for optimizer in descent:
            for group in optimizer.param_groups:
                group["lr"] = group["times"] * learning_rate(recipe, step)
            optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        losses.append(loss.detach())
        if _is_row(step + 1, recipe.steps):
            minutes = spent + (time.monotonic() - started) / 60
            row = {"step": step + 1, "loss": float(torch.stack(losses).mean()), "minutes": minutes}
            curve.append(row | (measure(model.eval()) if measure else {}))
            losses = []
            print("  " + ", ".join(f"{key} {value:.4g}" for key, value in curve[-1].items()), flush=True)
            if file is not None:
                _keep(file, training, model, descent, curve)
    return curve


def _is_row(done: int, steps: int) -> bool:
    doubled = done >= FIRST and done & (done - 1) == 0
    return done % KEEP == 0 or doubled or done == steps


def _keep(file: Path, training: str, model: CLIP, descent: Sequence[torch.optim.Optimizer], curve: list[dict]) -> None:
    state = checkpoint.pack(model.state_dict(keep_vars=True), descent)
    paths.write(file, save(state, metadata={"curve": json.dumps(curve), "training": training}))


def _restore(file: Path, training: str, model: CLIP, descent: Sequence[torch.optim.Optimizer]) -> list[dict]:
    try:
        with safe_open(file, "pt") as kept:
            facts = kept.metadata()
            if facts["training"] != training:
                raise ValueError(f"is of another training: {facts['training']}")
            state = {key: kept.get_tensor(key) for key in kept.keys()}  # noqa: SIM118
        checkpoint.unpack(state, model.state_dict(keep_vars=True), descent)
        return json.loads(facts["curve"])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        asides = (file.with_suffix(f".aside{number or ''}") for number in itertools.count())
        aside = next(free for free in asides if not free.exists())  # what was kept before stays
        file.replace(aside)
        raise ValueError(
            f"the checkpoint {file.name} cannot be used ({error}): it is now {aside}, the same command starts anew"
        ) from None


@contextmanager
def _alone(name: str, file: Path) -> Iterator[None]:
    try:
        with FileLock(file.with_suffix(".lock"), timeout=0, mode=paths.mode()):
            yield
    except Timeout:
        raise ValueError(f"{name} is being trained already ({file}): wait for its end or stop it") from None


def curve_of(file: Path, steps: int) -> list[dict]:
    """The curve that a checkpoint carries, [] where there is none, or it is damaged or not of the training's end."""
    try:
        with safe_open(file, "pt") as kept:
            curve = json.loads(kept.metadata()["curve"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return []
    return curve if curve[-1]["step"] == steps else []


def _quarter(recipe: str) -> str | None:
    """The recipe that differs from this one by a quarter of its steps."""
    long = RECIPES[recipe]
    return next((name for name, short in RECIPES.items() if short._replace(steps=4 * short.steps) == long), None)


def train(name: str, recipe: str, seed: int, folder: Path, device: str = "cpu") -> dict:
    """Draw, train, save and describe one model; returns domain -> (right by name, with descriptions, pictures).

    Args:
        name: one of `tiny.NAMES`; "birdlets-tiny-whole" sees whole pictures only
        recipe: one of `RECIPES`
        seed: of the weights, and of the order and jitter of the views; all seeds see the same views
        folder: where `<name>.safetensors`, `.json` and `.md` go
        device: "cpu" or "cuda"

    Raises:
        ValueError: views or checkpoint are damaged, or another process trains the same
        OSError: the disk has no room
    """
    torch.set_num_threads(1)
    if device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    how = RECIPES[recipe]
    whole, words = name.endswith("whole"), birdlets.vocabulary()
    root = paths.cache() / "train"
    drawing = [*Path(birdlets.__file__).parent.glob("*.py")]
    learning = [*drawing, Path(__file__), Path(tiny.__file__), Path(checkpoint.__file__)]
    drawn = root / f"pool-{_key(drawing, how.pictures, POOL_SEED, whole, tiny.BUCKETS, tiny.CONTEXT)}"

    def kept(recipe: str) -> Path:
        key = _key(learning, RECIPES[recipe], seed, device, whole, tiny.CONFIG)
        return root / f"{name}-{recipe}-{key}.safetensors"

    root.mkdir(parents=True, exist_ok=True)
    with _alone(name, kept(recipe)):
        print(f"{name}: pictures in {drawn}", flush=True)
        pool = draw_pool(drawn, how.pictures, POOL_SEED, whole)
        photos = birdlets.dataset("validation", "photo", n=how.measure)
        photo_pixels = card.pictures_of(photos)

        def measure(model: CLIP) -> dict:
            by_name, described = card.accuracies(model, photo_pixels, photos)
            return {"name": float(by_name.mean()), "descriptions": float(described.mean())}

        print(f"{name}: {how.steps} steps on {len(pool.pixels):,} views, {kept(recipe)}", flush=True)
        model = tiny.build(tiny.CONFIG, words, seed).to(device)
        curve = fit(model, pool, how, seed, kept(recipe), measure)
        sha256 = tiny.save(folder, name, model.cpu(), tiny.CONFIG, words)
        shipped = tiny.load(folder / f"{name}.safetensors").model
        results = {}
        for domain in birdlets.DOMAINS:
            data = birdlets.dataset("validation", domain, n=how.measure)
            right = card.accuracies(shipped, card.pictures_of(data), data)
            results[domain] = (*(float(one.mean()) for one in right), len(data))
        curves = {recipe: curve}
        if quarter := _quarter(recipe):
            curves[quarter] = curve_of(kept(quarter), RECIPES[quarter].steps)
        facts = how._asdict() | {
            "recipe": recipe,
            "seed": seed,
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu, 1 thread",
            "minutes of drawing, one processor": f"{pool.minutes:.1f}",
            "minutes of training": f"{curve[-1]['minutes']:.1f}",
            "sha256 of the weights": f"`{sha256}`",
        }
        page = card.page(name, facts, how.batch_size, curves, results, card.readable(shipped, photos))
        paths.write(folder / f"{name}.md", page.encode())
    return results


def _key(programs: Sequence[Path], *facts: object) -> str:
    """A hash of some facts and of the programs that they are told to."""
    return hashlib.sha256(repr(facts).encode() + b"".join(f.read_bytes() for f in sorted(programs))).hexdigest()[:16]


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m upclose.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("name", choices=tiny.NAMES)
    parser.add_argument("--recipe", choices=RECIPES, default=next(iter(RECIPES)), help="pictures, steps, batch, rate")
    parser.add_argument("--seed", type=int, help="default: the number in the model's name, else 0")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=paths.WEIGHTS, help="folder (default: the package's weights)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has none that PyTorch can use; --device cpu trains on a processor")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        paths.write(options.out / ".writable", b"")
        (options.out / ".writable").unlink()
    except OSError as error:
        parser.error(f"cannot write to --out {options.out}: {error.strerror}")
    seed = SEED.get(options.name, 0) if options.seed is None else options.seed
    try:
        results = train(options.name, options.recipe, seed, options.out, options.device)
    except KeyboardInterrupt:
        print("stopped: the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:  # the last: a process that draws was killed, a full GPU
        parser.error(paths.sentence(error))
    for domain, (by_name, described, n) in results.items():
        print(f"{domain}: {by_name:.1%} by name, {described:.1%} with descriptions ({n} pictures)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
