"""Where banks lie and how their files are written: whole or not at all, and never believed without their checksum."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import save
from torch import Tensor

from upclose import paths

OWN = re.compile(r"(\d{8}-\d{8}\.safetensors|manifest\.json)(\.partial-[0-9a-f]{32})?")  # other files are nobody's
SHARD_NAME = re.compile(r"(\d{8})-(\d{8})\.safetensors")
BLANK = "0" * 64


class BankError(RuntimeError):
    """A bank is missing, unfinished or damaged; the message says which part and how to mend it."""


class Store(NamedTuple):
    """A folder, on this machine or behind an fsspec URL.

    Attributes:
        files: the file system
        path: of the folder in it
    """

    files: AbstractFileSystem
    path: str

    @property
    def local(self) -> bool:
        """Whether its files can be memory-mapped."""
        return isinstance(self.files, LocalFileSystem)

    @property
    def name(self) -> str:
        """Of the folder itself; a bank's is its key."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    def join(self, name: str) -> Store:
        """A folder or a file in it."""
        return Store(self.files, f"{self.path.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.path if self.local else self.files.unstrip_protocol(self.path)


def locate(root: str | os.PathLike | None) -> Store:
    """A root as a `Store`: a path, an fsspec URL (s3://, gs://, memory://, file://), or None for `paths.bank()`."""
    return Store(*url_to_fs(os.fspath(paths.bank() if root is None else root)))


def refuse_link(folder: Store) -> None:
    """Raise where a bank's place is taken by a link, which leads to somebody else's files.

    Raises:
        BankError: names the link
    """
    if folder.local and os.path.islink(folder.path):
        raise BankError(
            f"{folder} is a link to {os.readlink(folder.path)}: a bank is a folder of its own; remove the link"
        )


def sizes(folder: Store) -> dict[str, int]:
    """The files in a folder and their sizes in bytes; nothing when there is no such folder."""
    folder.files.invalidate_cache()
    if not folder.files.isdir(folder.path):
        return {}
    listing = folder.files.ls(folder.path, detail=True)
    return {item["name"].rsplit("/", 1)[-1]: item["size"] for item in listing if item["type"] == "file"}


def size(folder: Store, name: str) -> int | None:
    """Of one file, in bytes; None when there is none."""
    folder.files.invalidate_cache()
    try:
        return folder.files.info(folder.join(name).path)["size"]
    except FileNotFoundError:
        return None


def read(folder: Store, name: str) -> bytes:
    """A whole file."""
    return folder.files.cat_file(folder.join(name).path)


@contextlib.contextmanager
def writing(folder: Store) -> Iterator[None]:
    """Turn a full disk or a root that is not ours to write into an error that says what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write to the bank at {folder} ({error.strerror or error}): make room or give write permission "
            "there, or choose another root (root=, UPCLOSE_BANK). Shards that were finished are kept, and the next "
            "build goes on from them",
        ) from error


def write(folder: Store, name: str, content: bytes) -> None:
    """Write a file so that under its name there is never a part of it.

    On a local disk as `paths.write` does it. Object stores publish an object whole; on other file systems the checksum
    inside the file unmasks a half.
    """
    target = folder.join(name).path
    with writing(folder):
        if folder.local:
            paths.write(Path(target), content)
        else:
            folder.files.pipe_file(target, content)


@contextlib.contextmanager
def lock(root: Store, key: str) -> Iterator[None]:
    """One builder a key at a time, among the processes that see the same lock file; the others wait.

    The lock lies beside the bank; for a remote root it lies in this machine's cache, so that builders on two machines
    are not kept apart: they do the same work twice, and write the same bytes.
    """
    if root.local:
        path = Path(root.join(f"{key}.lock").path)
    else:
        path = paths.cache() / "locks" / f"{hashlib.sha256(str(root.join(key)).encode()).hexdigest()}.lock"
    held = FileLock(path, mode=paths.mode())
    with writing(root):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire(timeout=0)
        except Timeout:
            warnings.warn(f"another process is building bank {key}: waiting until it is done", stacklevel=3)
            held.acquire()
    try:
        yield
    finally:
        held.release()


def pack(tensors: dict[str, Tensor], errors: dict[int, str], key: str = "") -> bytes:
    """A shard as safetensors bytes that carry the bank's key and their own checksum.

    The checksum is taken with its place filled with zeros.
    """
    note = json.dumps({"checksum": BLANK, "errors": errors, "key": key}, sort_keys=True)
    content = save(tensors, {"shard": note})
    return content.replace(BLANK.encode(), hashlib.sha256(content).hexdigest().encode(), 1)


def unpack_errors(content: bytes, key: str = "") -> dict[int, str] | None:
    """The unreadable pictures that an intact shard of this bank lists, {position: reason}; None for any other."""
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        note = json.loads(header["__metadata__"]["shard"])
        blank = content.replace(note["checksum"].encode(), BLANK.encode(), 1)
        intact = hashlib.sha256(blank).hexdigest() == note["checksum"] and note["key"] == key
        return {int(i): reason for i, reason in note["errors"].items()} if intact else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
