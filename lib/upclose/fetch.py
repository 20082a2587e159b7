"""Files from servers and what is packed in them: downloads that go on where they stopped, archives that are distrusted.

Pooch and torchvision download too, but begin a large file anew after every interruption, and unpack what an archive
says wherever it says.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import ssl
import stat
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm.auto import tqdm

BLOCK = 2**20  # bytes that are read at once
PATIENCE = 60  # seconds without a byte
TRIES = 5  # without a byte more, of a download that has begun
_PAGES = (b"<!doctype html", b"<html")
_PAGE = "{} gives a web page and no file: open it in a browser, it says why"


def amount(size: int) -> str:
    """A number of bytes as people say it, "596.3 MiB"; 0 is one that nobody knows."""
    unit, power = next(((u, p) for u, p in (("GiB", 30), ("MiB", 20)) if size >= 2**p), ("KiB", 10))
    return f"{size / 2**power:,.1f} {unit}" if size else "size not known"


def total(sizes: Iterable[int]) -> str:
    """The sum of some numbers of bytes as people say it, and how many nobody knows (0)."""
    each = [*sizes]
    parts = [amount(sum(each))] if sum(each) else []
    return " and ".join([*parts, *([f"{each.count(0)} of unknown size"] if 0 in each else [])]) or "nothing"


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def room(folder: Path, wanted: int, what: str) -> None:
    """That there is room on a folder's disk.

    Args:
        folder: need not be there yet
        wanted: bytes
        what: is to be written, for the sentence

    Raises:
        OSError: there is less
    """
    there = existing(folder)
    if wanted > (free := shutil.disk_usage(there).free):
        said = f"{what} needs {wanted:,} bytes and {there} has {free:,} free"
        raise OSError(errno.ENOSPC, f"{said}: make room, or set UPCLOSE_DATA or UPCLOSE_CACHE")


def check(file: Path, size: int = 0, digest: str = "") -> None:
    """That a file is what was published.

    Args:
        file: that is there
        size: bytes, 0 where nobody says
        digest: "md5:..." or "sha256:...", "" where nobody says

    Raises:
        ValueError: it is not; says in what
    """
    with file.open("rb") as opened:
        if _is_page(opened.read(64)):
            raise ValueError(f"{file} is a web page and not {file.name}: a server's way to say no; remove it")
        if size and (found := file.stat().st_size) != size:
            why = "it is cut short" if found < size else "it is another file"
            raise ValueError(f"{file} has {found:,} bytes, not {size:,}: {why}")
        if digest:
            kind, _, known = digest.partition(":")
            opened.seek(0)
            if (got := hashlib.file_digest(opened, kind).hexdigest()) != known:
                raise ValueError(f"{file} has the {kind} {got}, not {known}: it is not what was published")


def _is_page(start: bytes) -> bool:
    return start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PAGES)


# ------------------------------------------------------------------------------------------------------------ downloads


def download(url: str, target: Path, size: int = 0, digest: str = "") -> Path:
    """A file of a server, whole or not at all.

    What was read is kept as `<target>.part`, and the next call goes on there where a checksum can tell that beginning
    and end are of one file; without one, or where a server gives no ranges, it begins anew.

    Args:
        url: http or https
        target: where it is put; a file that is there is only checked
        size: see `check`
        digest: see `check`

    Returns:
        target

    Raises:
        ConnectionError: the server cannot be reached, says no or stops
        ValueError: what it gives is a web page, or not what was published
        OSError: there is no room
    """
    if target.exists():
        check(target, size, digest)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part, tries = target.with_name(f"{target.name}.part"), 1
    if not digest:
        part.unlink(missing_ok=True)
    while True:
        before = _size(part)
        try:
            with _named(part):
                _read(url, part, size)
            break
        except (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            tries = TRIES if _size(part) > before else tries - 1
            if not (tries and digest):
                kept = f"; {_size(part):,} bytes are kept, and the next call goes on" if digest and _size(part) else ""
                raise ConnectionError(f"{url} cannot be read ({_reason(error)}){kept}") from None
            time.sleep(TRIES - tries)
    try:
        check(part, size, digest)
    except ValueError as error:
        part.unlink()
        raise ValueError(f"{url}: {error}; it was removed") from None
    os.replace(part, target)
    return target


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server says {error.code} {error.reason}"
    return str(getattr(error, "reason", error))


@contextmanager
def _named(place: Path) -> Iterator[None]:
    """A full disk says no name: give it one."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            error.filename = error.filename or str(place)
        raise


def _read(url: str, part: Path, size: int) -> None:
    """Read what a `.part` lacks; raises ConnectionError where the server stops before the end."""
    have = _size(part)
    if size and have >= size:
        return
    header = {"User-Agent": "upclose", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=header), timeout=PATIENCE)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        part.unlink()  # it is as long as the file, whose size nobody said, or longer
        return _read(url, part, size)
    with answer:
        if answer.status != 206 or not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0
        if answer.headers.get_content_type() == "text/html":
            raise ValueError(_PAGE.format(url))
        left = int(answer.headers.get("Content-Length") or 0)
        if size and left and have + left != size:
            raise ValueError(f"{url} gives {have + left:,} bytes, not the {size:,} that were published")
        room(part.parent, left, part.name)
        total = size or have + left
        bar = tqdm(total=total or None, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None)
        with part.open("ab" if have else "wb") as file, bar:
            while block := answer.read(BLOCK):
                if not have and _is_page(block):
                    raise ValueError(_PAGE.format(url))
                have += file.write(block)
                bar.update(len(block))
    if total and have < total:
        raise ConnectionError(f"it stopped after {have:,} of {total:,} bytes")


# ------------------------------------------------------------------------------------------------------------- archives


def unpack(archive: Path, folder: Path, wanted: Iterable[str], inside: str = "", inner: str = "") -> None:
    """Parts of an archive into a folder: all of them or none, each by a rename.

    An archive with a member that is absolute, has "..", or is a link or a device is refused as a whole.

    Args:
        archive: tar (plain or compressed) or zip
        folder: that gets them
        wanted: names of files or folders, or "." for all, which become the folder itself; those there stay
        inside: the folder of the archive in which they lie
        inner: an archive in the archive that holds them

    Raises:
        ValueError: it is damaged, not safe, or lacks a part
        OSError: there is no room
    """
    wanted, folder, source = list(wanted), folder.resolve(), archive
    with workshop(folder.parent / f".{folder.name}.unpacking") as shop:
        if inner:
            _extract(archive, shop / "outer", [PurePosixPath(inner)])
            if not (source := shop / "outer" / inner).exists():
                raise ValueError(f"{archive} holds no {inner!r}: it is another archive, remove it")
        parts = [PurePosixPath(inside, name) for name in wanted]
        _extract(source, shop / "parts", parts)
        if absent := [part for part in parts if not (shop / "parts" / part).exists()]:
            raise ValueError(f"{archive} holds no {str(absent[0])!r}: it is another archive, remove it")
        for name, part in zip(wanted, parts):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists() or (name == "." and not any(target.iterdir())):
                os.replace(shop / "parts" / part, target)


@contextmanager
def workshop(shop: Path) -> Iterator[Path]:
    """A folder that is gone afterwards, also what an interrupted call left of it."""
    shutil.rmtree(shop, ignore_errors=True)
    shop.mkdir(parents=True)
    try:
        with _named(shop):
            yield shop
    finally:
        shutil.rmtree(shop, ignore_errors=True)


def _extract(archive: Path, folder: Path, parts: list[PurePosixPath]) -> None:
    """The parts of an archive as files, with no times, owners or permissions of it."""
    try:
        members = _zipped if zipfile.is_zipfile(archive) else _tarred
        for name, content in members(archive, folder):
            path = _safe(archive, name)
            if content and any(path == part or part in path.parents or not part.parts for part in parts):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                with content() as source, (folder / path).open("wb") as file:
                    shutil.copyfileobj(source, file, BLOCK)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        why = str(error).partition(":\n")[0]
        raise ValueError(f"{archive} cannot be unpacked ({why}): it is cut short, or no tar or zip") from None


def _safe(archive: Path, name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ValueError(f"{archive} is not safe: {name!r} would be written outside of its folder; nothing is unpacked")
    return path


def _zipped(archive: Path, folder: Path) -> Iterator[tuple[str, Callable[[], IO[bytes]] | None]]:
    with zipfile.ZipFile(archive) as packed:
        room(folder, sum(member.file_size for member in packed.infolist()), f"what {archive.name} holds")
        for member in packed.infolist():
            if (kind := stat.S_IFMT(member.external_attr >> 16)) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise ValueError(_special(archive, member.filename, stat.S_ISLNK(kind)))
            yield member.filename, None if member.is_dir() else lambda member=member: packed.open(member)


def _tarred(archive: Path, folder: Path) -> Iterator[tuple[str, Callable[[], IO[bytes]] | None]]:
    room(folder, archive.stat().st_size, f"what {archive.name} holds")  # at least: pictures hardly shrink
    with tarfile.open(archive) as packed:
        for member in packed:
            if not (member.isreg() or member.isdir()):
                raise ValueError(_special(archive, member.name, member.islnk() or member.issym()))
            yield member.name, None if member.isdir() else lambda member=member: packed.extractfile(member)


def _special(archive: Path, name: str, link: bool) -> str:
    return f"{archive} is not safe: {name!r} is a {'link' if link else 'device'}; nothing is unpacked"
