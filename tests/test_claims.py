import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import friedmanchisquare

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
        a, b = (torch.from_numpy(rng.random((2, 200)) < easy) for _ in range(2))
        wrong += claims.check("", "", a, b, seed=trial).verdict in ("holds", "fails")
    assert 0.03 <= wrong / 600 <= 0.07


def test_unpaired_data_is_refused():
    with pytest.raises(ValueError, match="same images"):
        claims.interval(hits(0.5, n=10), hits(0.5, n=11))
    with pytest.raises(ValueError, match="same crop sets"):
        claims.interval(hits(0.5, sets=2), hits(0.5, sets=3))


def test_the_table_says_difference_interval_and_n():
    frame = claims.table([claims.check("C1", "a beats b", hits(0.7, sets=5), hits(0.5, sets=1))], unit="seed")
    assert re.fullmatch(r"\+\d\d\.\d \[\+\d\d\.\d, \+\d\d\.\d\]", frame.difference[0])
    assert frame.n[0] == "500 images x 5 seeds"
    assert claims.table([claims.check("C1", "", hits(0.7), hits(0.5))]).n[0] == "500 images x 3 crop sets"


def test_a_gain_below_the_margin_fails():
    assert claims.check("C", "", hits(0.7), hits(0.5, seed=1), margin=40).verdict == "fails"


def test_the_interval_is_of_percentiles_and_of_a_seed():
    few = torch.zeros(1, 20, dtype=torch.bool)
    few[0, 0] = True
    assert claims.interval(few, torch.zeros_like(few))[1:] == (0, 15)  # reflected it would be (-5, 10)
    assert claims.interval(hits(0.7), hits(0.5, seed=1), seed=1) != claims.interval(
        hits(0.7), hits(0.5, seed=1), seed=2
    )


def one(low, high, margin=0.0, p=1.0, within=1.0):
    return claims.Claim("C", "", (low + high) / 2, low, high, margin, 500, 3, p, within)


def test_equal_is_an_interval_that_lies_within_what_does_not_matter():
    assert one(-0.9, 1.0).verdict == "equal"
    assert one(-0.9, 1.1).verdict == "undecided"
    assert one(-1.1, 0.9).verdict == "undecided"
    assert one(-0.9, 1.1, within=2).verdict == "equal"
    assert one(0.1, 0.9).verdict == "holds"  # small, but there
    assert one(-0.9, -0.1).verdict == "fails"
    assert one(4.5, 5.5, margin=5).verdict == "equal"
    assert claims.check("C", "", hits(0.5), hits(0.5), equal_within=0.0).verdict == "equal"


def test_equal_is_said_of_a_difference_that_matters_in_five_per_cent_at_most():
    rng = np.random.default_rng(5)
    said = []
    for trial in range(300):  # the truth is one point, at the border of what does not matter
        draw = rng.random((1, 4000))
        worse, better = (torch.from_numpy(draw < rate) for rate in (0.04, 0.05))
        said.append(claims.check("", "", better, worse, seed=trial).verdict)
    assert said.count("equal") / 300 <= 0.05
    assert said.count("holds") > 0  # the test has something to see


def named(name, text):
    return one(1, 3)._replace(name=name, text=text)


def test_claims_are_grouped_by_their_number_under_the_words_that_they_share():
    asked = [named("C1 photo", "A > B: much, photo"), named("P0", "chance"), named("C1 art", "A > B: much, art")]
    asked += [named("A5 k=1, art", "the box beats: noise"), named("A5 k=4, art", "the box beats: the mean")]
    said = {heading: [claim.name for claim in members] for heading, members in claims.grouped(asked).items()}
    assert said == {
        "C1 A > B: much": ["C1 photo", "C1 art"],
        "P0 chance": ["P0"],
        "A5 the box beats": ["A5 k=1, art", "A5 k=4, art"],
    }
    assert list(claims.grouped([named("C1 a", "x y"), named("C1 b", "z y")])) == ["C1"]
    assert claims.grouped([]) == {}


def test_p_and_interval_say_the_same():
    for trial in range(40):
        claim = claims.check("", "", hits(0.53, n=300, seed=trial), hits(0.5, n=300, seed=trial + 99))
        assert abs(claim.p - 0.05) < 0.002 or (claim.p < 0.05) == (claim.verdict in ("holds", "fails"))
    assert claims.check("", "", hits(0.5), hits(0.5)).p == 1
    assert claims.check("", "", hits(0.9), hits(0.1)).p == pytest.approx(2 / 10_001)


def test_holms_rule_against_a_loop():
    p = [0.01, 0.04, 0.03, 0.005, 0.5]
    expected, most = [0.0] * 5, 0.0
    for k, i in enumerate(sorted(range(5), key=lambda i: p[i])):
        most = expected[i] = min(1.0, max(most, (5 - k) * p[i]))
    assert claims.holm(p) == pytest.approx(expected)
    assert claims.holm([0.02]) == [0.02]
    assert claims.holm([]) == []


def test_of_ten_claims_about_equal_methods_one_stands_in_five_per_cent():
    families = np.random.default_rng(7).random((4000, 10))
    assert np.mean([min(claims.holm(p)) < 0.05 for p in families]) == pytest.approx(0.05, abs=0.01)


def test_the_table_says_power_and_what_stands():
    frame = claims.table([one(1.0, 3.0, p=0.02), one(2.0, 3.0, p=0.001), one(-0.5, 0.6), one(-4.0, 3.0)])
    assert frame.verdict.tolist() == ["holds", "holds", "equal", "undecided"]
    assert frame["half-width"].tolist() == pytest.approx([1.0, 0.5, 0.6, 3.5], abs=0.06)
    assert frame["images to halve it"].tolist() == [2000] * 4
    assert frame["after Holm"].tolist() == ["", "stands", "", ""]
    assert claims.count([one(1, 3, p=0.04), one(-3, -1, p=0.001), one(-9, 9)]) == (
        "3 claims: 1 hold (0 after Holm), 1 fail (1 after Holm), 1 undecided"
    )
    assert claims.table([]).empty


def test_four_times_the_images_halve_the_interval():
    rng = np.random.default_rng(2)
    few, many = (claims.check("", "", *torch.from_numpy(rng.random((2, 1, n)) < 0.5)).half_width for n in (1000, 4000))
    assert few / many == pytest.approx(2, rel=0.05)


def methods(n=400):
    return {"A": hits(0.7, n=n), "B": hits(0.5, sets=1, n=n, seed=1), "C": hits(0.6, n=n, seed=2)}


def test_the_matrix_says_of_every_pair_what_a_check_says():
    measured = methods()
    found = claims.matrix(claims.pairs(measured, dataset="cub"))
    assert found[["method", "rival"]].values.tolist() == [["A", "B"], ["A", "C"], ["B", "C"]]
    for line in found.to_dict("records"):
        test = claims.check("", "", measured[line["method"]], measured[line["rival"]])
        assert (line["low"], line["high"], line["p"], line["n"]) == (test.low, test.high, test.p, test.n)
        assert line["difference"] == pytest.approx(test.difference)
    assert found["p after Holm"].tolist() == claims.holm(found.p.tolist())


def test_pairs_survive_a_file_and_are_as_short_for_many_images(tmp_path):
    written = claims.pairs(methods(), dataset="cub", backbone="x")
    written.to_csv(tmp_path / "pairs.csv", index=False)
    assert claims.matrix(pd.read_csv(tmp_path / "pairs.csv")).equals(claims.matrix(written))
    assert claims.pairs(methods(4000)).gaps.str.len().max() <= written.gaps.str.len().max() + 7


def test_a_methods_gaps_are_counted():
    two = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).bool(), torch.tensor([0, 0, 1, 0]).bool()
    assert claims.pairs({"A": two[0], "B": two[1]}).gaps.tolist() == ["1 0 1 1 1"]
    with pytest.raises(ValueError, match="gaps of A and B are '1 x 2'"):
        claims.matrix(pd.DataFrame([{"method": "A", "rival": "B", "gaps": "1 x 2"}]))
    with pytest.raises(ValueError, match="odd number of counts"):
        claims.matrix(pd.DataFrame([{"method": "A", "rival": "B", "gaps": "1 2"}]))


def test_each_matrix_has_a_correction_of_its_own():
    several = pd.concat([claims.pairs(methods(n), dataset=d) for d, n in (("cub", 400), ("dtd", 60))])
    found = claims.matrix(several.reset_index(drop=True))
    for _, lines in found.groupby("dataset"):
        assert lines["p after Holm"].tolist() == claims.holm(lines.p.tolist())


def test_a_square_changes_its_sign_on_the_other_side():
    found = claims.matrix(claims.pairs(methods()))
    square = claims.square(found)
    assert list(square) == list(square.index) == ["A", "B", "C"]
    assert np.allclose(square, -square.T, equal_nan=True)
    assert square.loc["A", "C"] == found.difference[1]
    p = claims.square(found, "p after Holm")
    assert p.loc["C", "A"] == p.loc["A", "C"] == found["p after Holm"][1]


def test_signs_are_counted_over_backbones():
    lines = [
        ("x", "A", "B", 1.0),
        ("y", "A", "B", 2.0),
        ("z", "A", "B", -1.0),
        ("x", "A", "C", 0.0),
        ("y", "A", "C", -3.0),
    ]
    frame = pd.DataFrame(lines, columns=["backbone", "method", "rival", "difference"])
    assert claims.same_sign(frame).tolist() == ["2 of 3"] * 3 + ["1 of 2"] * 2
    turned = frame.assign(method=frame.rival, rival=frame.method, difference=-frame.difference)
    mixed = pd.concat([frame[frame.backbone == "x"], turned[frame.backbone != "x"]]).sort_index()
    assert claims.same_sign(mixed).equals(claims.same_sign(frame))  # a run writes its best method first


def test_concordance_is_friedmans_statistic():
    rng = np.random.default_rng(0)
    for ties in (False, True):
        values = rng.integers(0, 4, (5, 7)) if ties else rng.random((5, 7))
        chi = friedmanchisquare(*values.T).statistic
        assert claims.concordance(values) == pytest.approx(chi / (5 * (7 - 1)))
    assert claims.concordance(np.stack([values, values])).shape == (2,)


def test_concordance_of_one_order_and_of_opposite_ones():
    assert claims.concordance([[1, 2, 3], [10, 20, 30], [0.1, 0.2, 0.9]]) == 1
    assert claims.concordance([[1, 2, 3], [3, 2, 1]]) == 0
    assert np.isnan(claims.concordance([[1, 1], [2, 2]]))


def test_ranks_of_clear_differences_are_alike_and_those_of_none_are_anything():
    clear = [{"A": hits(0.9, seed=k), "B": hits(0.6, seed=k + 9), "C": hits(0.2, seed=k + 99)} for k in range(3)]
    assert claims.ranks_alike(clear) == (1, 1, 1)
    none = [{name: hits(0.5, n=200, seed=9 * k + j) for j, name in enumerate("ABCDE")} for k in range(3)]
    w, low, high = claims.ranks_alike(none)
    assert low < 1 / 3 < high
    assert claims.ranks_alike(none) == (w, low, high)
    with pytest.raises(ValueError, match="two encoders or more, not on 1"):
        claims.ranks_alike(clear[:1])
    with pytest.raises(ValueError, match="same methods"):
        claims.ranks_alike([clear[0], {"A": clear[1]["A"]}])
    with pytest.raises(ValueError, match="same images"):
        claims.ranks_alike([clear[0], {name: hits(0.5, n=9) for name in "ABC"}])
