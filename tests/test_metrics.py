import numpy as np
import pytest
import torch

from upclose import metrics


def test_correct_is_argmax_and_topk_on_random_scores():
    scores = torch.randn(200, 17, generator=torch.Generator().manual_seed(0))
    label = torch.arange(200) % 17
    assert torch.equal(metrics.correct(scores, label), scores.argmax(1) == label)
    for k in (2, 5):
        assert torch.equal(metrics.correct(scores, label, k), (scores.topk(k).indices == label[:, None]).any(1))


def test_ties_go_to_the_lower_index_as_in_argmax():
    scores = torch.ones(3, 3)
    assert metrics.correct(scores, torch.arange(3)).tolist() == [True, False, False]
    assert metrics.correct(scores, torch.arange(3), 2).tolist() == [True, True, False]


def test_scores_that_are_not_finite_are_refused():
    scores = torch.zeros(4, 2)
    scores[2, 1] = float("nan")
    with pytest.raises(ValueError, match="image 2"):
        metrics.correct(scores, torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="k >= 1"):
        metrics.correct(scores[:2], torch.zeros(2, dtype=torch.long), 0)


def test_per_class_and_confusion_against_loops():
    scores = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
    label = torch.arange(60) % 3  # class 3 has no image
    hit = metrics.correct(scores, label)
    by_class = metrics.per_class(hit, label, 4)
    for c in range(3):
        assert by_class[c].item() == pytest.approx(100 * np.mean([h for h, y in zip(hit.tolist(), label) if y == c]))
    assert by_class[3].isnan()
    table = torch.zeros(4, 4, dtype=torch.long)
    for row, y in zip(scores, label):
        table[y, row.argmax()] += 1
    assert torch.equal(metrics.confusion(scores, label), table)


def test_the_spread_of_crop_sets():
    assert metrics.spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert np.isnan(metrics.spread([1.0]).std)


def test_accuracy_of_the_best_and_of_the_two_best():
    scores, label = torch.tensor([[3.0, 2.0, 1.0]] * 4), torch.tensor([0, 1, 1, 2])
    assert metrics.accuracy(scores, label) == 25
    assert metrics.accuracy(scores, label, 2) == 75


def test_a_row_of_several_crop_sets():
    hits = torch.tensor([[True, True, False, True], [True, False, False, False]])
    line = metrics.row("method", hits, dataset="set", backbone="model")
    assert (line["value"], line["n"]) == (50, 4)
    assert line["std"] == pytest.approx(25 * 2**0.5)


def test_one_label_for_all_images_is_refused():
    with pytest.raises(ValueError, match=r"3 images, but labels \(1,\)"):
        metrics.correct(torch.eye(3), torch.tensor([0]))


def test_standardised_scores_have_one_spread_and_the_same_answers():
    scores = torch.tensor([[1.0, 2.0, 6.0], [0.1, 0.3, 0.2], [4.0, 4.0, 4.0]])
    found = metrics.standardised(scores)
    assert torch.allclose(found.mean(1), torch.zeros(3), atol=1e-6)
    assert torch.allclose(found.std(1), torch.tensor([1.0, 1.0, 0.0]))
    assert found[:2].argmax(1).tolist() == [2, 1]
    assert torch.allclose(metrics.standardised(5 * scores + 3), found, atol=1e-6)


def test_errors_in_common():
    first, second = torch.tensor([1, 1, 0, 0, 0]).bool(), torch.tensor([1, 0, 1, 0, 0]).bool()
    assert metrics.errors_in_common(first, second) == metrics.errors_in_common(second, first) == 0.5
    assert metrics.errors_in_common(first, ~first) == 0
    assert metrics.errors_in_common(first, first) == 1
