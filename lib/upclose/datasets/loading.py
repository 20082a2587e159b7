"""Data sets by name: Birdlets, every data set of the five papers in its official layout, anybody's pictures.

`load` reads what is on the disk and checks it against the registry; nothing is downloaded (`archives` does).
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from upclose import birdlets, paths
from upclose.datasets import adapters, archives, registry, tars
from upclose.datasets.adapters import Items, Record
from upclose.datasets.encoded import Encoded
from upclose.features import Dataset
from upclose.images import ImageError, begins, load_image

END = 2**16  # bytes at either end of a picture that its folder's fingerprint holds


class CountWarning(UserWarning):
    """A data set holds another number of pictures than the registry says."""


class FolderWarning(UserWarning):
    """Something in a folder of one's own pictures is probably not what was meant."""


class Listed:
    """A data set whose pictures lie on the disk. See `upclose.features.Dataset`.

    Args:
        name, split: of the data set
        items: what it holds
        root: keys are paths relative to it

    Raises:
        FileNotFoundError: a picture of the list is not there
        ValueError: a file's name is not UTF-8
    """

    def __init__(self, name: str, split: str, items: Items, root: Path):
        self.name, self.split, self.root = name, split, root
        self.class_names = list(items.class_names)
        self.files = items.files
        self.label = np.asarray(items.label, dtype=np.int64)
        self.domain = None if items.domain is None else np.asarray(items.domain, dtype=np.int64)
        self.domain_names = list(items.domain_names)
        self.key = [_key(file, root) for file in self.files]
        self.fingerprint = _fingerprint(self)

    def __len__(self) -> int:
        return len(self.files)

    def load(self, i: int) -> Tensor:
        """Picture i, uint8 (3, H, W).

        Raises:
            upclose.images.ImageError: it cannot be read
        """
        file = self.files[i]
        if isinstance(file, Record):
            pixels = np.fromfile(file.file, dtype=np.uint8, count=3072, offset=file.offset)
            return torch.from_numpy(pixels.reshape(3, 32, 32))
        return load_image(file)

    def select(self, index: Sequence[int] | np.ndarray) -> Listed:
        """The same data set with some of its items, in the order of `index`."""
        part = lambda values: None if values is None else [values[int(i)] for i in index]  # noqa: E731
        items = Items(
            part(self.files), part(self.label), self.class_names, None, part(self.domain), tuple(self.domain_names)
        )
        return Listed(self.name, self.split, items, self.root)


def _key(file: Path | Record, root: Path) -> str:
    if isinstance(file, Record):
        return f"{_key(file.file, root)}@{file.offset}"
    return Path(os.path.relpath(file, root)).as_posix()


def _fingerprint(data: Listed) -> str:
    digest = hashlib.sha256(repr([data.name, data.split, data.class_names, data.domain_names]).encode())
    missing = []
    sizes: dict[Path, int] = {}
    domain = np.zeros(len(data), int) if data.domain is None else data.domain
    for file, key, label, part in zip(data.files, data.key, data.label, domain):
        path = file.file if isinstance(file, Record) else file
        try:
            size = sizes[path] if path in sizes else sizes.setdefault(path, os.stat(path).st_size)
        except (FileNotFoundError, NotADirectoryError):
            missing.append(path)
            continue
        try:
            digest.update(f"{key}\x1f{size}\x1f{label}\x1f{part}\n".encode())
        except UnicodeEncodeError:
            raise ValueError(f"{data.name}: the file name {os.fsencode(key)!r} is not UTF-8: rename it") from None
        if data.name == "imagefolder":  # two folders of uncompressed pictures may have equal names and sizes
            digest.update(_ends(path, size))
    if missing:
        raise FileNotFoundError(
            f"{data.name} {data.split}: {len(missing)} of {len(data)} listed pictures are not there, the first is "
            f"{missing[0]}; unpack the archive again"
        )
    return digest.hexdigest()[:32]


def _ends(path: Path, size: int) -> bytes:
    """The first and the last 64 KiB of a file, or all of a smaller one."""
    with path.open("rb") as file:
        start = file.read(2 * END)
        if size <= 2 * END:
            return start
        file.seek(size - END)
        return start[:END] + file.read(END)


def load(
    name: str,
    split: str = "test",
    root: str | Path | None = None,
    limit: int | None = None,
    protocol: str | None = None,
    domain: str | None = None,
    **options,
) -> Dataset:
    """A data set of the registry, "birdlets", or one's own.

    That is "imagefolder:PATH", a folder a class, "webdataset:PLACE" (see `tars`) or "features:FILE" (`encoded`).

    Args:
        name: of the data set
        split: "test", "validation" or "train"
        root: the folder that holds the data sets' folders; None for `paths.data()`
        limit: only so many items: every (n / limit)-th of the list, so that no class is left out that need not be
        protocol: whose split; None or "" for the registry's default
        domain: one of the data set's domains, several joined by "+", or "all"; None for the default
        options: Birdlets' are those of `birdlets.dataset`

    Raises:
        ValueError: an unknown data set, split, protocol, domain or option; classes that are not the registry's
        FileNotFoundError: its folder, a list or a picture is not there; says how to get it

    Warns:
        CountWarning: it holds another number of items than the registry says
    """
    if split not in registry.SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(registry.SPLITS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: a data set needs at least one item")
    if name == "birdlets":
        given = {"domain": domain} if domain else {}
        return birdlets.dataset(split, **given, **({"n": limit} if limit else {}), **options)
    if options:
        raise ValueError(f"{name} has no option {next(iter(options))!r}; it takes root, limit, protocol and domain")
    if name.startswith("imagefolder:"):
        data = _imagefolder(Path(name.partition(":")[2]).expanduser(), split)
    elif name.startswith("features:"):
        data = Encoded(Path(name.partition(":")[2]).expanduser(), split)
    elif name.startswith("webdataset:"):
        place = os.path.expanduser(name.partition(":")[2])
        data = tars.open_tars(place, split, str(root or paths.data()), protocol)
    else:
        data = _registered(registry.entry(name, protocol), split, Path(root) if root else paths.data(), domain)
    if limit and limit < len(data):
        data = data.select(np.arange(limit) * len(data) // limit)
    return data


def _imagefolder(folder: Path, split: str) -> Listed:
    """PATH/class/*.jpg, or PATH/split/class/*.jpg where PATH holds folders of splits only."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; imagefolder:PATH needs one folder a class in PATH")
    found = set(adapters.class_folders(folder))
    if found and found <= {*registry.SPLITS, "val"}:  # else a class may be called "train"
        inside = "val" if split == "validation" and "validation" not in found else split
        if inside not in found:
            raise FileNotFoundError(
                f"all folders of {folder} are called like splits and taken for splits: {', '.join(sorted(found))}; "
                f"there is no {split!r}"
            )
        folder = folder / inside
    items = adapters.from_folders(folder, _names(folder))
    if not items.files:
        raise ValueError(f"{folder} holds no pictures; imagefolder:PATH needs one folder a class, PATH/class/*.jpg")
    adapters.check(items, f"imagefolder:{folder}")
    _report(folder, items)
    return Listed("imagefolder", split, items, folder)


def _names(folder: Path) -> dict[str, str]:
    """Class folder -> class name: what `classes.json` or `classes.txt` says, ImageNet's names, or the folders'.

    Raises:
        ValueError: the file does not name every folder
    """
    folders, known = adapters.class_folders(folder), registry.imagenet_classes()
    if given := _given(folder):
        if unnamed := [name for name in folders if name not in given]:
            raise ValueError(f"the file of class names in {folder} has no line for {unnamed[0]!r}: add it")
        return {name: given[name] for name in folders}
    names = {name: adapters.words(name) for name in folders}
    if 2 * len(ids := [name for name in folders if name in known]) > len(folders):
        warnings.warn(
            f"{len(ids)} of {len(folders)} folders of {folder} are WordNet ids: ImageNet's names are taken, "
            f"{known[ids[0]]!r} for {ids[0]}",
            FolderWarning,
            stacklevel=4,
        )
        return names | {name: known[name] for name in ids}
    if 2 * sum(name.isdecimal() for name in names.values()) > len(folders):
        warnings.warn(
            f"the folders of {folder} are numbers, which no encoder knows: put a classes.txt beside them with a line "
            'a class, \'0 great tit\', or a classes.json, {"0": "great tit"}',
            FolderWarning,
            stacklevel=4,
        )
    return names


def _given(folder: Path) -> dict[str, str]:
    if (file := folder / "classes.json").is_file():
        try:
            table = json.loads(file.read_text(encoding="utf-8-sig"))
            return {str(key): adapters.words(value) for key, value in table.items()}
        except (ValueError, AttributeError, TypeError, RecursionError):
            raise ValueError(f'{file} must map folders to class names, {{"0": "great tit"}}') from None
    if (file := folder / "classes.txt").is_file():
        rows = [line.split(maxsplit=1) for line in adapters.lines(file)]
        if short := [row[0] for row in rows if len(row) < 2]:
            raise ValueError(f"{file}: the line {short[0]!r} must be a folder and its class's name, '0 great tit'")
        return {key.removeprefix("\ufeff"): adapters.words(name) for key, name in rows}
    return {}


def _report(folder: Path, items: Items) -> None:
    """Say which class folders hold files but no picture, and which pictures have no picture's ending."""
    found: dict[str, list[Path]] = {name: [] for name in items.folders}
    for name, file in zip(items.said, items.files):
        found[name].append(file)
    lost, strays = [], []
    for name, files in found.items():
        others = [p for p in (folder / name).rglob("*") if p.is_file() and not p.name.startswith(".")]
        strays += [p for p in others if p.suffix.lower() not in adapters.SUFFIXES and begins(p)]
        if others and not any(map(begins, files)):
            lost.append(name)
    if passed := sorted(adapters.SYSTEM & {child.name for child in folder.iterdir()}):
        said = f"no classes but folders of an operating system, which are passed over: {', '.join(passed)}"
        warnings.warn(f"in {folder} are {said}", FolderWarning, stacklevel=4)
    if lost:
        said = f"{len(lost)} class folders of {folder} hold files but no picture that can be read, the first is "
        warnings.warn(f"{said}{lost[0]!r}: no picture is of these classes", FolderWarning, stacklevel=4)
    if strays:
        said = f"{len(strays)} pictures of {folder} have another ending than a picture's, the first is "
        warnings.warn(
            f"{said}{str(strays[0].relative_to(folder))!r}: they are passed over", FolderWarning, stacklevel=4
        )


def _registered(entry: registry.Entry, split: str, root: Path, domain: str | None) -> Listed:
    if not (expected := getattr(entry, split)):
        there = [name for name in registry.SPLITS if getattr(entry, name)]
        raise ValueError(f"{entry.dataset} ({entry.protocol}) has no split {split!r}; there are {', '.join(there)}")
    folder, where = root / entry.folder, f"{entry.dataset} ({entry.protocol}) {split}"
    if not folder.is_dir():
        raise FileNotFoundError(f"{where} is not at {folder}: {archives.how(entry, root)}, or set UPCLOSE_DATA")
    try:
        items = adapters.read(folder, split, entry)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}: there is no {error.filename}: {archives.how(entry, root)}") from None
    except (RuntimeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{where}: {folder} is not in the official layout ({error}): {archives.how(entry, root)}"
        ) from None
    adapters.check(items, where)
    if len(items.class_names) != entry.classes:
        raise ValueError(
            f"{where}: {folder} has {len(items.class_names)} classes, not {entry.classes}: {archives.how(entry, root)}"
        )
    if entry.domains:
        expected = sum(counts[split == "test"] for counts in entry.domains.values())
    if len(items.files) != expected:
        warnings.warn(f"{where}: {len(items.files):,} pictures, not {expected:,}", CountWarning, stacklevel=3)
    data = Listed(entry.dataset, split, items, root)
    return _of_domains(data, domain) if domain and domain != "all" else data


def _of_domains(data: Listed, domain: str) -> Listed:
    for part in domain.split("+"):
        if part not in data.domain_names:
            raise ValueError(
                f"{data.name} {data.split} has no domain {part!r}; {', '.join(data.domain_names) or 'none'}"
            )
    wanted = [data.domain_names.index(part) for part in domain.split("+")]
    return data.select(np.flatnonzero(np.isin(data.domain, wanted)))


def verify(
    name: str, protocol: str | None = None, root: str | Path | None = None, splits: Sequence[str] = ()
) -> Iterator[str]:
    """Read every picture of a data set and compare its numbers with the registry's.

    Args:
        name: of the data set
        protocol: see `load`
        root: see `load`
        splits: which; all that the registry has when none is named

    Yields:
        what is wrong, a sentence each
    """
    entry = registry.entry(name, protocol)
    for split in splits or [split for split in registry.SPLITS if getattr(entry, split)]:
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", CountWarning)
                data = load(name, split, root, protocol=entry.protocol)
        except (FileNotFoundError, ValueError) as error:
            yield str(error)
            continue
        yield from (str(warning.message) for warning in said)
        for i in tqdm(range(len(data)), f"{name} {split}", disable=None):
            try:
                data.load(i)
            except ImageError as error:
                yield str(error)
