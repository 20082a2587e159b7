"""The archives of the data sets: where they are, what is known of them, how they become the folders that `load` reads.

`published/archives.csv` has a line an archive. Sizes and checksums are what torchvision's sources, TensorFlow Datasets'
lists of checksums and the LADS repository say; where nobody says, the cell is empty, and such a file is taken as it
comes. No published table reads the training pictures of ImageNet and Places365: they are not listed. Nothing here was
run against a real server or on a real archive, for none could be reached.
"""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout
from torchvision.datasets import imagenet

from upclose import fetch, paths, shipped
from upclose.datasets import registry
from upclose.datasets.registry import Entry

PACKED = (".zip", ".tar", ".tar.gz", ".tgz")
DOWNLOADS = "archives"  # the folder below the root in which downloads wait until they are unpacked


class Archive(NamedTuple):
    """A file that a data set is made of.

    Attributes:
        name: as its publisher calls it
        bytes: 0 where nobody says
        digest: "md5:..." or "sha256:...", "" where nobody says
        url: from which it may be downloaded, "" where somebody has to get it by hand
        page: where to get it by hand
        inside: the folder of the archive that becomes the data set's folder
        inner: an archive in the archive that holds them
        gives: what of it is put into the data set's folder, each in the ways that it may be called
    """

    name: str
    bytes: int
    digest: str
    url: str
    page: str
    inside: str
    inner: str
    gives: tuple[tuple[str, ...], ...]


class LackingError(ValueError):
    """Some archives must be got by hand."""


@cache
def _table() -> dict[tuple[str, str], list[Archive]]:
    found: dict[tuple[str, str], list[Archive]] = {key: [] for key in registry.entries()}
    with shipped.checked(paths.PUBLISHED / "archives.csv").open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            dataset, protocols = line.pop("dataset"), line.pop("protocols").split("+")
            line["gives"] = tuple(tuple(part.split("|")) for part in line["gives"].split())
            line["page"] = line["page"] or registry.entry(dataset).homepage
            archive = Archive(**line | {"bytes": int(line["bytes"] or 0)})
            for protocol in protocols:
                found[dataset, protocol].append(archive)
    return found


def of(entry: Entry) -> list[Archive]:
    """The archives of a data set, in the order in which they are unpacked; none where a script has to make it."""
    return _table()[entry.dataset, entry.protocol]


def missing(entry: Entry, root: Path) -> list[Archive]:
    """The archives of which something is not in the data set's folder below a root."""
    folder = root / entry.folder
    return [a for a in of(entry) if not all(any(_there(folder / way) for way in ways) for ways in a.gives)]


def _there(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def command(entry: Entry) -> str:
    """The line that gets a data set."""
    first = entry.protocol == registry.entry(entry.dataset).protocol
    return f"upclose data get {entry.dataset}{'' if first else f' --protocol {entry.protocol}'}"


def how(entry: Entry, root: Path | None = None) -> str:
    """How to get what is missing of a data set, as a clause of a sentence."""
    if not of(entry):
        return f"get {entry.get} ({entry.homepage})"
    lacking = missing(entry, root or paths.data())
    hands = [archive for archive in lacking if not archive.url]
    if not lacking:
        return f"all that `{command(entry)}` puts there is there: remove it and get it again"
    if not hands:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        return f"`{command(entry)}` gets {lacking[0].name}{more}"
    named = f"{' and '.join(archive.name for archive in hands)} by hand from {hands[0].page}"
    rest = " and fetches the rest" if len(hands) < len(lacking) else ""
    return f"get {named}, then `{command(entry)} --from FOLDER` unpacks it{rest}"


# ------------------------------------------------------------------------------------------------------------- getting


def download(
    name: str, root: str | Path | None = None, protocol: str | None = None, source: Path | None = None
) -> Path:
    """Get what is missing of a data set and unpack it: from a folder where it lies there, else from its server.

    What is interrupted goes on at the next call; an archive is there as a whole or not at all.

    Args:
        name: of the data set
        root: see `datasets.load`
        protocol: whose split; None for the registry's default
        source: a folder in which archives lie, called as published or, where size and checksum are known, otherwise

    Returns:
        its folder

    Raises:
        LackingError: an archive has to be got by hand (the others are unpacked); says where from and where to put it
        ValueError: no such data set, or an archive is not what was published
        ConnectionError: a server cannot be reached or says no
        OSError: no room, or no folder
    """
    entry, root = registry.entry(name, protocol), Path(root) if root else paths.data()
    if source and not source.is_dir():
        raise NotADirectoryError(f"--from {source}: there is no such folder")
    if not of(entry):
        raise LackingError(f"{name} ({entry.protocol}) cannot be unpacked from archives alone: {how(entry)}")
    folder, waiting = root / entry.folder, root / DOWNLOADS / name
    with _alone(root, waiting):
        for archive in missing(entry, root):
            if file := _lying(archive, source) if source else None:
                _place(archive, file, folder)
            elif archive.url:
                fetch.room(root, 2 * archive.bytes, f"{archive.name}, packed and unpacked,")
                file = fetch.download(archive.url, waiting / archive.name, archive.bytes, archive.digest)
                _place(archive, file, folder)
                file.unlink()
    if missing(entry, root):
        raise LackingError(f"{name} ({entry.protocol}) is not complete in {folder}: {how(entry, root)}")
    return folder


@contextmanager
def _alone(root: Path, waiting: Path) -> Iterator[None]:
    """Keep other processes from getting data sets into the same root; empty folders of downloads go."""
    root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(root / ".get.lock", timeout=0, mode=paths.mode()):
            try:
                yield
            finally:
                with suppress(OSError):  # it is not there, or a part waits in it
                    waiting.rmdir()
                    waiting.parent.rmdir()
    except Timeout:
        raise OSError(f"another process gets data sets into {root}: wait for it") from None


def _lying(archive: Archive, source: Path) -> Path | None:
    """The file of a folder that is an archive.

    Raises:
        ValueError: a file of its name is not what was published, and no other is
    """
    files = sorted(path for path in source.iterdir() if path.is_file())
    named = [file for file in files if file.name == archive.name]
    known = archive.bytes and archive.digest
    alike = [file for file in files if known and file.name != archive.name and file.stat().st_size == archive.bytes]
    wrong = None
    for file in named + alike:
        try:
            fetch.check(file, archive.bytes, archive.digest)
            return file
        except ValueError as error:
            wrong = wrong or (error if file in named else None)
    if wrong:
        raise wrong
    return None


def _place(archive: Archive, file: Path, folder: Path) -> None:
    """Put an archive's files into the data set's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = [ways[0] for ways in archive.gives]
    if archive.name in _IMAGENET:
        _imagenet(archive, file, folder, *targets)
    elif archive.name.endswith(PACKED):
        fetch.unpack(file, folder, targets, archive.inside, archive.inner)
    else:
        shutil.copyfile(file, folder / f".{targets[0]}.part")
        os.replace(folder / f".{targets[0]}.part", folder / targets[0])


_IMAGENET = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_img_val.tar")


def _imagenet(archive: Archive, file: Path, folder: Path, target: str) -> None:
    """ImageNet's pictures of all classes lie in one folder, and the development kit says whose they are."""
    with fetch.workshop(folder / ".unpacking") as shop:
        (shop / archive.name).symlink_to(file.resolve())
        if archive.name.endswith("val.tar"):
            fetch.room(shop, archive.bytes, f"what {archive.name} holds")
            imagenet.parse_val_archive(shop, wnids=imagenet.load_meta_file(folder)[1])
        else:
            imagenet.parse_devkit_archive(shop)
        os.replace(shop / target, folder / target)


# ------------------------------------------------------------------------------------------------------------- telling


def state(entry: Entry, root: Path) -> str:
    """How much of a data set is there: all ("here"), "in part" or nothing ("missing")."""
    lacking = len(missing(entry, root))
    if not of(entry):
        return "here" if _there(root / entry.folder) else "missing"
    return "here" if not lacking else "missing" if lacking == len(of(entry)) else "in part"


def line(entry: Entry, root: Path) -> str:
    """What is known of a data set, in a line."""
    found = of(entry)
    hands = [archive.name for archive in found if not archive.url]
    blind = [archive.name for archive in found if not archive.digest]
    parts = [
        fetch.total(archive.bytes for archive in found) if found else "by hand",
        f"by hand: {' '.join(hands)}" if hands else "",
        f"no published checksum: {' '.join(blind)}" if blind else "",
        entry.licence,
        entry.homepage,
        str(root / entry.folder),
    ]
    return f"{f'{entry.dataset} ({entry.protocol})':28} {state(entry, root):8} {'; '.join(filter(None, parts))}"


def described(entry: Entry, root: Path) -> Iterator[str]:
    """What is known of a data set, in lines."""
    yield f"{entry.dataset} ({entry.protocol}): {state(entry, root)}, {root / entry.folder}"
    yield f"  licence {entry.licence}, home page {entry.homepage}"
    lacking = missing(entry, root)
    for archive in of(entry):
        here = "missing" if archive in lacking else "here"
        known = f"{archive.bytes:,} bytes" if archive.bytes else "size not published"
        yield f"  {archive.name}: {here}, {known}, {archive.digest or 'checksum not published'}"
        yield f"    {archive.url or f'by hand from {archive.page}'}"
    if lacking or state(entry, root) == "missing":
        yield f"  {how(entry, root)}"
