"""A small world for the bank's tests: an encoder and a data set that need no weights and no files.

Run as a program it builds a bank in a process of its own: `python bank_world.py ROOT IMAGES PAUSE`.
"""

import hashlib
import sys
import time

import numpy as np
import torch
from torch.nn.functional import normalize

from upclose import bank, crops, seeds
from upclose.features import Plan
from upclose.images import ImageError

PLAN = Plan(n=3, scale=(0.4, 0.8), seed=5)
SHARD = 8


class FakeEncoder:
    """Random projections of 4 x 4 pixels, with the interface that the bank uses of an encoder."""

    precision, image_size, batch_size, dim = "fp32", 4, 64, 16
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    device, squash = torch.device("cpu"), False

    def __init__(self, seed=0):
        self.fingerprint = f"fake-{seed}"
        draw = seeds.generator(seed, "fake")
        self.weight = torch.randn(3 * 4 * 4, self.dim, generator=draw)
        self.token = torch.randn(3 * 4 * 4, 5, generator=draw)
        self.encoded = 0  # pictures seen

    def check_cls(self):
        pass

    def encode_crops(self, pixels, box, cls=False):
        self.encoded += len(pixels)
        x = crops.extract(pixels, box, 4, mean=self.mean, std=self.std).flatten(-3)
        out = normalize(x @ self.weight, dim=-1)
        return (out, x @ self.token) if cls else out

    def encode_images(self, pixels, cls=False):
        x = torch.stack([crops.whole(p, 4, mean=self.mean, std=self.std) for p in pixels]).flatten(1)
        out = normalize(x @ self.weight, dim=-1)
        return (out, x @ self.token) if cls else out


class FakeDataset:
    """Noise pictures of several sizes; positions in `unreadable` cannot be read."""

    name, split, class_names = "noise", "test", ["a", "b", "c"]
    domain, domain_names = None, []

    def __init__(self, n=40, unreadable=(), pause=0.0):
        self.key = [f"picture/{i}" for i in range(n)]
        self.label = np.arange(n) % 3
        self.unreadable, self.pause = set(unreadable), pause
        self.fingerprint = hashlib.sha256(f"{n} {sorted(unreadable)}".encode()).hexdigest()

    def __len__(self):
        return len(self.key)

    def load(self, i):
        time.sleep(self.pause)
        if i in self.unreadable:
            raise ImageError(f"/somewhere/{i}.jpg", "damaged")
        height, width = 12 + i % 3, 10 + i % 5
        return torch.from_numpy(seeds.rng(0, i).integers(0, 256, (3, height, width), dtype=np.uint8))


def contents(folder):
    """{file name: bytes} of a bank's folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


if __name__ == "__main__":
    torch.set_num_threads(1)
    bank.build(FakeDataset(int(sys.argv[2]), pause=float(sys.argv[3])), FakeEncoder(), PLAN, sys.argv[1], shard=SHARD)
