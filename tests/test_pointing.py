import pytest
import torch

from upclose import pointing

GENERATOR = torch.Generator().manual_seed(0)


def random_boxes(*shape):
    corner = 60 * torch.rand(*shape, 2, generator=GENERATOR)
    return torch.cat([corner, corner + 5 + 60 * torch.rand(*shape, 2, generator=GENERATOR)], -1)


def test_contains_equals_a_loop_over_crops_and_parts():
    box, part = random_boxes(4, 7), random_boxes(4, 5)
    got = pointing.contains(box, part, 0.4)
    for b in range(4):
        for n in range(7):
            for m in range(5):
                x0, y0, x1, y1 = part[b, m].tolist()
                a0, b0, a1, b1 = box[b, n].tolist()
                width, height = min(x1, a1) - max(x0, a0), min(y1, b1) - max(y0, b0)
                shown = max(width, 0) * max(height, 0) / ((x1 - x0) * (y1 - y0))
                assert got[b, n, m] == (shown >= 0.4)
    assert 0 < got.double().mean() < 1


def test_contains_at_the_edges():
    part = torch.tensor([[10.0, 10.0, 20.0, 20.0]])
    crops = torch.tensor([[0, 0, 40, 40], [10, 10, 20, 20], [13, 10, 40, 40], [15, 10, 40, 40], [20, 20, 40, 40]])
    assert pointing.contains(crops.float(), part).flatten().tolist() == [True, True, True, False, False]
    two_apart = torch.tensor([[30.0, 30.0, 40.0, 40.0]])  # both differences are negative: their product is not
    assert not pointing.contains(two_apart, part).any()


@pytest.mark.parametrize("hundredths", [10, 30, 55, 60, 70, 95, 100])
def test_contains_at_exactly_least_is_decided_in_whole_pixels(hundredths):
    width = torch.arange(1, 301)
    part = torch.stack([torch.zeros(300), torch.zeros(300), width, torch.full((300,), 7)], -1)[:, None]
    crop = torch.stack([torch.zeros(300), torch.zeros(300), width, torch.full((300,), 7)], -1)
    got = pointing.contains(crop, part, hundredths / 100)[..., 0]
    exact = [[100 * min(k, w) >= hundredths * w for k in range(1, 301)] for w in range(1, 301)]
    assert got.tolist() == exact


def test_a_part_that_is_not_there_is_in_no_crop_and_has_no_share():
    parts = [{"beak": (10, 10, 20, 20)}, {"beak": (30, 30, 35, 35), "tail": (0, 0, 5, 5)}]
    boxes = pointing.part_boxes(parts, ["beak", "tail", None])
    assert boxes.shape == (2, 3, 4)
    assert boxes[1, 1].tolist() == [0, 0, 5, 5]
    assert boxes[0, 1].isnan().all()
    assert boxes[:, 2].isnan().all()
    crops = torch.tensor([[[0.0, 0, 25, 25], [26, 26, 50, 50]]]).expand(2, -1, -1)
    inside = pointing.contains(crops, boxes)
    assert inside[:, :, 0].tolist() == [[True, False], [False, True]]
    share = pointing.share(torch.tensor([0.75, 0.25])[:, None].expand(2, 3), inside)
    assert share[:, 0].tolist() == [0.75, 0.25]
    assert share[0, 1].isnan()
    assert share[1, 1] == 0.75
    assert share[:, 2].isnan().all()


def test_share_equals_a_loop_and_does_not_depend_on_the_total():
    mass = torch.rand(3, 6, 4, generator=GENERATOR)
    inside = torch.rand(3, 6, 4, generator=GENERATOR) < 0.5
    inside[:, 0], inside[:, 1] = True, False
    got = pointing.share(mass, inside)
    for b in range(3):
        for m in range(4):
            on = sum(mass[b, n, m].item() for n in range(6) if inside[b, n, m])
            assert got[b, m].item() == pytest.approx(on / mass[b, :, m].sum().item(), rel=1e-5)
    torch.testing.assert_close(pointing.share(mass * torch.tensor([1.0, 2, 30, 0.1]), inside), got)
    order = torch.randperm(6, generator=GENERATOR)
    torch.testing.assert_close(pointing.share(mass[:, order], inside[:, order]), got)


def test_uniform_mass_is_chance_and_certain_mass_is_one_or_zero():
    inside = torch.tensor([[True, True], [True, False], [False, False], [False, False]])
    assert pointing.share(torch.ones(4, 2), inside).tolist() == [0.5, 0.25]
    assert pointing.share(torch.tensor([[0.0, 0], [1, 0], [0, 1], [0, 0]]), inside).tolist() == [1.0, 0.0]


def test_what_cannot_be_told_is_nan():
    everywhere, nowhere = torch.ones(3, 1, dtype=torch.bool), torch.zeros(3, 1, dtype=torch.bool)
    assert pointing.share(torch.rand(3, 1), everywhere).isnan().all()
    assert pointing.share(torch.rand(3, 1), nowhere).isnan().all()
    assert pointing.share(torch.zeros(3, 1), torch.tensor([[True], [False], [True]])).isnan().all()


def test_shuffled_boxes_are_the_same_boxes_and_come_out_at_chance():
    box, part = random_boxes(400, 12), random_boxes(400, 3)
    inside = pointing.contains(box, part, 0.2)
    mass = inside + 0.1  # the best that can be known
    dealt = pointing.shuffled(box, torch.Generator().manual_seed(1))
    assert torch.equal(dealt.sum(-1).sort(1).values, box.sum(-1).sort(1).values)
    assert not torch.equal(dealt, box)
    chance = pointing.share(torch.ones_like(mass), inside)
    assert pointing.share(mass, inside).nanmean() > chance.nanmean() + 0.2
    control = pointing.share(mass, pointing.contains(dealt, part, 0.2)) - chance
    error = control[~control.isnan()].std() / (~control.isnan()).sum() ** 0.5
    assert control.nanmean().abs() < 4 * error
    assert error < 0.02


def test_errors_name_the_shape_and_the_value():
    with pytest.raises(ValueError, match=r"part has shape \(2, 3\)"):
        pointing.contains(torch.zeros(5, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="least is 0"):
        pointing.contains(torch.zeros(5, 4), torch.zeros(2, 4), 0)
