"""What a device can do."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


def has_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels are used there: on a GPU with Triton, and anywhere under TRITON_INTERPRET=1."""
    return (device.type == "cuda" and _has_triton()) or os.environ.get("TRITON_INTERPRET") == "1"


def gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in chosen.split(",") if name.strip()][: torch.cuda.device_count()]
    return [str(k) for k in range(torch.cuda.device_count())]


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
