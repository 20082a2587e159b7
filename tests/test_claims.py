import numpy as np
import pytest
import torch

from upclose import claims


def hits(rate, sets=3, n=500, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random((sets, n)) < rate)


def test_verdicts():
    assert claims.check("C1", "", hits(0.7), hits(0.5, seed=1)).verdict == "holds"
    assert claims.check("C1", "", hits(0.5), hits(0.7, seed=1)).verdict == "fails"
    assert claims.check("C1", "", hits(0.5), hits(0.5, seed=1)).verdict == "undecided"
    assert claims.check("C1", "", hits(0.7), hits(0.5, seed=1), margin=20).verdict == "undecided"


def test_a_method_against_itself_has_no_difference():
    assert claims.interval(hits(0.6), hits(0.6)) == (0.0, 0.0, 0.0)


def test_interval_is_that_of_the_paired_difference():
    a, b = hits(0.6, sets=1, n=4000), hits(0.5, sets=1, n=4000, seed=1)
    difference, low, high = claims.interval(a, b)
    gap = 100 * (a.double() - b.double())
    assert difference == pytest.approx(gap.mean().item())
    assert (high - low) / (2 * 1.96 * gap.std().item() / 4000**0.5) == pytest.approx(1, abs=0.03)


def test_a_method_without_crops_is_compared_with_every_crop_set():
    a, b = hits(0.7), hits(0.5, sets=1, seed=1)
    assert claims.interval(a, b)[0] == pytest.approx(claims.interval(a, b.expand(3, -1))[0])


def test_equal_methods_are_told_apart_in_about_five_per_cent():
    rng = np.random.default_rng(3)
    wrong = 0
    for trial in range(600):
        easy = rng.beta(2, 2, 200)  # images differ in difficulty, shared by both methods
        a, b = (torch.from_numpy(rng.random((5, 200)) < easy) for _ in range(2))
        wrong += claims.check("", "", a, b, seed=trial).verdict != "undecided"
    assert 0.03 <= wrong / 600 <= 0.07


def test_unpaired_data_is_refused():
    with pytest.raises(ValueError, match="same images"):
        claims.interval(hits(0.5, n=10), hits(0.5, n=11))
    with pytest.raises(ValueError, match="same crop sets"):
        claims.interval(hits(0.5, sets=2), hits(0.5, sets=3))


def test_ledger_says_difference_interval_and_n():
    frame = claims.ledger([claims.check("C1", "a beats b", hits(0.7), hits(0.5, seed=1))])
    assert list(frame.columns) == ["claim", "text", "verdict", "difference", "margin", "n"]
    assert frame.n[0] == "500 images x 3 crop sets"
    assert claims.ledger([claims.check("C1", "", hits(0.7, sets=5), hits(0.5, sets=1))], unit="seed").n[0] == (
        "500 images x 5 seeds"
    )


def test_a_gain_below_the_margin_fails():
    assert claims.check("C", "", hits(0.7), hits(0.5, seed=1), margin=40).verdict == "fails"


def test_the_interval_is_of_percentiles_and_of_a_seed():
    few = torch.zeros(1, 20, dtype=torch.bool)
    few[0, 0] = True
    assert claims.interval(few, torch.zeros_like(few))[1:] == (0, 15)  # reflected it would be (-5, 10)
    assert claims.interval(hits(0.7), hits(0.5, seed=1), seed=1) != claims.interval(
        hits(0.7), hits(0.5, seed=1), seed=2
    )
