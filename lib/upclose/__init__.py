"""CLIP, up close: how parts of an image match parts of a class description."""

import warnings

__version__ = "0.1.0"

warnings.filterwarnings("ignore", message="IProgress not found")  # open_clip imports tqdm's widgets; none are needed


def __getattr__(name: str):
    if name in ("classify", "explain"):  # when they are asked for: they import torch and open_clip
        from upclose import short

        return getattr(short, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
