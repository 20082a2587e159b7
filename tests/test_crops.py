import itertools
import os
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from sklearn.datasets import load_sample_image
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torchvision import transforms

from upclose import crops, paths
from upclose.features import Plan

PHOTOS = Path(os.environ.get("UPCLOSE_SHARED", paths.ROOT.parent / "shared")) / "photos"
MEAN, STD = torch.tensor(crops.MEAN).view(3, 1, 1), torch.tensor(crops.STD).view(3, 1, 1)


def picture(height, width, seed=0):
    """Smooth colour, fine texture, hard edges and saturated areas: what makes a bicubic filter overshoot."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.BILINEAR)).astype(float)
    pixels = smooth + rng.normal(0, 30, (height, width, 3))
    pixels[(np.add.outer(np.arange(height) // 5, np.arange(width) // 7) % 4) == 0] *= 3
    pixels[:, width // 3 :: 11] = 0
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)).permute(2, 0, 1).contiguous()


def pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def pil_resize(image, wide, tall):
    """Pillow 13's order of the passes in every Pillow: a much taller box is resized along y first."""
    if image.height > tall and image.height - tall > 2 * (image.width - wide):
        image = image.resize((image.width, tall), Image.BICUBIC)
    return image.resize((wide, tall), Image.BICUBIC)


def pil_crops(image, box, size):
    """The oracle: (N, 3, S, S) int."""
    done = [pil_resize(pil(image).crop(tuple(row)), size, size) for row in box.tolist()]
    return torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) for one in done]).int()


def awkward_boxes(height, width):
    """Squares, slivers one pixel wide, the corners, the borders, the whole picture."""
    h, w = height, width
    rows = [
        (0, 0, w, h),
        (0, 0, 1, 1),
        (w - 1, h - 1, w, h),
        (w // 2, 0, w // 2 + 1, h),
        (0, h // 2, w, h // 2 + 1),
        (0, 0, w // 2 + 1, h // 2 + 1),
        (w // 3, h // 3, w, h),
        (w // 4, 0, w // 4 + max(1, w // 9), max(1, h // 2)),
        (0, h // 4, max(1, w // 2), h // 4 + max(1, h // 9)),
    ]
    return torch.tensor(rows, dtype=torch.float32)


def banded(images, box, size, dtype=torch.float32):
    """How devices that are no CPU and have no Triton cut crops."""
    return crops._extract_banded(images, box, size, dtype, crops.MEAN, crops.STD)


def both(image, box, size):
    return {
        "cpu": crops.extract(image, box, size, dtype=torch.uint8).int(),
        "batched": banded([image], box[None], size, torch.uint8)[0].int(),
    }


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="earlier Pillows always begin with x")
def test_the_oracle_is_pil():
    rng = np.random.default_rng(0)
    for height, width, tall, wide in rng.integers(1, 150, (300, 4)):
        image = Image.fromarray(rng.integers(0, 2, (height, width, 3), dtype=np.uint8) * 255)
        assert pil_resize(image, wide, tall) == image.resize((wide, tall), Image.BICUBIC)


# sampling ------------------------------------------------------------------------------------------------------------


def inside(box, height, width):
    x0, y0, x1, y1 = box.unbind(-1)
    return bool(((x0 >= 0) & (y0 >= 0) & (x0 < x1) & (y0 < y1) & (x1 <= width) & (y1 <= height)).all())


@pytest.mark.parametrize("sampler", [crops.sample_boxes, crops.sample_area_boxes])
@pytest.mark.parametrize(("height", "width"), [(300, 500), (500, 300), (1, 1), (1, 4000), (4000, 1), (2, 3)])
def test_sampled_boxes_are_whole_pixels_inside(sampler, height, width):
    box = sampler(height, width, 50, key="a")
    assert box.shape == (50, 4)
    assert box.dtype == torch.float32
    assert torch.equal(box, box.round())
    assert inside(box, height, width)


@pytest.mark.parametrize("sampler", [crops.sample_boxes, crops.sample_area_boxes])
def test_stream_depends_on_seed_and_key_alone(sampler):
    one = sampler(300, 500, 20, seed=1, key="a")
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    assert torch.equal(one, sampler(300, 500, 20, seed=1, key="a"))
    assert torch.equal(one[:7], sampler(300, 500, 7, seed=1, key="a"))
    assert not torch.equal(one, sampler(300, 500, 20, seed=2, key="a"))
    assert not torch.equal(one, sampler(300, 500, 20, seed=1, key="b"))


def test_square_boxes_follow_their_law():
    box = crops.sample_boxes(300, 500, 20000, (0.5, 0.9))
    side = box[:, 2] - box[:, 0]
    assert torch.equal(side, box[:, 3] - box[:, 1])
    assert side.min() == 150
    assert side.max() == 269
    assert abs(side.mean() - 209.5) < 1
    assert (side.std() - 120 / 12**0.5).abs() < 0.6
    for low, room in ((box[:, 0], 500 - side), (box[:, 1], 300 - side)):
        assert (low == 0).any()
        assert (low == room).any()
        assert abs(((low + 0.5) / (room + 1)).mean() - 0.5) < 0.01


def test_scale_of_one_is_the_largest_square():
    assert torch.equal(crops.sample_boxes(7, 7, 2, (1, 1)), torch.tensor([[0.0, 0, 7, 7]] * 2))


def test_area_boxes_follow_their_law():
    box = crops.sample_area_boxes(600, 800, 20000)
    width, height = box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]
    share, ratio = width * height / (600 * 800), width / height
    assert share.min() >= 0.0995
    assert share.max() <= 0.7505
    assert abs(share.mean() - 0.425) < 0.005
    assert ratio.min() > 0.745
    assert ratio.max() < 1.345
    small = share < 0.4
    assert abs(ratio[small].log().mean()) < 0.01
    assert (width == height).float().mean() < 0.1


@pytest.mark.parametrize(("height", "width"), [(1, 4000), (4000, 1), (10, 4000)])
def test_area_is_kept_where_no_aspect_in_range_fits(height, width):
    box = crops.sample_area_boxes(height, width, 200)
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) / (height * width)
    assert area.min() > 0.095
    assert area.max() < 0.755


def test_unit_ratio_gives_squares():
    box = crops.sample_area_boxes(300, 300, 50, ratio=(1, 1))
    assert torch.equal(box[:, 2] - box[:, 0], box[:, 3] - box[:, 1])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(n=0), "n must be at least 1 crop, not 0"),
        (dict(n=1, scale=(0.9, 0.5)), "alpha <= beta"),
        (dict(n=1, scale=(0, 0.5)), "0 < alpha"),
        (dict(n=1, scale=(0.5, 1.1)), "beta <= 1"),
        (dict(n=1, scale=(float("nan"), 0.5)), "nan"),
        (dict(n=1, height=0), "no pixels"),
    ],
)
@pytest.mark.parametrize("sampler", [crops.sample_boxes, crops.sample_area_boxes])
def test_sampling_errors(sampler, arguments, says):
    with pytest.raises(ValueError, match=says):
        sampler(**dict(height=30, width=30) | arguments)


def test_area_ratio_error():
    with pytest.raises(ValueError, match="ratio"):
        crops.sample_area_boxes(30, 30, 1, ratio=(2, 1))


# expansion -----------------------------------------------------------------------------------------------------------


def naive_expand(box, factor, height, width, boundary):
    x0, y0, x1, y1 = box
    done = []
    for low, high, length in ((x0, x1, width), (y0, y1, height)):
        centre, side = (low + high) / 2, (high - low) * factor
        if boundary == "clip":
            done.append((max(0, centre - side / 2), min(length, centre + side / 2)))
        else:
            side = min(side, length)
            low = min(max(centre - side / 2, 0), length - side)
            done.append((low, low + side))
    (x0, x1), (y0, y1) = done
    return [x0, y0, x1, y1]


@pytest.mark.parametrize("boundary", ["shift", "clip"])
@pytest.mark.parametrize("factor", [1.0, 1.1, 1.25, 3.0, 100.0])
def test_expand_equals_the_naive_loop(boundary, factor):
    box = torch.cat([crops.sample_boxes(90, 140, 200, (0.05, 0.95)), awkward_boxes(90, 140)])
    expected = torch.tensor([naive_expand(row, factor, 90, 140, boundary) for row in box.tolist()])
    ours = crops.expand_boxes(box, factor, 90, 140, boundary)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    assert inside(ours, 90, 140)


def test_expand_by_hand():
    box = torch.tensor([[10.0, 10, 30, 30], [0, 0, 20, 20], [80, 80, 100, 100]])
    shift = [[0.0, 0, 40, 40], [0, 0, 40, 40], [60, 60, 100, 100]]
    clip = [[0.0, 0, 40, 40], [0, 0, 30, 30], [70, 70, 100, 100]]
    assert crops.expand_boxes(box, 2, 100, 100).tolist() == shift
    assert crops.expand_boxes(box, 2, 100, 100, "clip").tolist() == clip
    assert crops.expand_boxes(box[0], 1.5, 100, 100).tolist() == [5, 5, 35, 35]


@pytest.mark.parametrize("boundary", ["shift", "clip"])
def test_ladder_is_nested_and_row_t_is_expanded_t_times(boundary):
    box = crops.sample_boxes(200, 150, 40, (0.1, 0.9))
    ladder = crops.ladder_boxes(box, 1.25, 6, 200, 150, boundary)
    assert ladder.shape == (6, 40, 4)
    assert torch.equal(ladder[0], box)
    for low, high in itertools.pairwise(ladder):
        assert torch.equal(high, crops.expand_boxes(low, 1.25, 200, 150, boundary))
        assert (high[:, :2] <= low[:, :2] + 1e-4).all()
        assert (high[:, 2:] >= low[:, 2:] - 1e-4).all()
    if boundary == "shift":
        torch.testing.assert_close(ladder[5], crops.expand_boxes(box, 1.25**5, 200, 150), atol=1e-3, rtol=0)


def test_ladder_grows_by_the_factor_and_ends_as_the_whole_picture():
    box = torch.tensor([[40.0, 40, 60, 60]])
    ladder = crops.ladder_boxes(box, 1.1, 40, 100, 100)
    side = ladder[:, 0, 2] - ladder[:, 0, 0]
    torch.testing.assert_close(side, (20 * 1.1 ** torch.arange(40)).clamp(max=100), atol=1e-3, rtol=0)
    assert ladder[-1].tolist() == ladder[-2].tolist() == [[0, 0, 100, 100]]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(factor=0.9), "factor must be .* not 0.9"),
        (dict(factor=float("nan")), "factor"),
        (dict(boundary="wrap"), "boundary must be .* not 'wrap'"),
        (dict(box=torch.zeros(0, 4)), "at least one box"),
        (dict(box=torch.zeros(3, 5)), r"\(3, 5\)"),
        (dict(width=0), "no pixels"),
    ],
)
def test_expand_errors(arguments, says):
    valid = dict(box=torch.tensor([[0.0, 0, 2, 2]]), factor=1.5, height=9, width=9)
    with pytest.raises(ValueError, match=says):
        crops.expand_boxes(**valid | arguments)


def test_ladder_without_a_step_is_an_error():
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        crops.ladder_boxes(torch.tensor([[0.0, 0, 2, 2]]), 1.5, 0, 9, 9)


def test_plan_boxes():
    square = Plan("square", 12, (0.3, 0.6), seed=3)
    assert torch.equal(crops.plan_boxes(square, 80, 90, "k"), crops.sample_boxes(80, 90, 12, (0.3, 0.6), 3, "k"))
    area = Plan("area", 9, (0.1, 0.75), seed=3)
    assert torch.equal(crops.plan_boxes(area, 80, 90, "k"), crops.sample_area_boxes(80, 90, 9, seed=3, key="k"))
    ladder = crops.plan_boxes(square._replace(factor=1.1, steps=4), 80, 90, "k")
    assert ladder.shape == (4, 12, 4)
    exact = crops.ladder_boxes(crops.plan_boxes(square, 80, 90, "k"), 1.1, 4, 80, 90)
    assert (ladder - exact).abs().max() <= 0.5
    assert torch.equal(ladder, ladder.round())
    with pytest.raises(ValueError, match="'square', 'area', not 'grid'"):
        crops.plan_boxes(Plan("grid"), 80, 90, "k")


# pixels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 64, 224])
@pytest.mark.parametrize(("height", "width"), [(120, 181), (181, 120), (1, 1), (1, 90), (90, 1), (40, 300), (64, 64)])
def test_pixels_are_pils(height, width, size):
    image = picture(height, width)
    box = torch.cat([awkward_boxes(height, width), crops.sample_boxes(height, width, 3, (0.2, 1))])
    expected = pil_crops(image, box, size)
    for path, ours in both(image, box, size).items():
        assert (ours - expected).abs().max() <= 2, path


def test_strong_downscaling_is_pils():
    image = picture(700, 1100)
    box = torch.cat([awkward_boxes(700, 1100), crops.sample_boxes(700, 1100, 3)])
    expected = pil_crops(image, box, 24)
    for path, ours in both(image, box, 24).items():
        assert (ours - expected).abs().max() <= 2, path


def test_saturated_edges_overshoot_in_neither_pass():
    image = (torch.rand(1, 50, 60, generator=torch.Generator().manual_seed(0)) > 0.5).expand(3, 50, 60).to(torch.uint8)
    image = image.mul(255).contiguous()
    box = crops.sample_boxes(50, 60, 10)
    expected = pil_crops(image, box, 96)
    assert expected.min() == 0
    assert expected.max() == 255
    for path, ours in both(image, box, 96).items():
        assert (ours - expected).abs().max() <= 2, path


def photographs():
    """{name: uint8 (H, W, 3)}: the two of scikit-learn, and six more where there are any."""
    files = sorted(PHOTOS.glob("*.JPEG"))[:6]
    return {name: load_sample_image(name) for name in ("china.jpg", "flower.jpg")} | {
        file.name: np.array(Image.open(file).convert("RGB")) for file in files
    }


@pytest.mark.parametrize("size", [64, 224])
def test_photographs(size):
    for name, pixels in photographs().items():
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        height, width = image.shape[1:]
        box = torch.cat([crops.sample_boxes(height, width, 3, key=name), awkward_boxes(height, width)[:5]])
        expected = pil_crops(image, box, size)
        for path, ours in both(image, box, size).items():
            assert (ours - expected).abs().max() <= 2, (name, path)


def test_a_crop_of_the_right_size_is_copied():
    image = picture(60, 70)
    box = torch.tensor([[5.0, 7, 37, 39]])
    for ours in both(image, box, 32).values():
        assert torch.equal(ours[0], image[:, 7:39, 5:37].int())


def test_fractional_boxes_are_rounded_as_pil_rounds():
    image = picture(60, 70)
    box = torch.tensor([[4.5, 7.5, 37.49, 39.51], [0.2, 0.6, 69.8, 59.5]])
    expected = pil_crops(image, box, 32)
    for ours in both(image, box, 32).values():
        assert (ours - expected).abs().max() <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalised_values(dtype):
    image = picture(90, 80)
    box = crops.sample_boxes(90, 80, 5)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for extract in (crops.extract, lambda i, b, *a: banded([i], b[None], *a)[0]):
        ours = extract(image, box, 40, dtype)
        pixels = extract(image, box, 40, torch.uint8)
        assert ours.dtype == dtype
        assert ours.shape == (5, 3, 40, 40)
        expected = (pixels.float() / 255 - MEAN) / STD
        torch.testing.assert_close(ours.float(), expected, atol=2e-6, rtol=tolerance)


def test_other_mean_and_std():
    image = picture(20, 20)
    ours = crops.extract(image, torch.tensor([[0.0, 0, 20, 20]]), 20, mean=(0, 0.5, 1), std=(1, 0.5, 2))
    expected = torch.stack([image[0] / 255, (image[1] / 255 - 0.5) / 0.5, (image[2] / 255 - 1) / 2])
    torch.testing.assert_close(ours[0], expected)


def test_pictures_of_different_sizes_in_one_batch():
    images = [picture(50, 80, 1), picture(90, 30, 2), picture(1, 1, 3)]
    box = torch.stack([crops.sample_boxes(*image.shape[1:], 6) for image in images])
    alone = torch.stack([crops.extract(image, rows, 28) for image, rows in zip(images, box)])
    assert torch.equal(crops.extract(images, box, 28), alone)
    batched = banded(images, box, 28)
    one_by_one = torch.cat([banded([image], rows[None], 28) for image, rows in zip(images, box)])
    assert batched.shape == (3, 6, 3, 28, 28)
    torch.testing.assert_close(batched, one_by_one, atol=1.01 / 255 / min(crops.STD), rtol=0)
    assert ((batched - one_by_one).abs() < 1e-5).float().mean() > 0.999
    assert (batched - alone).abs().max() <= 2.01 / 255 / min(crops.STD)


def test_ladders_keep_their_shape():
    image = picture(50, 80)
    ladder = crops.ladder_boxes(crops.sample_boxes(50, 80, 4), 1.25, 3, 50, 80)
    ours = crops.extract(image, ladder, 16)
    assert ours.shape == (3, 4, 3, 16, 16)
    assert torch.equal(ours[2], crops.extract(image, ladder[2], 16))
    assert torch.equal(ours[1, 2], crops.extract(image, ladder[1, 2], 16))


def test_blocks_change_nothing(monkeypatch):
    image = picture(50, 80)
    box = crops.sample_boxes(50, 80, 7)[None]
    expected = banded([image], box, 16, torch.uint8)
    monkeypatch.setattr(crops, "BLOCK_BYTES", 1)
    assert (banded([image], box, 16, torch.uint8).int() - expected.int()).abs().max() <= 1


def test_memory_layout_of_the_picture_does_not_matter():
    image = picture(50, 80)
    other = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    box = crops.sample_boxes(50, 80, 4)
    for one, two in zip(both(image, box, 32).values(), both(other, box, 32).values()):
        assert torch.equal(one, two)


def test_autocast_does_not_blur_the_pixels():
    image = picture(50, 80)
    box = crops.sample_boxes(50, 80, 4)
    with torch.autocast("cpu", torch.bfloat16):
        ours = both(image, box, 32)
    for pixels in ours.values():
        assert (pixels - pil_crops(image, box, 32)).abs().max() <= 2


@pytest.mark.parametrize(
    ("image", "box", "size", "says"),
    [
        (torch.zeros(3, 9, 9), [[0, 0, 2, 2]], 8, "uint8"),
        (torch.zeros(1, 9, 9, dtype=torch.uint8), [[0, 0, 2, 2]], 8, r"\(1, 9, 9\)"),
        (torch.zeros(3, 0, 9, dtype=torch.uint8), [[0, 0, 2, 2]], 8, "not empty"),
        (torch.zeros(3, 9, 9, dtype=torch.uint8), [[0, 0, 2]], 8, "box must have"),
        (torch.zeros(3, 9, 9, dtype=torch.uint8), [[0, 0, 2, 2]], 0, "size"),
        (torch.zeros(3, 9, 9, dtype=torch.uint8), [[0, 0, 10, 2]], 8, r"box \(0, 0, 10, 2\)"),
        (torch.zeros(3, 9, 9, dtype=torch.uint8), [[2, 2, 2, 4]], 8, "empty or not inside"),
        (torch.zeros(3, 9, 9, dtype=torch.uint8), [[-1, 0, 2, 4]], 8, "not inside"),
    ],
)
def test_extract_errors(image, box, size, says):
    with pytest.raises(ValueError, match=says):
        crops.extract(image, torch.tensor(box, dtype=torch.float32), size)


def test_one_set_of_boxes_a_picture():
    image = torch.zeros(3, 9, 9, dtype=torch.uint8)
    with pytest.raises(ValueError, match="2 pictures but boxes for 1"):
        crops.extract([image, image], torch.tensor([[[0.0, 0, 2, 2]]]), 8)


# the whole picture ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 64, 224])
@pytest.mark.parametrize(
    ("height", "width"), [(120, 181), (181, 120), (64, 64), (1, 1), (9, 60), (60, 9), (50, 201), (333, 77)]
)
def test_whole_is_clips_preprocessing(height, width, size, monkeypatch):
    image = picture(height, width)
    short, long = sorted((height, width))
    tall, wide = (size if side == short else int(size * long / short) for side in (height, width))
    done = transforms.CenterCrop(size)(pil_resize(pil(image), wide, tall))
    expected = torch.from_numpy(np.array(done)).permute(2, 0, 1).int()
    assert (crops.whole(image, size, torch.uint8).int() - expected).abs().max() <= 2
    monkeypatch.setattr(crops, "ELONGATED", 0)
    assert (crops.whole(image, size, torch.uint8).int() - expected).abs().max() <= 2
    normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize(crops.MEAN, crops.STD)])
    assert (crops.whole(image, size) - normalise(done)).abs().max() <= 2.01 / 255 / min(crops.STD)


@pytest.mark.parametrize(("height", "width"), [(120, 181), (181, 120), (64, 64), (75, 201)])
def test_whole_is_open_clips_transform(height, width):
    image = picture(height, width)
    transform = image_transform(224, is_train=False, mean=crops.MEAN, std=crops.STD)
    assert (crops.whole(image, 224) - transform(pil(image))).abs().max() <= 2.01 / 255 / min(crops.STD)


@pytest.mark.parametrize(("height", "width"), [(1, 4000), (4000, 1)])
def test_whole_of_a_sliver_takes_no_memory_for_what_is_cut_off(height, width):
    ours = crops.whole(picture(height, width), 224, torch.uint8)
    assert ours.shape == (3, 224, 224)
    ahead = picture(height, width).flatten(1)[:, 1999:2001].int()
    assert ours.int().min() >= ahead.min() - 40
    across = ours if width > height else ours.transpose(1, 2)
    assert torch.equal(across, across[:, :1].expand_as(across))


# devices -------------------------------------------------------------------------------------------------------------


def outside(function):
    """A function of host tensors, such as boxes that have values, which fake tensors are kept from."""

    def run(tensor):
        assert not isinstance(tensor, FakeTensor)
        with unset_fake_temporarily():
            return function(tensor)

    return run


def test_no_tensor_is_left_on_another_device_and_nothing_is_read_back(monkeypatch):
    """Fake tensors have no values, so that an .item() or a copy to the host raises; mixed devices raise too."""
    monkeypatch.setattr(torch.Tensor, "numpy", outside(torch.Tensor.numpy))
    boxes = {"cpu": torch.stack([crops.sample_boxes(30, 30, 5)] * 2)}
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = [torch.empty(3, h, w, dtype=torch.uint8, device="cuda") for h, w in ((40, 50), (60, 30))]
        boxes["cuda"] = torch.empty(2, 5, 4, device="cuda")
        for box in boxes.values():
            for dtype in (torch.float32, torch.float16, torch.uint8):
                ours = crops.extract(images, box, 16, dtype)
                assert ours.shape == (2, 5, 3, 16, 16)
                assert (ours.device.type, ours.dtype) == ("cuda", dtype)
        assert crops.extract(images[0], boxes["cuda"][0], 16).device.type == "cuda"
        assert banded(images, boxes["cuda"], 16).device.type == "cuda"
        assert crops.whole(images[0], 16).device.type == "cuda"
        assert crops.whole(images, 16).shape == (2, 3, 16, 16)
        ladder = crops.ladder_boxes(torch.empty(5, 4, device="cuda"), 1.1, 3, 40, 50)
        assert ladder.device.type == "cuda"


@pytest.mark.parametrize("sampler", [crops.sample_boxes, crops.sample_area_boxes])
def test_positions_are_uniform_and_independent(sampler):
    box = sampler(400, 600, 20_000)
    side = box[:, 2:] - box[:, :2]
    place = (box[:, :2] + 0.5) / (torch.tensor([600, 400]) - side + 1)
    jitter = 1e-3 * torch.rand(20_000, generator=torch.Generator().manual_seed(0))  # squares have but one aspect
    found = torch.stack([*place.T, side.prod(1), side[:, 0] / side[:, 1] + jitter]).corrcoef()
    assert found[0, 1].abs() < 0.03
    assert found[:2, 2:].abs().max() < 0.03
    for low in place.T:
        assert abs(low.mean() - 0.5) < 0.01
        assert abs(low.var() - 1 / 12) < 0.002
