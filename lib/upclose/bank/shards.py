"""One shard: decode, draw boxes, encode, write. What an image becomes does not depend on how fast anything was.

Threads decode ahead, the caller's thread hands pictures to the encoder, and another thread writes. On the CPU the same
eight pictures always meet the encoder together; an encoder that `streams` takes them as they come, in whole batches.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from upclose import crops
from upclose.bank import store as stores
from upclose.bank.store import Store
from upclose.features import Dataset, Plan
from upclose.images import ImageError

BATCH = 8  # images that are handed to an encoder on the CPU together; part of a bank's key
SHARD, STREAMED_SHARD = 64, 512  # images a file, and of an encoder that streams, for which 64 are a tenth of a second
PREPROCESSING = 1  # part of a bank's key: raise it when `crops` or `images` give other pixels than before
AHEAD = 2**30  # bytes of pictures that wait for the encoder, about
WRITING = 2  # shards that wait for the disk
DTYPE = {"float16": torch.float16, "float32": torch.float32}


class Work(NamedTuple):
    """What is to be encoded, by what, to where; `compile` as in `encode_views`, all but `folder` as in `bank.build`."""

    dataset: Dataset
    encoder: object
    plan: Plan
    dtype: str
    on_error: str
    folder: Store
    compile: bool = False


class Picture(NamedTuple):
    """A decoded picture, or why there is none.

    Attributes:
        pixels: uint8 (3, H, W)
        box: (N, 4) or (T, N, 4) float32
        error: the reason that it cannot be read
        ready: what an encoder that streams takes
    """

    pixels: Tensor | None
    box: Tensor | None
    error: ImageError | None = None
    ready: object | None = None


def cut(dataset: Dataset, start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """The ranges of images that become shards: of at most `size` images, none of which reaches over two tars."""
    starts = getattr(dataset, "tar_starts", [])
    inside = starts[bisect.bisect_right(starts, start) : bisect.bisect_left(starts, stop)]
    return [
        (first, min(first + size, end))
        for begin, end in itertools.pairwise([start, *inside, stop])
        for first in range(begin, end, size)
    ]


def runs(dataset: Dataset, ranges: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """The ranges in groups that a worker reads one after the other: those of one tar, else each by itself."""
    starts = getattr(dataset, "tar_starts", [])
    if not starts:
        return [[shard] for shard in ranges]
    return [list(group) for _, group in itertools.groupby(ranges, lambda shard: bisect.bisect_right(starts, shard[0]))]


def make(
    work: Work,
    ranges: list[tuple[int, int]],
    advance: Callable[[int], object] = lambda images: None,
    waited: Counter | None = None,
) -> list[dict]:
    """Encode and write the shards of some ranges of images.

    Args:
        work: what to encode
        ranges: (start, stop) of each shard
        advance: called with the number of images that were added
        waited: to which the seconds are added that this thread waited for "decoding" and for "writing"

    Returns:
        an `entry` a shard

    Raises:
        ValueError: a picture is unreadable and on_error is "raise", or the encoder's numbers are not finite
    """
    waited = Counter() if waited is None else waited
    positions = itertools.chain.from_iterable(itertools.starmap(range, ranges))
    encode = _encode_stream if streams(work.encoder) else _encode_batches
    written: list[Future] = []
    with ThreadPoolExecutor(1) as writer, closing(decode(work, positions, waited)) as pictures:
        for start, stop in ranges:
            tensors, index, errors = encode(work, zip(range(start, stop), pictures), advance)
            with _clock(waited, "writing"):
                if len(written) >= WRITING:
                    written[-WRITING].result()
            before = written[-1] if written else None
            written.append(writer.submit(_write, before, work, start, stop, *_on_host(tensors), index, errors))
        with _clock(waited, "writing"):
            return [shard.result() for shard in written]


def streams(encoder: object) -> bool:
    """Whether an encoder takes pictures as they come: `encode.Encoder` on a GPU."""
    return getattr(encoder, "streams", False)


@contextmanager
def _clock(waited: Counter, name: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        waited[name] += time.perf_counter() - start


def _encode_batches(work: Work, pictures: Iterable[tuple[int, Picture]], advance) -> tuple[dict, list[int], dict]:
    """The tensors of a shard, which images they are, and the reasons of those that cannot be read."""
    dataset, encoder, plan, dtype, on_error, *_ = work
    parts, index, errors = [], [], {}
    while batch := list(itertools.islice(pictures, BATCH)):
        for i, picture in batch:
            _note_error(dataset, i, picture, on_error, errors)
        if readable := [(i, picture) for i, picture in batch if not picture.error]:
            index += [i for i, _ in readable]
            parts.append(_encode([picture for _, picture in readable], encoder, plan.cls, DTYPE[dtype]))
        advance(len(batch))
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}, index, errors


def _encode_stream(work: Work, pictures: Iterable[tuple[int, Picture]], advance) -> tuple[dict, list[int], dict]:
    """The same, of an encoder that streams; what it gives is on its device and may not be there yet."""
    dataset, encoder, plan, dtype, on_error, *_ = work
    box, index, errors = [], [], {}

    def readable() -> Iterator[object]:
        for i, picture in pictures:
            _note_error(dataset, i, picture, on_error, errors)
            if not picture.error:
                index.append(i)
                box.append(picture.box)
                yield picture.ready
            advance(1)

    ready = readable()
    if (first := next(ready, None)) is None:
        return {}, index, errors
    found = encoder.encode_views(itertools.chain([first], ready), plan.cls, work.compile)
    names = ("image", "crop", "image_cls", "crop_cls")
    tensors = {name: x.to(DTYPE[dtype]) for name, x in zip(names, found) if x is not None}
    return {"box": torch.stack(box)} | tensors, index, errors


def _encode(pictures: list[Picture], encoder: object, cls: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Encode B pictures and their crops.

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


def _on_host(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
    """Copies on the host, and what tells when they are whole."""
    host = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
    if not any(tensor.device.type == "cuda" for tensor in tensors.values()):
        return host, None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(next(x.device for x in tensors.values() if x.device.type == "cuda")))
    return host, event


def _write(before: Future | None, work: Work, start: int, stop: int, tensors, event, index, errors) -> dict:
    """Write a shard once it is on the host; nothing, if the shard before could not be written."""
    if before is not None:
        before.result()
    if event is not None:
        event.synchronize()
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError(
            f"the encoder's features of images {start} to {stop - 1} of {work.dataset.name} are not finite in "
            f"{work.dtype}: try precision='fp32' or dtype='float32'"
        )
    tensors = {**tensors, "index": torch.tensor(index, dtype=torch.int64)}
    content = stores.pack(tensors, errors, work.folder.name)
    written = entry(start, stop, content, errors)
    stores.write(work.folder, written["name"], content)
    return written


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


@functools.cache
def decoders() -> ThreadPoolExecutor:
    """The threads that decode for every build of this process: Pillow lets go of the interpreter while it decodes."""
    return ThreadPoolExecutor(os.cpu_count() or 1, "decoder")


os.register_at_fork(after_in_child=decoders.cache_clear)  # a forked process has none of its parent's threads


def decode(work: Work, positions: Iterable[int], waited: Counter | None = None) -> Iterator[Picture]:
    """The pictures at these positions, in order.

    At most two batches are decoded ahead, for an encoder that streams many more, but never more than about `AHEAD`
    bytes, as far as the largest picture until now tells.
    """
    waited = Counter() if waited is None else waited
    positions, pool, ahead = iter(positions), decoders(), deque()
    most, largest = (STREAMED_SHARD if streams(work.encoder) else 2 * BATCH), 1
    try:
        while True:
            room = min(most, max(2, AHEAD // largest)) if largest > 1 else 2 * BATCH
            ahead.extend(pool.submit(_load, work, i) for i in itertools.islice(positions, max(0, room - len(ahead))))
            if not ahead:
                return
            with _clock(waited, "decoding"):
                picture = ahead.popleft().result()
            largest = max(largest, 0 if picture.error else picture.pixels.numel())
            yield picture
    finally:
        for picture in ahead:
            picture.cancel()


def _load(work: Work, i: int) -> Picture:
    dataset = work.dataset
    try:
        pixels = dataset.load(i)
    except ImageError as error:
        return Picture(None, None, error)
    except Exception as error:
        error.add_note(f"while loading picture {i} ({dataset.key[i]!r}) of {dataset.name} ({dataset.split})")
        raise
    box = crops.plan_boxes(work.plan, *pixels.shape[-2:], dataset.key[i])
    return Picture(pixels, box, None, work.encoder.prepare(pixels, box) if streams(work.encoder) else None)


def _note_error(dataset: Dataset, i: int, picture: Picture, on_error: str, errors: dict[int, str]) -> None:
    if not picture.error:
        return
    if on_error == "raise":
        raise ValueError(
            f"picture {i} ({dataset.key[i]!r}) of {dataset.name} ({dataset.split}): {picture.error}. "
            "Mend it, or pass on_error='skip' to list it in the manifest and leave it out of every result"
        ) from picture.error
    errors[i] = picture.error.reason
