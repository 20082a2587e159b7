"""One shard: decode, draw boxes, encode, write. The same pictures always meet the encoder in the same batches."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from upclose import crops
from upclose.bank import store as stores
from upclose.bank.store import Store
from upclose.features import Dataset, Plan
from upclose.images import ImageError

BATCH = 8  # images that are handed to the encoder together; part of a bank's key
PREPROCESSING = 1  # part of a bank's key: raise it when `crops` or `images` give other pixels than before
DECODERS = min(8, os.cpu_count() or 1)  # that decode while the encoder works
DTYPE = {"float16": torch.float16, "float32": torch.float32}


class Job(NamedTuple):
    """What is to be encoded, by what, to where; all but `folder` as in `bank.build`."""

    dataset: Dataset
    encoder: object
    plan: Plan
    dtype: str
    on_error: str
    folder: Store


class Picture(NamedTuple):
    """A decoded picture, or why there is none.

    Attributes:
        pixels: uint8 (3, H, W)
        box: (N, 4) or (T, N, 4) float32
        error: the reason that it cannot be read
    """

    pixels: Tensor | None
    box: Tensor | None
    error: ImageError | None = None


def make(
    job: Job, pool: Executor, ranges: list[tuple[int, int]], advance: Callable[[int], object] = lambda images: None
) -> list[dict]:
    """Encode and write the shards of some ranges of images.

    Args:
        job: what to encode
        pool: its `decoders`
        ranges: (start, stop) of each shard
        advance: called with the number of images that each batch adds

    Returns:
        an `entry` a shard

    Raises:
        ValueError: a picture is unreadable and on_error is "raise", or the encoder's numbers are not finite
    """
    dataset, encoder, plan, dtype, on_error, folder = job
    pictures = decode(job, pool, (i for start, stop in ranges for i in range(start, stop)))
    entries = []
    for start, stop in ranges:
        parts, index, errors = [], [], {}
        for first in range(start, stop, BATCH):
            batch = list(zip(range(first, min(first + BATCH, stop)), pictures))
            if on_error == "raise":
                _raise_first_error(dataset, batch)
            errors |= {i: picture.error.reason for i, picture in batch if picture.error}
            if readable := [(i, picture) for i, picture in batch if not picture.error]:
                index += [i for i, _ in readable]
                parts.append(encode([picture for _, picture in readable], encoder, plan.cls, DTYPE[dtype]))
            advance(len(batch))
        tensors = {name: torch.cat([part[name] for part in parts]).cpu() for name in (parts[0] if parts else ())}
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise ValueError(
                f"the encoder's features of images {start} to {stop - 1} of {dataset.name} are not finite in {dtype}: "
                "try precision='fp32' or dtype='float32'"
            )
        content = stores.pack({**tensors, "index": torch.tensor(index, dtype=torch.int64)}, errors, folder.name)
        entries.append(entry(start, stop, content, errors))
        stores.write(folder, entries[-1]["name"], content)
    return entries


def entry(start: int, stop: int, content: bytes, errors: dict[int, str]) -> dict:
    """What the manifest says about a shard, and its errors."""
    return {
        "name": f"{start:08d}-{stop:08d}.safetensors",
        "start": start,
        "stop": stop,
        "count": stop - start - len(errors),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "errors": errors,
    }


def decoders(job: Job) -> Executor:
    """What decodes a job's pictures: threads where the encoder works on the processor's cores itself.

    Otherwise processes, which take seconds to start and leave this one to the encoder; they start with the first
    picture, are sent the data set once, and end with this process however it ends.
    """
    if job.encoder.device.type == "cpu":
        return ThreadPoolExecutor(DECODERS)
    return ProcessPoolExecutor(DECODERS, multiprocessing.get_context("spawn"), _keep, (job.dataset, job.plan))


def decode(job: Job, pool: Executor, positions: Iterable[int]) -> Iterator[Picture]:
    """The pictures at these positions, in order, decoded ahead by at most two batches."""
    positions = iter(positions)
    load = _load_here if isinstance(pool, ProcessPoolExecutor) else partial(_load, job.dataset, job.plan)
    ahead = deque(pool.submit(load, i) for i in islice(positions, 2 * BATCH))
    while ahead:
        picture = ahead.popleft().result()
        ahead.extend(pool.submit(load, i) for i in islice(positions, 1))
        yield picture


def _keep(dataset: Dataset, plan: Plan) -> None:
    """In a decoding process: what every picture needs is sent to it once."""
    global _load_kept
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _load_kept = partial(_load, dataset, plan)


def _end_with_parent() -> None:
    """A pool's processes do not notice when the one that feeds them is killed, and would wait for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _load_here(i: int) -> Picture:
    return _load_kept(i)


def _load(dataset: Dataset, plan: Plan, i: int) -> Picture:
    try:
        pixels = dataset.load(i)
    except ImageError as error:
        return Picture(None, None, error)
    except Exception as error:
        error.add_note(f"while loading picture {i} ({dataset.key[i]!r}) of {dataset.name} ({dataset.split})")
        raise
    return Picture(pixels, crops.plan_boxes(plan, *pixels.shape[-2:], dataset.key[i]))


def encode(pictures: list[Picture], encoder: object, cls: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Encode B pictures and their crops, on the encoder's device, which is not waited for.

    Returns:
        box (B, [T,] N, 4), image (B, D), crop (B, [T,] N, D) and with cls image_cls (B, W), crop_cls (B, N, W)
    """
    pixels = [picture.pixels for picture in pictures]
    box = torch.stack([picture.box for picture in pictures])
    image, crop = encoder.encode_images(pixels, cls=cls), encoder.encode_crops(pixels, box, cls=cls)
    if cls:
        (image, image_cls), (crop, crop_cls) = image, crop
        return {"box": box, "image": image.to(dtype), "crop": crop.to(dtype)} | {
            "image_cls": image_cls.to(dtype),
            "crop_cls": crop_cls.to(dtype),
        }
    return {"box": box, "image": image.to(dtype), "crop": crop.to(dtype)}


def _raise_first_error(dataset: Dataset, batch: list[tuple[int, Picture]]) -> None:
    for i, picture in batch:
        if picture.error:
            raise ValueError(
                f"picture {i} ({dataset.key[i]!r}) of {dataset.name} ({dataset.split}): {picture.error}. "
                "Mend it, or pass on_error='skip' to list it in the manifest and leave it out of every result"
            ) from picture.error
