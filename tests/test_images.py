"""Every kind of image file has a defined outcome."""

import errno
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from upclose import images
from upclose.images import MAX_PIXELS, ImageError, load_image

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)  # (H, W, 3)


def save(path, array=PICTURE, mode=None, **options):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def channels_first(array):
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def png(width, height, body=b"", depth=8):
    """A PNG of RGB whose header claims a size and a depth in bits, and whose body is what we say."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def test_plain_rgb_comes_back_pixel_for_pixel(tmp_path):
    pixels = load_image(save(tmp_path / "a.png"))
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    assert torch.equal(pixels, channels_first(PICTURE))


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (4, np.flipud),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
        (8, np.rot90),
    ],
)
def test_exif_orientation_is_applied(tmp_path, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert torch.equal(load_image(save(tmp_path / "a.png", exif=exif)), channels_first(turn(PICTURE)))


def test_grey_has_three_equal_channels(tmp_path):
    pixels = load_image(save(tmp_path / "a.png", PICTURE[..., 0]))
    assert torch.equal(pixels, torch.from_numpy(PICTURE[..., 0]).expand(3, -1, -1))


def test_one_bit_is_black_and_white(tmp_path):
    grey = np.where(PICTURE[..., 0] > 127, 255, 0).astype(np.uint8)
    path = save(tmp_path / "a.png", grey, mode="1")
    assert torch.equal(load_image(path)[0], torch.from_numpy(grey))


def test_palette_shows_its_colours(tmp_path):
    few = PICTURE // 128 * 255
    image = Image.fromarray(few).convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    image.save(tmp_path / "a.png")
    assert torch.equal(load_image(tmp_path / "a.png"), channels_first(np.asarray(image.convert("RGB"))))


def test_cmyk_jpeg_is_converted(tmp_path):
    red = np.zeros((8, 8, 3), np.uint8) + np.array([200, 20, 30], np.uint8)
    pixels = load_image(save(tmp_path / "a.jpg", red, mode="CMYK", quality=100)).int()
    assert (pixels - channels_first(red).int()).abs().max() <= 6


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path, suffix):
    deep = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)
    pixels = load_image(save(tmp_path / f"a.{suffix}", deep))
    assert torch.equal(pixels, torch.from_numpy((deep >> 8).astype(np.uint8)).expand(3, -1, -1))


def test_sixteen_bit_pgm_keeps_its_high_byte(tmp_path):
    deep = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)
    (tmp_path / "a.pgm").write_bytes(b"P5 7 5 65535\n" + deep.astype(">u2").tobytes())
    pixels = load_image(tmp_path / "a.pgm")
    assert torch.equal(pixels, torch.from_numpy((deep >> 8).astype(np.uint8)).expand(3, -1, -1))


def test_sixteen_bit_rgb_keeps_its_high_bytes(tmp_path):
    deep = RNG.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in deep)  # 0: no filter
    (tmp_path / "a.png").write_bytes(png(7, 5, lines, depth=16))
    assert torch.equal(load_image(tmp_path / "a.png"), channels_first((deep >> 8).astype(np.uint8)))


def test_alpha_is_dropped(tmp_path):
    alpha = np.concatenate([PICTURE, RNG.integers(0, 256, (6, 9, 1), dtype=np.uint8)], axis=2)
    assert torch.equal(load_image(save(tmp_path / "a.png", alpha)), channels_first(PICTURE))


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif")[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("shape", [(1, 1, 3), (4000, 1, 3), (1, 4000, 3)])
def test_extreme_shapes(tmp_path, shape):
    array = RNG.integers(0, 256, shape, dtype=np.uint8)
    assert torch.equal(load_image(save(tmp_path / "a.png", array)), channels_first(array))


def broken(tmp_path, kind):
    path = tmp_path / "a.jpg"
    whole = save(tmp_path / "whole.jpg", RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).read_bytes()
    content = {
        "empty": b"",
        "text": b"<script>alert(1)</script>",
        "truncated": whole[: len(whole) // 2],
        "head only": whole[:40],
        "no pixels": png(4, 4),
        "big bomb": png(60_000, 60_000),
    }[kind]
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "empty"),
        ("text", "script"),
        ("truncated", "truncated"),
        ("head only", ""),
        ("no pixels", "truncated"),
        ("big bomb", "bomb"),
    ],
)
def test_unreadable_files_say_file_and_reason(tmp_path, kind, reason):
    path = broken(tmp_path, kind)
    with pytest.raises(ImageError) as caught:
        load_image(path)
    assert caught.value.path == str(path)
    assert reason in caught.value.reason
    assert str(path) in str(caught.value)
    assert str(tmp_path) not in caught.value.reason


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(png(MAX_PIXELS // 1000 + 1, 1000))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="bomb"), pytest.warns(Image.DecompressionBombWarning):
        load_image(path)


@pytest.mark.parametrize("top", [1, 255, 65535, 2**31 - 1])
@pytest.mark.parametrize(("dtype", "mode"), [(np.float32, "F"), (np.int32, "I")])
def test_pixels_without_a_defined_white_are_refused(tmp_path, dtype, mode, top):
    with pytest.raises(ImageError, match=f"mode '{mode}' have no defined white"):
        load_image(save(tmp_path / "a.tif", (RNG.random((4, 4)) * top).astype(dtype)))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ImageError, match="No such file"):
        load_image(tmp_path / "none.jpg")
    with pytest.raises(ImageError, match="directory"):
        load_image(tmp_path)


def test_a_failing_disk_is_not_blamed_on_the_picture(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png")

    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match=r"Input/output error: .*a\.png") as caught:
        load_image(path)
    assert not isinstance(caught.value, ImageError)


def test_the_error_is_rebuilt_from_its_arguments():
    error = ImageError("a.jpg", "empty")
    again = type(error)(*error.args)  # what crossing a process boundary does
    assert (again.path, again.reason, str(again)) == ("a.jpg", "empty", str(error))


def test_a_program_that_is_called_a_picture_is_not_run(tmp_path):
    file = tmp_path / "x.jpg"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n")
    with pytest.raises(ImageError, match="no image format that is read here"):
        load_image(file)


def test_a_pipe_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    with pytest.raises(ImageError, match="no regular file"):
        load_image(tmp_path / "x.jpg")


@pytest.mark.skipif("AVIF" not in images.FORMATS, reason="this build of Pillow has no AVIF")
def test_avif_is_read(tmp_path):
    assert load_image(save(tmp_path / "a.avif", np.zeros((8, 8, 3), np.uint8))).shape == (3, 8, 8)


@pytest.mark.parametrize(("brand", "way"), [(b"heic", r'pip install "upclose\[heic\]"'), (b"avif", "save it as JPEG")])
def test_formats_of_telephones_say_what_is_missing(tmp_path, monkeypatch, brand, way):
    monkeypatch.setattr(images, "FORMATS", ["JPEG", "PNG"])
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0" * 20)
    with pytest.raises(ImageError, match=way):
        load_image(tmp_path / "a.heic")
    assert images.begins(tmp_path / "a.heic")


def test_heic_is_read_with_its_extra(tmp_path):
    pytest.importorskip("pillow_heif")
    assert load_image(save(tmp_path / "a.heic", np.zeros((8, 8, 3), np.uint8), format="HEIF")).shape == (3, 8, 8)
