"""The feature bank: a data set's crops, encoded once; every method, sweep and seed then reads them.

A bank is a folder `<root>/<key>/` of safetensors shards, one a block of images, and `manifest.json`, which is written
last: without it a bank is unfinished and is not read. The key is a hash of everything that the numbers depend on, so a
bank cannot be read with other weights, another plan or another precision than it was made with. A killed build goes on
where it stopped. With the same key and the same number of threads the bytes are the same, however the build was
interrupted or spread, because the pictures of a shard always meet the encoder in the same batches; only a device that
runs out of memory makes the batches smaller, and the features differ by rounding.

    views, label, index = bank.build(dataset, encoder, plan).read()
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from upclose import crops, paths
from upclose.bank import cluster, shards
from upclose.bank import store as stores
from upclose.bank.store import BankError, Store
from upclose.features import Dataset, Ladder, Plan, Views
from upclose.images import ImageError

LAYOUT = 2
MANIFEST = "manifest.json"
KEY = re.compile(r".+-[0-9a-f]{20}")  # of the names that `_key` gives; other folders are nobody's banks


@dataclass(frozen=True)
class Bank:
    """A finished bank.

    Attributes:
        folder: where it lies
        manifest: what it holds and from what it was made
        label: (n,) int64, of every image of the data set
    """

    folder: Store
    manifest: dict
    label: np.ndarray

    def __len__(self) -> int:
        return self.manifest["images"]

    @property
    def errors(self) -> list[dict]:
        """The pictures that could not be read: position in the data set, key and reason."""
        return self.manifest["errors"]

    def read(self, images: slice = slice(None)) -> tuple[Views | Ladder, Tensor, Tensor]:
        """Some of the images, from disk.

        No shard is touched that holds none of them, and each is checked when this process reads it first.

        Args:
            images: positions in the data set, without a step

        Returns:
            views: `Views` or, for a plan with steps, `Ladder` of the B readable images among them, float32, unit norm
            label: (B,) int64
            index: (B,) int64, their positions in the data set; unreadable pictures have dropped out

        Raises:
            ValueError: the slice has a step
            BankError: a shard is missing or damaged
            OSError, RuntimeError: it cannot be opened, which says nothing about the shard
        """
        start, stop, step = images.indices(len(self))
        if step != 1:
            raise ValueError(f"a bank is read by ranges: {images} has a step; read all of it and select")
        holding = [shard for shard in self.manifest["shards"] if shard["count"]]
        parts = [
            self._rows(shard, start, stop) for shard in holding if shard["start"] < stop and start < shard["stop"]
        ] or [self._rows(holding[0], 0, 0)]
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        index = tensors.pop("index")
        if self.manifest["identity"]["dtype"] != "float32":
            for name in ("image", "crop"):
                tensors[name] = normalize(tensors[name].float(), dim=-1)
        shape = Ladder if self.manifest["identity"]["plan"]["steps"] > 1 else Views
        views = shape(**{name: tensor.float() for name, tensor in tensors.items()})
        return views, torch.from_numpy(np.asarray(self.label, dtype=np.int64)[index.numpy()]), index

    def batches(self, size: int) -> Iterator[tuple[Views | Ladder, Tensor, Tensor]]:
        """`read` over blocks of images, for a bank that is larger than memory.

        Args:
            size: images a block

        Yields:
            as `read`: views, label and index of the readable images of a block

        Raises:
            BankError: as `read`
        """
        for start in range(0, len(self), size):
            yield self.read(slice(start, start + size))

    def _rows(self, shard: dict, start: int, stop: int) -> dict[str, Tensor]:
        try:
            tensors = load(_content(self.folder, shard))
            first, last = torch.searchsorted(tensors["index"], torch.tensor([start, stop])).tolist()
            return {name: tensor[first:last] for name, tensor in tensors.items()}
        except (SafetensorError, FileNotFoundError, BankError) as error:
            raise _damaged(self.folder, [{"shard": shard["name"], "reason": str(error)}]) from error


def key(dataset: Dataset, encoder: object, plan: Plan, dtype: str = "float16") -> str:
    """The name of the bank of these features: the data set's name, its split and a hash of all that decides them.

    Args:
        dataset: whose pictures
        encoder: whose embeddings
        plan: which crops
        dtype: in which they are stored: "float16", "bfloat16" or "float32"

    Raises:
        ValueError: a storage type that there is not, or a plan that no bank holds
    """
    return _key(_identity(dataset, encoder, plan, dtype))


def build(
    dataset: Dataset,
    encoder: object,
    plan: Plan,
    root: str | os.PathLike | None = None,
    executor: str = "local",
    on_error: str = "raise",
    dtype: str = "float16",
    shard: int | None = None,
    progress: bool | None = None,
    address: str = "auto",
    workers: int | None = None,
    gpus: float = 0.0,
) -> Bank:
    """Encode a data set's images and crops once; a bank that is already finished is opened and returned at once.

    Args:
        dataset: whose pictures
        encoder: from `encode.load`
        plan: which crops
        root: folder or fsspec URL under which banks lie, None for `paths.bank()`. Of two builders at once the second
            waits, but not when they are on two machines and the root is a URL: they do the same work twice
        executor: "local", or "ray" to spread the shards over a Ray cluster (extra [cluster])
        on_error: "raise" stops at the first unreadable picture, "skip" lists it in the manifest and leaves it out;
            a picture that is listed there and has become readable since is encoded now
        dtype: "float16" or "float32", of the embeddings on disk
        shard: images a file, a multiple of `shards.BATCH`; at most this many are encoded again after a kill. None: 64,
            or 512 on a GPU
        progress: show a bar of crops, and at the end what they waited for; None where a terminal is looking
        address: of the Ray cluster
        workers: encoder actors, None for as many as the cluster's free processors or GPUs can hold
        gpus: share of a GPU an actor asks for

    Returns:
        the finished bank

    Raises:
        ValueError: an argument is not one of those above, or a picture is unreadable and on_error is "raise"
        BankError: Ray lost its workers again and again
        OSError: the root cannot be written
    """
    for name, value, known in (("executor", executor, ("local", "ray")), ("on_error", on_error, ("raise", "skip"))):
        if value not in known:
            raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(map(repr, known))}")
    if shard is None:
        shard = shards.STREAMED_SHARD if shards.streams(encoder) else shards.SHARD
    if shard < 1 or shard % shards.BATCH:
        raise ValueError(f"shard is {shard} images: it must be a multiple of {shards.BATCH}, the images of one batch")
    if len(dataset) == 0:
        raise ValueError(f"data set {dataset.name} ({dataset.split}) has no images")
    identity = _identity(dataset, encoder, plan, dtype)
    home, name = stores.locate(root), _key(identity)
    folder = home.join(name)
    stores.refuse_link(folder)
    work = shards.Work(dataset, encoder, plan, dtype, on_error, folder, _compiles(dataset, encoder, plan))
    waited = Counter()
    spread = (
        partial(cluster.spread, work, address, workers, gpus) if executor == "ray" else partial(_here, work, waited)
    )

    manifest = _finished(folder, dataset)
    if manifest is None:
        with stores.lock(home, name):
            manifest = _finished(folder, dataset)  # the builder that we waited for may have finished it
            if manifest is None:
                manifest = _fill(work, identity, shard, progress, spread, waited)
    _check_errors(manifest, on_error)
    return Bank(folder, manifest, dataset.label)


def open(root: str | os.PathLike | None, dataset: Dataset, encoder: object, plan: Plan, dtype: str = "float16") -> Bank:
    """The finished bank of these features; the sizes of its files are checked, `verify` checks every byte.

    Args:
        root: under which the bank lies, a folder or an address; None is the cache
        dataset: as in `key`
        encoder: as in `key`
        plan: as in `key`
        dtype: as in `key`

    Raises:
        ValueError: as `key`
        BankError: there is none, it is unfinished, or a shard is missing or cut short
    """
    name = key(dataset, encoder, plan, dtype)
    folder = stores.locate(root).join(name)
    manifest = manifest_of(folder)
    if damage := wrong_sizes(folder, manifest):
        raise _damaged(folder, damage)
    _check_errors(manifest, "skip")
    return Bank(folder, manifest, dataset.label)


def _identity(dataset: Dataset, encoder: object, plan: Plan, dtype: str) -> dict:
    if dtype not in shards.DTYPE:
        raise ValueError(f"dtype is {dtype!r}: a bank stores {' or '.join(shards.DTYPE)}")
    for steps in (min(plan.steps, 1), 2):  # a plan that suits no picture is refused, its factor too
        crops.plan_boxes(plan._replace(n=min(plan.n, 1), steps=steps), 32, 32, "")
    if plan.cls and plan.steps > 1:
        raise ValueError(f"a ladder of {plan.steps} steps keeps no [CLS] tokens: set steps=1 or cls=False in {plan}")
    if plan.cls:
        encoder.check_cls()
    return {
        "layout": LAYOUT,
        "dataset": {"name": dataset.name, "split": dataset.split, "fingerprint": dataset.fingerprint},
        "encoder": {
            "fingerprint": encoder.fingerprint,
            "precision": encoder.precision,
            "image_size": int(encoder.image_size),
            "mean": [float(x) for x in encoder.mean],
            "std": [float(x) for x in encoder.std],
            "squash": bool(encoder.squash),
            **({"compiled": True} if _compiles(dataset, encoder, plan) else {}),
        },
        "preprocessing": shards.PREPROCESSING,
        "plan": {**plan._asdict(), "scale": [float(x) for x in plan.scale], "factor": float(plan.factor)},
        "dtype": dtype,
        "batch": {
            **({} if getattr(encoder, "whole_batches", False) else {"images": shards.BATCH}),
            "crops": int(encoder.batch_size),
        },
    }


def _key(identity: dict) -> str:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    names = "-".join(re.sub(r"[^\w]+", "_", identity["dataset"][part]) for part in ("name", "split"))
    return f"{names}-{digest[:20]}"


def _compiles(dataset: Dataset, encoder: object, plan: Plan) -> bool:
    """Whether the encoder runs compiled, which rounds otherwise, also when it goes on with a build."""
    return hasattr(encoder, "compiles") and encoder.compiles(len(dataset) * (1 + plan.n * plan.steps))


def _here(work: shards.Work, waited: Counter, todo: list[tuple[int, int]], advance) -> list[dict]:
    """The shards, made in this process; what it waited for goes into `waited`, in seconds."""
    before, start = Counter(getattr(work.encoder, "spent", {})), time.perf_counter()
    entries = shards.make(work, todo, advance, waited)
    waited.update(Counter(getattr(work.encoder, "spent", {})) - before)
    waited.setdefault("encoding", time.perf_counter() - start - waited.total())
    return entries


def _account(waited: Counter, crops: int, seconds: float) -> str:
    """What a build spent its time on; on a GPU cutting and encoding go on while this process waits."""
    shares = ", ".join(f"{name} {share / seconds:.0%}" for name, share in waited.most_common())
    return f"{crops / seconds:,.0f} crops/s; of the time {shares}: the bottleneck was {waited.most_common(1)[0][0]}"


def _fill(work: shards.Work, identity: dict, size: int, progress: bool | None, spread, waited: Counter) -> dict:
    """Encode what is missing, write the manifest, return it."""
    dataset, plan, folder = work.dataset, work.plan, work.folder
    with stores.writing(folder):
        folder.files.makedirs(folder.path, exist_ok=True)
    done = _survivors(folder, dataset)
    if work.on_error == "raise":
        _check_errors({"errors": _listed(done, dataset)}, work.on_error)
    todo, position = [], 0
    for start, stop in [(entry["start"], entry["stop"]) for entry in done] + [(len(dataset), None)]:
        todo += shards.cut(dataset, position, start, size)
        position = stop
    each = plan.n * plan.steps
    with tqdm(
        desc=f"{dataset.name} {dataset.split}",
        total=len(dataset) * each,
        initial=sum(entry["stop"] - entry["start"] for entry in done) * each,
        unit="crop",
        disable=None if progress is None else not progress,
    ) as bar:
        start = time.perf_counter()
        done += spread(todo, lambda images: bar.update(images * each))
        if waited and not bar.disable:
            made = sum(stop - first for first, stop in todo) * each
            bar.write(_account(waited, made, time.perf_counter() - start), file=sys.stderr)
    done.sort(key=lambda entry: entry["start"])
    if not any(entry["count"] for entry in done):
        raise ValueError(f"none of the {len(dataset)} pictures of {dataset.name} ({dataset.split}) can be read")
    manifest = {
        "identity": identity,
        "images": len(dataset),
        "errors": _listed(done, dataset),
        "shards": [{name: value for name, value in entry.items() if name != "errors"} for entry in done],
    }
    stores.write(folder, MANIFEST, paths.seal(manifest))
    return paths.unseal(stores.read(folder, MANIFEST))


def _survivors(folder: Store, dataset: Dataset) -> list[dict]:
    """The intact shards of an earlier build, in order; other shards, and halves of them, are removed.

    A shard that lists a picture as unreadable, which can be read now, is not one of them.
    """
    kept, position = [], 0
    for name in sorted(stores.sizes(folder)):
        match = stores.SHARD_NAME.fullmatch(name)
        start, stop = map(int, match.groups()) if match else (-1, -1)
        if position <= start < stop <= len(dataset):
            content = stores.read(folder, name)
            errors = stores.unpack_errors(content, folder.name)
            if errors is not None and not any(_is_readable(dataset, i) for i in errors):
                kept.append(shards.entry(start, stop, content, errors))
                position = stop
                continue
        if stores.OWN.fullmatch(name):
            with stores.writing(folder):
                folder.files.rm_file(folder.join(name).path)
    return kept


def _listed(entries: list[dict], dataset: Dataset) -> list[dict]:
    errors = {i: reason for entry in entries for i, reason in entry["errors"].items()}
    return [{"index": i, "key": dataset.key[i], "error": errors[i]} for i in sorted(errors)]


def _check_errors(manifest: dict, on_error: str) -> None:
    if not (errors := manifest["errors"]):
        return
    shown = "; ".join(f"{row['key']}: {row['error']}" for row in errors[:5]) + ("; ..." if len(errors) > 5 else "")
    if on_error == "raise":
        raise ValueError(
            f"{len(errors)} pictures cannot be read ({shown}): mend them and build again, or pass on_error='skip' to "
            "leave them out of every result"
        )
    warnings.warn(
        f"{len(errors)} pictures cannot be read and are left out of every result ({shown}): once they are mended, the "
        "next build encodes them",
        stacklevel=3,
    )


def _is_readable(dataset: Dataset, i: int) -> bool:
    try:
        dataset.load(i)
    except ImageError:
        return False
    return True


def _finished(folder: Store, dataset: Dataset) -> dict | None:
    """The manifest of a finished bank; None when there is work to do, said loudly when it had been finished once."""
    if MANIFEST not in stores.sizes(folder):
        return None
    try:
        manifest = manifest_of(folder)
        if damage := wrong_sizes(folder, manifest):
            raise _damaged(folder, damage)
    except BankError as error:
        warnings.warn(f"{error}. That is done now", stacklevel=3)
        return None
    if mended := [row["key"] for row in manifest["errors"] if _is_readable(dataset, row["index"])]:
        warnings.warn(f"pictures that could not be read are encoded now: {', '.join(mended[:5])}", stacklevel=3)
        return None
    return manifest


def manifest_of(folder: Store) -> dict:
    """The manifest of a finished bank.

    Raises:
        BankError: there is none, or it is damaged
    """
    files = stores.sizes(folder)
    if MANIFEST not in files:
        done = sum(stores.SHARD_NAME.fullmatch(name) is not None for name in files)
        state = f"is unfinished ({done} shards are there)" if files else "does not exist"
        raise BankError(f"bank {folder} {state}: run bank.build, or `upclose bank build`, with the same arguments")
    if (manifest := paths.unseal(stores.read(folder, MANIFEST))) is None:
        raise BankError(f"the manifest of bank {folder} is damaged: build again, which reuses every intact shard")
    if _key(manifest["identity"]) != folder.name:
        raise BankError(f"bank {folder} holds the manifest of another bank: remove the folder and build again")
    return manifest


def wrong_sizes(folder: Store, manifest: dict) -> list[dict]:
    """The shards that are missing or have another size than the manifest says, as in `verify`."""
    files = stores.sizes(folder)
    return [
        {
            "shard": shard["name"],
            "reason": f"it has {files[shard['name']]} bytes instead of {shard['bytes']}"
            if shard["name"] in files
            else "the file is missing",
        }
        for shard in manifest["shards"]
        if files.get(shard["name"]) != shard["bytes"]
    ]


def _damaged(folder: Store, damage: list[dict]) -> BankError:
    listed = "; ".join(f"{row['shard']}: {row['reason']}" for row in damage[:5])
    more = f" and {len(damage) - 5} more" if len(damage) > 5 else ""
    return BankError(
        f"bank {folder} is damaged ({listed}{more}): `upclose bank verify --mend {folder.path.rsplit('/', 1)[-1]}` "
        "removes the damaged shards, and the next build encodes them again"
    )


_CHECKED: set[tuple] = set()  # files whose checksum this process has found right: path, size, time, checksum


def _content(folder: Store, shard: dict) -> bytes:
    """The bytes of a shard, compared with its checksum when this process reads the file first."""
    path = _on_this_machine(folder, shard)
    with Path(path).open("rb") as file:
        facts = os.fstat(file.fileno())
        content = file.read()
    seen = (path, facts.st_size, facts.st_mtime_ns, shard["sha256"])
    if seen not in _CHECKED:
        if hashlib.sha256(content).hexdigest() != shard["sha256"]:
            raise BankError("its bytes are not those that were written (checksum)")
        _CHECKED.add(seen)
    return content


def _on_this_machine(folder: Store, shard: dict) -> str:
    """The path of a shard on this machine: of a remote one a copy in the cache, named by its checksum."""
    if folder.local:
        return folder.join(shard["name"]).path
    copy = cached_copy(shard)
    if not copy.exists():
        content = stores.read(folder, shard["name"])
        if hashlib.sha256(content).hexdigest() != shard["sha256"]:
            raise BankError("its bytes are not those that were written (checksum)")
        copy.parent.mkdir(parents=True, exist_ok=True)
        stores.write(stores.locate(copy.parent), copy.name, content)
    return str(copy)


def cached_copy(shard: dict) -> Path:
    """Where this machine keeps its copy of a remote shard."""
    return paths.cache() / "shards" / f"{shard['sha256']}.safetensors"
