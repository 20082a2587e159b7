"""Image files as uint8 tensors, with a defined outcome for every file that a data set may hold."""

from __future__ import annotations

import io
import os
import re
import stat
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, features
from torch import Tensor

with suppress(ImportError):  # the extra [heic]
    import pillow_heif

    pillow_heif.register_heif_opener()

_BEGINS = re.compile(
    rb"\xff\xd8\xff|\x89PNG|BM|GIF8|II\*\0|MM\0\*|RIFF....WEBP|P[1-6]\s|....ftyp(avi[fs]|hei[cfmsx]|hev[cx]|mif1|msf1)",
    re.DOTALL,
)
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of a decompression bomb
FORMATS = ["JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", *(["AVIF"] if features.check("avif") else [])]
FORMATS += ["HEIF"] if "HEIF" in Image.OPEN else []
"""What is decoded, by content and not by name. Pillow would hand others, such as EPS, to programs that run them."""


class ImageError(ValueError):
    """A picture that cannot be read.

    Attributes:
        path: the file
        reason: why it cannot be read, without the path, so that it is the same on every machine
    """

    def __init__(self, path: str | os.PathLike, reason: str):
        super().__init__(os.fspath(path), reason)
        self.path, self.reason = os.fspath(path), reason

    def __str__(self) -> str:
        return f"cannot read picture {self.path!r}: {self.reason}"


def load_image(path: str | os.PathLike, content: bytes | None = None) -> Tensor:
    """Decode an image file as the eye would see it.

    Turned upright by its EXIF orientation; grey, palette and CMYK become RGB; 16-bit grey and colour keep their high
    bytes; of an animation the first frame counts; alpha is dropped, as CLIP's own preprocessing (`convert("RGB")`)
    does. 32-bit and floating point pixels are refused: nothing in the file says which number is white.

    Args:
        path: of a regular file in one of `FORMATS`
        content: of the file, where it lies in another one; `path` is then its name only

    Returns:
        uint8 (3, H, W)

    Raises:
        ImageError: the file is missing, no regular file, empty, cut short, of no known format, of 32-bit or floating
            point numbers, or has more than `MAX_PIXELS` pixels (looked up in its header, before anything is decoded)
        OSError: the disk or the network failed, which says nothing about the picture
    """
    try:
        if content is None and not (stat.S_ISREG(mode := os.stat(path).st_mode) or stat.S_ISDIR(mode)):
            raise ImageError(path, "it is no regular file but a pipe, a socket or a device")
        with Image.open(path if content is None else io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(path, f"{width} x {height} pixels are more than {MAX_PIXELS:,} (decompression bomb?)")
            if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):  # a PGM of 16 bits is "I" as well
                raise ImageError(path, f"pixels of mode {image.mode!r} have no defined white: save it as 8-bit")
            return torch.from_numpy(_rgb(ImageOps.exif_transpose(image)).transpose(2, 0, 1).copy())
    except (ImageError, MemoryError):
        raise
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ImageError(path, error.strerror) from None
    except Image.UnidentifiedImageError:
        raise ImageError(path, _not_an_image(path, content)) from None
    except Image.DecompressionBombError:
        raise ImageError(path, f"more than {MAX_PIXELS:,} pixels (decompression bomb?)") from None
    except Exception as error:  # a damaged file makes Pillow's decoders raise almost anything
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = error.filename or os.fspath(path)  # then its message names the picture
            raise
        raise ImageError(path, f"damaged, {type(error).__name__}: {error}") from error


def begins(path: str | os.PathLike) -> bool:
    """Whether a regular file begins like a picture that could be read here, or with an extra; nothing is decoded."""
    if not os.path.isfile(path):
        return False
    with Path(path).open("rb") as file:
        return _BEGINS.match(file.read(16)) is not None


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        high = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return np.repeat(high.astype(np.uint8)[..., None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


def _not_an_image(path: str | os.PathLike, content: bytes | None) -> str:
    with Path(path).open("rb") if content is None else io.BytesIO(content) as file:
        start = file.read(16)
    if not start:
        return "the file is empty (0 bytes)"
    kind = start[8:12] if start[4:8] == b"ftyp" else b""
    hint = ': HEIC, pip install "upclose[heic]" or save it as JPEG' if kind[:2] in (b"he", b"mi", b"ms") else ""
    hint = ": AVIF, which this build of Pillow lacks: save it as JPEG" if kind in (b"avif", b"avis") else hint
    return f"no image format that is read here (begins with {start!r}){hint}"
