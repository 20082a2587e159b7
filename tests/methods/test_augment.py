"""Strong views of batches against torchvision's operations, a picture at a time."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import v2

from upclose import crops, seeds
from upclose.methods import augment
from upclose.methods.augment import Draw

SIZE = 24


def pictures(n=3, seed=0):
    draw = seeds.generator(seed, "augment")
    return torch.randint(20, 210, (n, 3, SIZE, SIZE), generator=draw, dtype=torch.uint8)


def theirs(x, name, sign):
    """One operation as `v2.RandAugment` does it, at its default magnitude."""
    library = v2.RandAugment()
    values, signed = library._AUGMENTATION_SPACE[name]
    values = values(31, SIZE, SIZE)
    amount = 0.0 if values is None else float(values[9]) * (sign if signed else 1)
    return library._apply_image_or_video_transform(
        x, name, amount, interpolation=v2.InterpolationMode.NEAREST, fill={torch.Tensor: None}
    )


def test_the_operations_are_torchvision_s():
    assert set(augment.OPERATIONS) == set(v2.RandAugment._AUGMENTATION_SPACE)
    assert v2.RandAugment().num_ops == augment.SLOTS


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_an_operation_is_torchvision_s(name, sign):
    x = pictures()
    ours = augment.augment(x, [Draw(None, i == 1, ((name, sign), ("Identity", 1))) for i in range(3)])
    expected = torch.stack([theirs(picture.flip(-1) if i == 1 else picture, name, sign) for i, picture in enumerate(x)])
    assert ours.dtype == torch.uint8
    assert (ours != expected).float().mean() < 5e-3  # of nearest pixels a few lie halfway
    if name not in augment.MOVES:
        assert (ours.int() - expected.int()).abs().max() <= 1
    if name != "Identity":
        assert not torch.equal(ours[0], x[0])


def test_operations_follow_each_other_and_pictures_do_not_meet():
    x = pictures(4)
    names = [("Rotate", "Solarize"), ("Equalize", "ShearX"), ("Identity", "Identity"), ("Color", "Posterize")]
    draws = [Draw(None, False, ((a, 1), (b, -1))) for a, b in names]
    ours = augment.augment(x, draws)
    for i, (a, b) in enumerate(names):
        expected = theirs(theirs(x[i], a, 1), b, -1)
        assert (ours[i] != expected).float().mean() < 1e-2
        assert torch.equal(augment.augment(x[i : i + 1], draws[i : i + 1])[0], ours[i])
    assert torch.equal(ours[2], x[2])


def test_a_view_depends_on_seed_and_key_alone():
    shapes = [(30, 40), (50, 20), (33, 33)]
    some = [torch.randint(0, 256, (3, *shape), dtype=torch.uint8) for shape in shapes]
    cpu = torch.device("cpu")
    together = augment.views(some, ["a", "b", "c"], SIZE, 7, cpu)
    assert torch.equal(augment.views(some[1:], ["b", "c"], SIZE, 7, cpu), together[1:])
    assert not torch.equal(augment.views(some, ["a", "b", "c"], SIZE, 8, cpu), together)
    plain = augment.draw(30, 40, 7, "a")
    cut = crops.extract(some[0], plain.box[None], SIZE, torch.uint8)
    assert torch.equal(augment.augment(cut, [plain])[0], together[0])


def test_draws_are_uniform():
    draws = [augment.draw(30, 40, 0, str(i)) for i in range(1400)]
    flips = sum(each.flip for each in draws) / len(draws)
    assert abs(flips - 0.5) < 0.06
    for slot in range(augment.SLOTS):
        names = [each.operations[slot][0] for each in draws]
        counts = [names.count(name) for name in augment.OPERATIONS]
        assert min(counts) > 60
        assert max(counts) < 145
        assert abs(sum(each.operations[slot][1] for each in draws)) / len(draws) < 0.12
    area = torch.stack([(each.box[2:] - each.box[:2]).prod() / 1200 for each in draws])
    assert area.min() >= 0.06
    assert math.isclose(area.mean(), 0.54, abs_tol=0.03)


def test_no_device_is_waited_for():
    draws = [augment.draw(30, 40, 0, str(i)) for i in range(40)]
    assert {name for each in draws for name, _ in each.operations} == set(augment.OPERATIONS)
    with FakeTensorMode():
        x = augment.augment(torch.empty(40, 3, SIZE, SIZE, dtype=torch.uint8, device="cuda"), draws)
        assert (x.device.type, x.dtype, x.shape) == ("cuda", torch.uint8, (40, 3, SIZE, SIZE))
