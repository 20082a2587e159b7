import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from upclose import plots
from upclose.claims import Claim
from upclose.methods import REGISTRY


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def centres(ax):
    """(x, y) of every point that was drawn with its interval, in order."""
    return [tuple(float(v[0]) for v in container.lines[0].get_data()) for container in ax.containers]


def ends(ax):
    """(left, right) of every interval, in order."""
    return [tuple(container.lines[2][0].get_segments()[0][:, 0]) for container in ax.containers]


def ticks(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


def test_a_picture_with_named_boxes(ax):
    pixels = np.arange(3 * 4 * 6, dtype=np.uint8).reshape(3, 4, 6)
    plots.picture(ax, pixels, {"beak": (1, 0, 3, 2), "tail": (0, 1, 2, 4)}, weights=[1.0, 3.0], title="a bird")
    (image,) = ax.get_images()
    assert np.array_equal(image.get_array(), np.moveaxis(pixels, 0, -1))
    assert [patch.get_bbox().bounds for patch in ax.patches] == [(1, 0, 2, 2), (0, 1, 2, 3)]
    assert ax.patches[0].get_linewidth() < ax.patches[1].get_linewidth()
    assert [text.get_text() for text in ax.texts] == ["beak", "tail"]
    assert "a bird" in {ax.get_title(place) for place in ("left", "center")}


def test_a_picture_with_boxes_alone_has_no_names_and_equal_lines(ax):
    plots.picture(ax, np.zeros((3, 4, 4), np.uint8), [(0, 0, 2, 2), (1, 1, 3, 3)])
    assert len(ax.patches) == 2
    assert len({patch.get_linewidth() for patch in ax.patches}) == 1
    assert not ax.texts


def test_colours_go_by_the_longest_known_name():
    assert plots.colour("WCA (N=16)") == plots.colour("WCA") != plots.colour("WCA (released)")
    assert plots.colour("CLIP+D") == plots.colour("CLIP") != plots.colour("CLIP-D")
    assert plots.colour("nobody's") not in {method.colour for method in REGISTRY.values()}


def test_intervals_from_the_spread_over_crop_sets_and_from_given_ends(ax):
    frame = pd.DataFrame({"method": ["CLIP", "WCA"], "value": [20.0, 30.0], "std": [np.nan, 2.0]})
    plots.intervals(ax, frame, reference="CLIP")
    assert centres(ax) == [(20.0, 0.0), (30.0, 1.0)]
    assert ends(ax) == [(20.0, 20.0), (28.0, 32.0)]
    assert ticks(ax) == ["CLIP", "WCA"]
    assert ax.yaxis_inverted()  # the first row on top
    ax.clear()
    plots.intervals(ax, frame.assign(low=[19.0, 25.0], high=[22.0, 31.0]))
    assert ends(ax) == [(19.0, 22.0), (25.0, 31.0)]


CLAIMS = [
    Claim("C1 photo", "a > b, photo", 3.0, 1.0, 5.0, 0.0, 10, 3),
    Claim("C1 art", "a > b, art", -3.0, -5.0, -1.0, 0.0, 10, 3),
    Claim("C2 photo", "a > c by a point", 1.0, -1.0, 3.0, 1.0, 10, 3),
    Claim("P0", "chance", 0.0, -0.5, 0.5, 0.0, 10, 3),
]


def test_the_ledger_says_claims_and_verdicts_in_words():
    (ax,) = plots.ledger_figure(CLAIMS).axes
    assert ticks(ax) == ["C1 a > b", "photo", "art", "C2 a > c by a point, photo", "P0 chance"]
    assert centres(ax) == [(3.0, 1.0), (-3.0, 2.0), (1.0, 3.0), (0.0, 4.0)]
    assert np.allclose(ends(ax), [(1, 5), (-5, -1), (-1, 3), (-0.5, 0.5)])
    said = [(text.get_text(), text.get_position()[1]) for text in ax.texts]
    assert said == [("holds", 1), ("fails", 2), ("undecided", 3), ("equal", 4)]
    shades = [container.lines[0].get_color() for container in ax.containers]
    assert [text.get_color() for text in ax.texts] == shades
    assert len({*map(to_hex, shades)}) == 4
    margins = [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 2 and line.get_linewidth() == 1]
    assert margins == [0.0, 0.0, 1.0, 0.0]
    assert [tuple(band.get_datalim(ax.transData).intervalx) for band in ax.collections[::2]][2:] == [(0, 2), (-1, 1)]
    assert ax.yaxis_inverted()


def test_rows_of_the_ledger_have_the_same_height_however_many_there_are():
    few, many = (plots.ledger_figure([c._replace(name=f"C{k}") for k, c in enumerate(CLAIMS * n)]) for n in (1, 8))
    assert many.get_figheight() - few.get_figheight() == pytest.approx(28 * 0.24)


def test_differences_have_a_line_each_with_their_interval_and_note(ax):
    gaps = {"CLIP": (2.0, 1.0, 4.0), "LaZSL (mean)": (-1.0, -2.0, 0.5)}
    plots.differences(ax, gaps, notes=["two", "minus one"], shift=0.2)
    assert centres(ax) == [(2.0, 0.2), (-1.0, 1.2)]
    assert [tuple(round(float(x), 6) for x in end) for end in ends(ax)] == [(1.0, 4.0), (-2.0, 0.5)]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == list(gaps)
    assert [text.get_text() for text in ax.texts] == ["two", "minus one"]
    assert ax.yaxis_inverted()


def test_a_crop_is_the_inside_of_its_box(ax):
    pixels = np.arange(3 * 8 * 10, dtype=np.uint8).reshape(3, 8, 10)
    plots.crop(ax, pixels, (2.0, 1.0, 6.0, 5.0), shade="#ff0000")
    assert np.array_equal(ax.images[0].get_array(), np.moveaxis(pixels[:, 1:5, 2:6], 0, -1))
    assert to_hex(ax.spines["left"].get_edgecolor()) == "#ff0000"


def test_a_plan_has_a_row_a_crop_and_a_column_an_attribute(ax):
    mass = np.array([[0.1, 0.4, 0.0], [0.2, 0.0, 0.3]])
    image = plots.plan(ax, mass, ["head", "wing"], ["beak", "cap", "legs"], numbers=True)
    assert np.array_equal(image.get_array(), mass)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["beak", "cap", "legs"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["head", "wing"]
    assert [text.get_text() for text in ax.texts] == ["0.10", "0.40", "0.00", "0.20", "0.00", "0.30"]


def test_a_dollar_in_a_name_is_a_dollar():
    figure, axes = plt.subplots(1, 2)
    name = r"$5 \input{x} $6"
    plots.picture(axes[0], np.zeros((3, 8, 8), np.uint8), {name: (0, 0, 4, 4)}, title=name)
    plots.plan(axes[1], np.eye(2), [name, "b"], ["a", name], title=name)
    figure.canvas.draw()
    plt.close(figure)


def test_the_front_is_what_nothing_cheaper_beats(ax):
    rows = [
        ("CLIP", 1, 40.0),
        ("CuPL", 1, 44.0),
        ("WCA", 4, 43.0),
        ("WCA", 8, 50.0),
        ("LGCA", 8, 48.0),
        ("D&D", 16, 50.0),
    ]
    frame = pd.DataFrame(rows, columns=["method", "encodings", "value"])
    plots.pareto(ax, frame.assign(low=frame.value - 2, high=frame.value + 3), "encodings")
    front = ax.lines[-1]
    assert front.get_xydata().tolist() == [[1, 44], [8, 50]]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "4", "8", "16"]
    bars = {tuple(c.lines[2][0].get_segments()[0][:, 1]) for c in ax.containers}
    assert bars == {(38, 43), (42, 47), (48, 53), (46, 51)}  # of each method's dearest point
    assert ax.get_xlabel() == "encodings an image"
