"""What keeps banks in order: what is there, whether every byte is sound, and how a bank goes."""

from __future__ import annotations

import hashlib
import os
import warnings
from contextlib import nullcontext, suppress

from upclose import paths
from upclose.bank import bank
from upclose.bank import store as stores
from upclose.bank.store import Store


def ls(root: str | os.PathLike | None = None) -> list[dict]:
    """The banks under a root, a row each: key, complete, images, unreadable, bytes and (if complete) identity."""
    home = stores.locate(root)
    home.files.invalidate_cache()
    if not home.files.isdir(home.path):
        return []
    rows = []
    for item in sorted(home.files.ls(home.path, detail=True), key=lambda item: item["name"]):
        name = item["name"].rstrip("/").rsplit("/", 1)[-1]
        if not bank.KEY.fullmatch(name):
            continue
        if home.local and os.path.islink(home.join(name).path):
            warnings.warn(f"{home.join(name)} is a link and no bank; it is passed over", stacklevel=2)
            continue
        if item["type"] != "directory":
            continue
        files = stores.sizes(home.join(name))
        ranges = [[int(x) for x in match.groups()] for match in map(stores.SHARD_NAME.fullmatch, files) if match]
        manifest = paths.unseal(stores.read(home.join(name), bank.MANIFEST)) if bank.MANIFEST in files else None
        rows.append(
            {
                "key": name,
                "complete": manifest is not None,
                "images": sum(stop - start for start, stop in ranges),
                "unreadable": len(manifest["errors"]) if manifest else 0,
                "bytes": sum(files.values()),
                "identity": manifest["identity"] if manifest else None,
            }
        )
    return rows


def verify(root: str | os.PathLike | None, key: str, mend: bool = False) -> list[dict]:
    """Read every byte of a bank and compare it with the checksums.

    Args:
        root: under which the bank lies
        key: of the bank
        mend: remove what is damaged, so that the next build encodes that, and only that, again

    Returns:
        the damage, {"shard": file name, "reason": str} each; empty when the bank is sound

    Raises:
        stores.BankError: there is no such bank, or it is unfinished
    """
    folder = _existing(root, key)
    with stores.lock(stores.locate(root), key) if mend else nullcontext():  # what a builder mends is not removed
        manifest = bank.manifest_of(folder)
        files, damage = stores.sizes(folder), bank.wrong_sizes(folder, manifest)
        suspect = {row["shard"] for row in damage}
        for shard in manifest["shards"]:
            if shard["name"] not in suspect and _digest(folder, shard) != shard["sha256"]:
                reason = "its bytes are not those that were written (checksum)"
                damage.append({"shard": shard["name"], "reason": reason})
        if damage and mend:
            with stores.writing(folder):
                for name in [bank.MANIFEST, *(row["shard"] for row in damage if row["shard"] in files)]:
                    folder.files.rm_file(folder.join(name).path)
    return sorted(damage, key=lambda row: row["shard"])


def rm(root: str | os.PathLike | None, key: str) -> int:
    """Remove a bank, once nobody builds it.

    Of a finished remote bank the copies in this machine's cache go as well; other machines keep theirs, whose folder
    (`shards` in the cache) can be removed at any time.

    Args:
        root: under which the bank lies
        key: of the bank

    Returns:
        the bytes that it held

    Raises:
        stores.BankError: there is no such bank
    """
    folder = _existing(root, key)
    with stores.lock(stores.locate(root), key), stores.writing(folder):
        held = {name: size for name, size in stores.sizes(folder).items() if stores.OWN.fullmatch(name)}
        if not folder.local and bank.MANIFEST in held:
            for shard in (paths.unseal(stores.read(folder, bank.MANIFEST)) or {"shards": []})["shards"]:
                bank.cached_copy(shard).unlink(missing_ok=True)
        for name in sorted(held, key=lambda name: name != bank.MANIFEST):  # the manifest first: never a finished half
            folder.files.rm_file(folder.join(name).path)
        with suppress(OSError):  # object stores have no folders, and what is not the bank's stays
            folder.files.rmdir(folder.path)
    return sum(held.values())


def _existing(root: str | os.PathLike | None, key: str) -> Store:
    home = stores.locate(root)
    stores.refuse_link(home.join(key))
    known = [row["key"] for row in ls(root)]
    if key not in known:
        raise stores.BankError(f"there is no bank {key!r} in {home}; there are: {', '.join(known) or 'none'}")
    return home.join(key)


def _digest(folder: Store, shard: dict) -> str:
    return hashlib.sha256(stores.read(folder, shard["name"])).hexdigest()
