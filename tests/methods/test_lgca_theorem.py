from math import log2

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from upclose import seeds
from upclose.features import Ladder, Text, Views
from upclose.methods import lgca, lgca_theorem, wca


def features(n, m, classes=1, batch=1, dim=16):
    draw = seeds.generator(0, "complexity", n, m)

    def unit(*shape):
        return normalize(torch.randn(*shape, dim, generator=draw, dtype=torch.float64), dim=-1)

    text = Text.from_lists(unit(classes), list(unit(classes, m)))
    return unit(batch, lgca.steps(n), n), unit(batch), text


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 3), (5, 1), (16, 4), (33, 6), (64, 2)])
def test_the_counted_algorithm_is_lgca_and_its_counts_are_those_of_its_sets(n, m):
    ladder, image, text = features(n, m)
    similarity, steps = lgca_theorem.count(ladder[0], image[0], text.label[0], text.description)
    assert similarity == pytest.approx(lgca.scores(Ladder(image, ladder), text).item(), abs=1e-6)
    sets = lgca.trace(Ladder(image, ladder), text)[0, 0].sum(-1).tolist()
    assert [step.encodings for step in steps] == sets
    assert [step.entries for step in steps] == [size * m for size in sets]
    assert all(step.comparisons >= step.entries - 1 for step in steps)


@pytest.mark.parametrize("n", [2, 8, 32, 100])
@pytest.mark.parametrize("m", [1, 4, 16])
def test_measured_counts_lie_between_q_and_the_worst_case(n, m):
    ladder, image, text = features(n, m)
    found = lgca_theorem.total(lgca_theorem.count(ladder[0], image[0], text.label[0], text.description)[1])
    low, high = lgca_theorem.non_expanding(n, m), lgca_theorem.worst_case(n, m)
    assert all(a <= b <= c for a, b, c in zip(low, found, high))
    assert found.encodings < 2 * n
    assert high.comparisons < 2 * n * m * log2(n * m) + 1e-9


def test_the_worst_case_at_a_power_of_two():
    assert lgca_theorem.worst_case(8, 2) == (8 + 4 + 2, 28, 16 * 4 + 8 * 3 + 4 * 2)
    assert lgca_theorem.equation_9(8, 2) == (8 + 4 + 2, 28, 8 * 3 + 4 * 2 + 2 * 1)


def test_the_theorem_holds_with_a_constant_for_every_size():
    ratio = [
        sum(lgca_theorem.worst_case(n, m)[1:]) / (n * m * (1 + np.log(m) + np.log(n)))
        for n in range(2, 513)
        for m in (1, 2, 3, 8, 64)
    ]
    assert max(ratio) < 2 / np.log(2)


def test_the_counted_sort_is_a_stable_descending_sort():
    values = torch.randint(0, 5, (40,), generator=seeds.generator(0, "sort"))
    order, comparisons = lgca_theorem._counted_sort(values.tolist())
    assert order == values.sort(descending=True, stable=True).indices.tolist()
    assert lgca_theorem._counted_sort([3.0, 2.0, 1.0]) == ([0, 1, 2], 2)
    assert comparisons > 39


def test_q_makes_the_matrix_and_equals_wca():
    ladder, image, text = features(12, 5, classes=3, batch=2)
    views = Views(image, ladder[:, 0])
    assert torch.allclose(lgca_theorem.q(views, text).float(), wca.scores(views, text), atol=1e-6)
    ragged = Text.from_lists(text.label[:2], [text.description[:1], text.description[:2]])
    with pytest.raises(ValueError, match="same number of descriptions"):
        lgca_theorem.q(views, ragged)


def test_exponents_find_a_power_law_and_cover_it():
    n, m = (x.ravel() for x in np.meshgrid([2, 8, 32, 128], [1, 4, 16]))
    exact = lgca_theorem.exponents(n, m, 1e-6 * n**1.5 * m**0.5)
    assert (exact.crops, exact.descriptions) == pytest.approx((1.5, 0.5))
    rng, covered = seeds.rng(0, "exponents"), 0
    for _ in range(400):
        fit = lgca_theorem.exponents(n, m, n**1.5 * m**0.5 * np.exp(0.2 * rng.standard_normal(len(n))))
        covered += fit.crops_interval[0] < 1.5 < fit.crops_interval[1]
    assert 0.92 < covered / 400 < 0.98
    with pytest.raises(ValueError, match="3 measurements"):
        lgca_theorem.exponents(n[:3], m[:3], n[:3])


def test_encodings_as_the_classes_grow():
    selected = torch.zeros(2, 3, 2, 4, dtype=torch.bool)
    selected[:, :, 0] = True
    selected[:, 0, 1, 0] = selected[:, 1, 1, 0] = selected[0, 2, 1, 3] = True
    rows = lgca_theorem.encodings(selected, [1, 2, 3])
    assert [row["naive"] for row in rows] == [5, 10, 14.5]
    assert [row["lazy"] for row in rows] == [5, 5, 5.5]
    assert {row["ladder"] for row in rows} == {8}
    with pytest.raises(ValueError, match="4 classes"):
        lgca_theorem.encodings(selected, [4])
