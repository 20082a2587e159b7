"""Pictures in tar files, on a disk or behind a URL: `webdataset:PLACE`, and the collections of CLIP_benchmark.

A shard's headers are read once: where each picture begins, how long it is, and the number in its `.cls`. That index
lies in the cache under the shard's address, size and tag; a picture is then a range of bytes. So pictures are read in
any order, by any number of threads and machines, and a data set needs some 40 bytes a picture.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import tarfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torchvision.datasets as tv
from fsspec.core import url_to_fs
from torch import Tensor
from tqdm import tqdm

from upclose import paths, shipped
from upclose.datasets import registry
from upclose.datasets.adapters import SUFFIXES, words
from upclose.images import load_image

BLOCK = 2**22  # bytes that are read at once where headers are looked for behind a URL: a request costs as much as 2 MB
READERS = 16  # shards whose headers are read at once
_TAGS = ("ETag", "etag", "Content-MD5", "md5Hash", "Last-Modified", "LastModified", "mtime")
_META = re.compile(r"__[^/]*__($|/)")  # the webdataset library passes over these
_HUB = re.compile(r"(https://[^/]+/datasets/[^/]+/[^/]+)/tree/(.+)")
ALPHABETICAL = ("food101", "dtd", "oxford-pets", "cifar100")  # the official order of their classes


class ShardError(ValueError):
    """A shard that is missing or is not what it should be; the message names it."""


class CollectionWarning(UserWarning):
    """A collection is not the (data set, split) that its name makes one think of."""


class Index(NamedTuple):
    """What a shard holds.

    Attributes:
        key: (k,) bytes, of each sample
        offset, size: (k,) int64, of each picture's bytes in the tar
        label: (k,) int64
    """

    key: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray


class Collection(NamedTuple):
    """A line of `published/wds.csv`: which (data set, protocol, split) a split of a collection is, or why none."""

    collection: str
    split: str
    dataset: str
    protocol: str
    part: str
    note: str


class Keys(Sequence):
    """The keys of pictures, "shard/sample", made when they are asked for."""

    def __init__(self, shards: list[str], shard: np.ndarray, key: np.ndarray):
        self._parts = shards, shard, key

    def __len__(self) -> int:
        return len(self._parts[1])

    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        shards, shard, key = self._parts
        return f"{shards[shard[i]]}/{key[i].decode()}"


class Tars:
    """A data set whose pictures lie in tars. See `upclose.features.Dataset`.

    Attributes:
        tar_starts: positions at which another tar begins; shards of a bank end there
        templates: a prompt ensemble that the pictures bring, each with {c} for a class; none for the registry's data
            sets, which have CLIP's
    """

    domain, domain_names = None, ()

    def __init__(
        self,
        name: str,
        split: str,
        class_names: list[str],
        urls: list[str],
        index: Index,
        shard: np.ndarray,
        templates: tuple[str, ...] = (),
    ):
        """Join what `open_tars` found: shard is (n,) int32, the position in `urls` of each picture's."""
        self.name, self.split, self.class_names, self.urls = name, split, class_names, urls
        self.templates = templates
        self._index, self._shard, self.label = index, shard, index.label
        split_urls = [url.split("/") for url in urls]
        shared = (k for k, parts in enumerate(zip(*split_urls)) if len(set(parts)) > 1)
        depth = next(shared, len(split_urls[0]) - 1)
        names = ["/".join(parts[depth:]).removesuffix(".tar") for parts in split_urls]  # the same wherever they lie
        self.key = Keys(names, shard, index.key)
        self.tar_starts = np.flatnonzero(np.diff(shard, prepend=-1)).tolist()
        digest = hashlib.sha256(repr([name, split, class_names, names, *templates]).encode())
        for array in (shard, index.size, index.label):
            digest.update(np.ascontiguousarray(array))
        for keys in np.array_split(index.key, len(index.key) // 2**20 + 1):
            digest.update(b"\0".join(keys.tolist()))
        self.fingerprint = digest.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.label)

    def load(self, i: int) -> Tensor:
        """Picture i, uint8 (3, H, W).

        Raises:
            upclose.images.ImageError: it cannot be read
            ShardError: the shard is not what it was when its headers were read
        """
        return load_image(self.key[i], self.content(i))

    def content(self, i: int) -> bytes:
        """The bytes of picture i, as they stand in the tar."""
        url, start, size = self.urls[self._shard[i]], int(self._index.offset[i]), int(self._index.size[i])
        files, path = url_to_fs(url)
        content = files.cat_file(path, start, start + size)
        if len(content) != size:
            raise ShardError(
                f"{url} gave {len(content):,} bytes for the {size:,} of {self.key[i]!r}: it has become shorter, or its "
                "server does not answer requests for a range"
            )
        return content

    def select(self, index: Sequence[int] | np.ndarray) -> Tars:
        """The same data set with some of its pictures, in the order of `index`."""
        chosen = Index(*(part[index] for part in self._index))
        return Tars(self.name, self.split, self.class_names, self.urls, chosen, self._shard[index], self.templates)


# ------------------------------------------------------------------------------------------------------------ a place


def open_tars(place: str, split: str, root: str | os.PathLike, protocol: str | None = None) -> Tars:
    """What `webdataset:PLACE` stands for.

    Args:
        place: shards with numbers in braces, "s3://bucket/train-{000..127}.tar", whose `classnames.txt` lies beside
            them or one folder up; or a folder in CLIP_benchmark's layout, `<split>/nshards.txt`, `<split>/0.tar` and so
            on, and `classnames.txt`; a `zeroshot_classification_templates.txt` beside the names is read too
        split: of a folder; shards that are named are whatever split one says
        root: below which a folder is looked for that is not there
        protocol: that a registered collection must be of, None for any

    Raises:
        FileNotFoundError: no shards, or no list of classes
        ShardError: a shard is missing, no tar, cut short, or has a sample without a label or with two pictures
        ValueError: classes in another order than the registry's, another protocol, or a template without one {c}

    Warns:
        CollectionWarning: what it is, where its name makes one think of something else
    """
    urls, folder, collection = _shards(place, split, root)
    urls = sorted(urls, key=_natural)
    if twice := [url for url, other in pairwise(urls) if url == other]:
        raise ShardError(f"{twice[0]} is named twice")
    found = list(_indexes(urls))
    shard = np.repeat(np.arange(len(urls), dtype=np.int32), [len(index.key) for index in found])
    index = Index(*(np.concatenate(parts) for parts in zip(*found)))
    names = _class_names(folder)
    _check_labels(urls, found, len(names))
    name, templates = collection or "webdataset", ()
    if entry := _registered(collection, split, protocol):
        name, names = entry.dataset, _in_order(entry, names, place)
        if (expected := getattr(entry, _known(collection, split).part)) != len(shard):
            warnings.warn(
                f"{place} {split}: {len(shard):,} pictures, not {expected:,}", CollectionWarning, stacklevel=3
            )
    else:
        templates = _templates(folder)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{place}: two classes are called {twice!r}")
    return Tars(name, split, names, urls, index, shard, templates)


def _shards(place: str, split: str, root: str | os.PathLike) -> tuple[list[str], list[str], str]:
    """The shards, the folders in which their class names may be, and the name of a collection."""
    if "{" in place or place.endswith(".tar"):
        urls = _library().shardlists.expand_urls(place)
        folder = urls[0].rpartition("/")[0] or "."
        above = folder.rpartition("/")[0] or "."
        return urls, [folder] if above.endswith("/") else [folder, above], ""  # nothing is above http://host
    if hub := _HUB.fullmatch(place.rstrip("/")):
        place = f"{hub[1]}/resolve/{hub[2]}"
        collection = hub[1].rpartition("/")[2]
    else:
        place = place.rstrip("/")
        if "://" not in place and not os.path.isdir(place):
            place = os.path.join(root, place)
        collection = place.rpartition("/")[2]
    files = {"test": ["test"], "train": ["train"], "validation": ["validation", "val"]}[split]
    for inside in files:
        if (said := _text(f"{place}/{inside}/nshards.txt")) is not None:
            if not said.strip().isdecimal() or not int(said):
                raise ShardError(f"{place}/{inside}/nshards.txt says {said[:40]!r} and not how many shards there are")
            return [f"{place}/{inside}/{k}.tar" for k in range(int(said))], [place], collection
    raise FileNotFoundError(
        f"there is no {place}/{files[0]}/nshards.txt: webdataset:PLACE is a folder in CLIP_benchmark's layout, or "
        "shards with their numbers in braces, PLACE/{000..127}.tar"
    )


@cache
def _library() -> ModuleType:
    try:
        import webdataset
    except ImportError as error:
        raise ImportError('shards need the webdataset library: pip install "upclose[webdataset]"') from error
    return webdataset


def _natural(url: str) -> list:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", url)]


def _text(url: str) -> str | None:
    files, path = url_to_fs(url)
    try:
        return files.cat_file(path).decode("utf-8-sig")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise ValueError(f"{url} is not UTF-8: save it as UTF-8") from None


def _lines(folders: list[str], name: str) -> list[str]:
    """The lines of a file in the first folder that has it, none where there is none."""
    for folder in folders:
        if (said := _text(f"{folder}/{name}")) is not None:
            if said.lstrip().startswith("<"):
                raise ValueError(f"{folder}/{name} is a page: the server gave it in the file's place")
            return [line.strip() for line in said.splitlines() if line.strip()]
    return []


def _class_names(folders: list[str]) -> list[str]:
    if not (lines := _lines(folders, "classnames.txt")):
        raise FileNotFoundError(
            f"there is no {folders[0]}/classnames.txt with names: write one, a line a class, in the labels' order"
        )
    return [words(line) for line in lines]


def _templates(folders: list[str]) -> tuple[str, ...]:
    lines = _lines(folders, "zeroshot_classification_templates.txt")
    for line in lines:
        if not re.fullmatch(r"[^{}]*\{c\}[^{}]*", line):
            raise ValueError(f"zeroshot_classification_templates.txt of {folders[0]}: {line!r} has not one {{c}}")
    return tuple(lines)


def _check_labels(urls: list[str], found: list[Index], classes: int) -> None:
    for url, index in zip(urls, found):
        if len(wrong := np.flatnonzero((index.label < 0) | (index.label >= classes))):
            key, label = index.key[wrong[0]].decode(), index.label[wrong[0]]
            raise ValueError(f"{url}: {key!r} has label {label}, outside the {classes} classes of classnames.txt")


# -------------------------------------------------------------------------------------------------------- the registry


@cache
def collections() -> dict[tuple[str, str], Collection]:
    """(collection, split) -> what it is, of all collections whose data set is registered."""
    with shipped.checked(paths.PUBLISHED / "wds.csv").open(newline="", encoding="utf-8") as file:
        return {(line["collection"], line["split"]): Collection(**line) for line in csv.DictReader(file)}


def _known(collection: str, split: str) -> Collection | None:
    return collections().get((collection.removesuffix(f"_{split}"), split))


def _registered(collection: str, split: str, protocol: str | None) -> registry.Entry | None:
    """The registry's entry that a split of a collection equals."""
    if not (known := _known(collection, split)):
        if protocol:
            raise ValueError(f"nothing says of which protocol the {split} split of {collection!r} is; ask for none")
        return None
    same = known.protocol.split("+")
    if not known.part or (protocol and protocol not in same):
        what = f"is {known.dataset} of {' and '.join(same)}" if known.part else f"is no {known.dataset} of the registry"
        said = f"{collection} {split} {what}" + (f": {known.note}" if known.note else "")
        if protocol:
            raise ValueError(f"{said}; it was asked for as {protocol!r}")
        warnings.warn(f"{said}; its results are not those of a published table", CollectionWarning, stacklevel=4)
        return None
    entry = registry.entry(known.dataset, protocol or same[0])
    if (usual := registry.entry(known.dataset).protocol) not in same and not protocol:
        warnings.warn(
            f"{collection} {split} is {known.dataset} of {' and '.join(same)}, not of {usual!r}, on which most papers "
            "report",
            CollectionWarning,
            stacklevel=4,
        )
    return entry


def _in_order(entry: registry.Entry, names: list[str], place: str) -> list[str]:
    """The names of a collection's classes, or the registry's own of all of ImageNet, if both have one order.

    Raises:
        ValueError: another number of classes, or two that stand the other way round
    """
    if len(names) != entry.classes:
        raise ValueError(f"{place}: {len(names)} class names, but {entry.dataset} has {entry.classes} classes")
    imagenet = list(registry.imagenet_classes().values()) if entry.dataset.startswith("imagenet") else []
    known = imagenet or (sorted(names, key=_folded) if entry.dataset in ALPHABETICAL else [])
    known = list(tv.Flowers102.classes) if entry.dataset == "flowers102" else known
    known = sorted(names) if entry.dataset == "fgvc-aircraft" else known  # capitals first
    folded = [_folded(name) for name in names]
    theirs, ours = Counter(folded), Counter(map(_folded, known))  # a name that two classes share tells nothing
    position = {name: k for k, name in enumerate(map(_folded, known)) if theirs[name] == ours[name] == 1}
    found = [(position[fold], name) for fold, name in zip(folded, names) if fold in position]
    for (before, name), (after, other) in pairwise(found):
        if before >= after:
            raise ValueError(
                f"{place}: {name!r} stands before {other!r}, and in {entry.dataset} after it: the class order is wrong"
            )
    return imagenet if len(imagenet) == len(names) else names


def _folded(name: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", name.casefold()))


# ----------------------------------------------------------------------------------------------------------- the index


def _indexes(urls: list[str]) -> Iterator[Index]:
    """The index of every shard, once all are there."""
    with ThreadPoolExecutor(READERS) as pool:
        facts = list(pool.map(_facts, urls))
        if missing := [url for url, fact in zip(urls, facts) if fact is None]:
            raise ShardError(
                f"{len(missing)} of {len(urls)} shards are not there, the first is {missing[0]}: get it, or name the "
                "shards that there are"
            )
        yield from tqdm(pool.map(_index, urls, facts), "headers", len(urls), unit="shard", disable=None, leave=False)


def _facts(url: str) -> dict | None:
    """The size and the tag of a file, None where there is none."""
    files, path = url_to_fs(url)
    try:
        info = files.info(path)
    except FileNotFoundError:
        return None
    return {"size": info["size"]} | {tag: str(info[tag]) for tag in _TAGS if info.get(tag)}


def _index(url: str, facts: dict) -> Index:
    name = hashlib.sha256(json.dumps([url, facts], sort_keys=True).encode()).hexdigest()
    file = paths.cache() / "tars" / f"{name}.npz"
    if len(facts) > 1:  # without a tag a changed shard could not be told
        try:
            with np.load(file, allow_pickle=False) as kept:
                return Index(**kept)
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile):
            pass
    found = read_headers(url, facts["size"])
    if len(facts) > 1:
        np.savez(packed := io.BytesIO(), **found._asdict())
        file.parent.mkdir(parents=True, exist_ok=True)
        paths.write(file, packed.getvalue())
    return found


def read_headers(url: str, size: int | None) -> Index:
    """The index of a tar, by its headers and its labels alone.

    Args:
        url: of the tar, not compressed
        size: in bytes, None where the server does not say

    Raises:
        ShardError: no tar, cut short, or a sample that has no label or not one picture
    """
    files, path = url_to_fs(url)
    rows: dict[str, list] = {}
    with files.open(path, "rb", block_size=BLOCK) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while member := tar.next():
                    tar.members = []  # which would grow with the tar
                    _enter(rows, tar, member, url)
                end = tar.offset
        except tarfile.TarError as error:
            file.seek(0)
            raise ShardError(_no_tar(url, file.read(16), error)) from error
        file.seek(end)
        if not file.read(1):
            raise ShardError(
                f"{url} is cut short: its end of {size or 'unknown'} bytes comes before the tar's. Get it again"
            )
    for key, (pictures, _, _, label) in rows.items():
        if pictures != 1 or label is None:
            what = f"{pictures} pictures" if pictures != 1 else "no label, a file .cls"
            raise ShardError(
                f"{url}: the sample {key!r} has {what}; a sample is one picture and one .cls with a number"
            )
    columns = [[row[k] for row in rows.values()] for k in (1, 2, 3)]
    return Index(np.array([key.encode() for key in rows], dtype=bytes), *(np.array(x, dtype=np.int64) for x in columns))


def _enter(rows: dict[str, list], tar: tarfile.TarFile, member: tarfile.TarInfo, url: str) -> None:
    """A file of a tar: [pictures, offset, size, label] of its sample."""
    key, ending = _library().tariterators.base_plus_ext(member.name)
    if not member.isreg() or key is None or _META.match(member.name):
        return
    row = rows.setdefault(key, [0, 0, 0, None])
    if f".{ending.lower()}" in SUFFIXES:
        if member.issparse():
            raise ShardError(f"{url}: {member.name!r} is stored with holes, which are not read: write the tar anew")
        row[:3] = row[0] + 1, member.offset_data, member.size
    elif ending.lower() == "cls":
        said = tar.extractfile(member).read(32)
        if not re.fullmatch(rb"\s*-?\d{1,9}\s*", said):
            raise ShardError(f"{url}: {member.name!r} says {said!r}, which is no class number")
        row[3] = int(said)


def _no_tar(url: str, start: bytes, error: tarfile.TarError) -> str:
    if start.lstrip().startswith(b"<"):
        return f"{url} is a page and no tar (begins with {start!r}): the server gave it in the file's place"
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return f"{url} is compressed, so that no picture can be read by its place: unpack it to a plain .tar"
    return f"{url} is damaged, cut short or no tar ({error}; begins with {start!r}): get it again"
