"""Random streams that depend on what they are for, never on when or where they are drawn."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive(seed: int, *key: object) -> int:
    """A 63-bit seed for (seed, key), the same in every process and on every machine."""
    text = "\x1f".join([str(int(seed)), *map(str, key)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def rng(seed: int, *key: object) -> np.random.Generator:
    """A numpy generator for (seed, key)."""
    return np.random.Generator(np.random.PCG64(derive(seed, *key)))


def generator(seed: int, *key: object, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator for (seed, key)."""
    return torch.Generator(device=device).manual_seed(derive(seed, *key))
