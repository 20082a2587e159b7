"""One look for every figure: seaborn's white grid, a colour-blind safe palette, one colour a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from upclose import methods
from upclose.claims import Claim, grouped

_PALETTE = sns.color_palette("colorblind", 10).as_hex()
_VERDICTS = {"holds": _PALETTE[2], "fails": _PALETTE[3], "equal": _PALETTE[0], "undecided": _PALETTE[7]}


def style() -> None:
    """Set the style; a notebook calls it once."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", font_scale=0.85)
    plt.rcParams |= {
        "figure.dpi": 90,
        "savefig.dpi": 120,
        "figure.constrained_layout.use": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": "medium",
        "axes.titlelocation": "left",
        "svg.hashsalt": "upclose",
    }


def colour(method: str) -> str:
    """The colour of a method, by the longest registered name that its name starts with; black where there is none."""
    known = [name for name in methods.REGISTRY if method.startswith(name)]
    return methods.REGISTRY[max(known, key=len)].colour if known else "#333333"


def picture(
    ax: Axes,
    pixels,
    boxes: Sequence | Mapping[str, Sequence] = (),
    weights: Sequence[float] | None = None,
    title: str = "",
    colour: str = "#ffd400",
) -> None:
    """A picture with boxes on it.

    Args:
        ax: to draw on
        pixels: (3, H, W) uint8
        boxes: (x0, y0, x1, y1) each, or name -> box to have them labelled
        weights: one a box; the line is the thicker the larger the weight
        title: above the picture
        colour: of the boxes
    """
    ax.imshow(np.moveaxis(np.asarray(pixels), 0, -1))
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, loc="center", parse_math=False)  # a "$" in a name is a dollar
    ax.grid(False)
    names = list(boxes) if isinstance(boxes, Mapping) else [None] * len(boxes)
    rows = list(boxes.values()) if isinstance(boxes, Mapping) else list(boxes)
    relative = np.ones(len(rows)) if weights is None else np.asarray(weights, float) / max(np.max(weights), 1e-12)
    for name, (x0, y0, x1, y1), weight in zip(names, rows, relative):
        ax.add_patch(
            Rectangle(
                (x0, y0), x1 - x0, y1 - y0, fill=False, ec=colour, lw=0.6 + 2 * weight, alpha=0.35 + 0.65 * weight
            )
        )
        if name is not None:
            look = {"fc": colour, "ec": "none", "pad": 0.6}
            ax.text(x0, y0 - 1, name, fontsize=6, color="black", bbox=look, parse_math=False)


def crop(ax: Axes, pixels, box: Sequence[float], title: str = "", shade: str | None = None) -> None:
    """What a box holds of a picture, with a frame in a colour of choice.

    Args:
        ax: to draw on
        pixels: (3, H, W) uint8, the whole picture
        box: x0, y0, x1, y1 in pixels
        title: above
        shade: of the frame, None for no frame
    """
    x0, y0, x1, y1 = (int(x) for x in box)
    picture(ax, pixels[:, y0:y1, x0:x1], title=title)
    ax.title.set_fontsize(8)
    if shade is not None:
        for spine in ax.spines.values():
            spine.set(visible=True, color=shade, lw=2.5)


def plan(
    ax: Axes,
    mass,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
    numbers: bool = False,
    **look,
) -> AxesImage:
    """A transport plan, or any other matching of crops with attributes, as a matrix.

    Args:
        ax: to draw on
        mass: (N, M)
        rows: N names
        columns: M names
        title: above
        numbers: write each entry into its field
        look: of `Axes.imshow`: cmap, vmin, vmax, norm, aspect

    Returns:
        the image, for a colour bar
    """
    mass = np.asarray(mass)
    image = ax.imshow(mass, **{"cmap": "Greens", **look})
    ax.set_xticks(range(len(columns)), columns, rotation=35, ha="right", fontsize=7, parse_math=False)
    ax.set_yticks(range(len(rows)), rows, fontsize=8, parse_math=False)
    ax.set_title(title, parse_math=False)
    ax.grid(False)
    for (i, j), value in np.ndenumerate(mass) if numbers else ():
        shade = "white" if image.norm(value) > 0.6 else "black"
        ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=9, color=shade)
    return image


def intervals(ax: Axes, frame: pd.DataFrame, title: str = "", reference: str | None = None) -> None:
    """Accuracies as points with their intervals.

    Args:
        ax: to draw on
        frame: rows of `metrics.csv`; the interval is the one of its columns `low` and `high`, where it has them, else
            the standard deviation over crop sets
        title: above
        reference: a row whose value is drawn as a line through all
    """
    for y, line in enumerate(frame.itertuples()):
        name = line.method
        if "low" in frame:
            spread = [[line.value - line.low], [line.high - line.value]]
        else:
            spread = 0.0 if np.isnan(line.std) else line.std
        ax.errorbar(line.value, y, xerr=spread, fmt="o", color=colour(name), capsize=3)
        ax.annotate(
            f"{line.value:.1f}", (line.value, y), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=7
        )
        if name == reference:
            ax.axvline(line.value, color=colour(name), lw=0.8, ls="--", zorder=0)
    ax.set(yticks=range(len(frame)), yticklabels=frame.method, xlabel="top-1 accuracy (%)", title=title)
    ax.set_ylim(len(frame) - 0.5, -0.7)


def pareto(ax: Axes, frame: pd.DataFrame, cost: str) -> None:
    """Accuracy against a cost of an image, a line a method, and the front that nothing cheaper beats.

    Args:
        ax: to draw on
        frame: columns "method", "value" with its interval "low" and "high", and the cost
        cost: "encodings" or "milliseconds"
    """
    for k, (method, line) in enumerate(frame.sort_values(cost, kind="stable").groupby("method", sort=False)):
        shade = colour(str(method))
        ax.plot(line[cost], line.value, "o-", ms=4, lw=1.2, color=shade, label=method)
        dear = line.iloc[-1]
        bar = [[dear.value - dear.low], [dear.high - dear.value]]
        ax.errorbar(dear[cost] * 1.03**k, dear.value, bar, color=shade, lw=1, alpha=0.6)  # beside each other
    front = frame.sort_values([cost, "value"], ascending=[True, False])
    front = front[front.value > front.value.cummax().shift(fill_value=-np.inf)]
    ax.step(front[cost], front.value, where="post", color="black", lw=2.5, alpha=0.35, zorder=0)
    ax.set(xscale="log", xlabel=f"{cost} an image")
    if cost == "encodings":
        ax.set_xticks(sorted(frame[cost].unique()), sorted(frame[cost].unique()))
        ax.minorticks_off()


def differences(
    ax: Axes,
    gaps: Mapping[str, tuple[float, float, float]],
    title: str = "",
    shade: str | Mapping[str, str] | None = None,
    label: str | None = None,
    notes: Sequence[str] = (),
    shift: float = 0.0,
    marker: str = "o",
) -> None:
    """Differences with their intervals, one a line from above, and a line at zero.

    Args:
        ax: to draw on
        gaps: name -> (difference, lower end, upper end) in points, as `evaluate.differences` gives them
        title: above
        shade: of all of them, or name -> colour; None for the colour of the method that a name starts with
        label: in a legend, where several series share the axes
        notes: one a line, beside the upper end
        shift: downwards, in lines, so that series do not hide each other
        marker: of the points
    """
    shades = {name: colour(name) for name in gaps} if shade is None else shade
    for y, (name, (mean, low, high)) in enumerate(gaps.items()):
        ax.errorbar(
            mean,
            y + shift,
            xerr=[[mean - low], [high - mean]],
            fmt=marker,
            color=shades if isinstance(shades, str) else shades[name],
            capsize=3,
            label=label if y == 0 else None,
        )
    for y, note in enumerate(notes):
        high = list(gaps.values())[y][2]
        ax.annotate(note, (high, y + shift), xytext=(6, -3), textcoords="offset points", fontsize=7)
    ax.axvline(0, color="black", lw=0.8)
    ax.set(yticks=range(len(gaps)), yticklabels=list(gaps), xlabel="points, 95 % interval", title=title)
    ax.set_ylim(len(gaps) - 0.4, -0.6)


def ledger_figure(claims: Sequence[Claim]) -> Figure:
    """All claims of a notebook in words, under what they have in common, with their verdicts at the right.

    The black stroke is a claim's margin, the band beside it what counts as equal.

    Args:
        claims: tested
    """
    lines: list[tuple[str, Claim | None]] = []
    for said, members in grouped(claims).items():
        cases = [claim.name.partition(" ")[2] for claim in members]
        if len(members) == 1:
            lines.append((said if cases[0] in said else f"{said}, {cases[0]}", members[0]))
        else:
            lines += [(said, None), *((case, claim) for case, claim in zip(cases, members))]
    figure, ax = plt.subplots(figsize=(10, 0.24 * len(lines) + 0.7))
    ax.axvline(0, color="black", lw=0.6)
    ax.grid(visible=False, axis="y")
    ax.set_yticks(range(len(lines)), [said for said, _ in lines], fontsize=9, parse_math=False)
    ax.set_ylim(len(lines) - 0.5, -0.5)
    ax.set_xlabel("difference (points, 95 % interval)")
    for y, ((_, claim), label) in enumerate(zip(lines, ax.get_yticklabels())):
        if claim is None:
            label.set_fontweight("bold")
        else:
            _draw(ax, y, claim)
    return figure


def _draw(ax: Axes, y: int, claim: Claim) -> None:
    """A claim's difference on line y, and its verdict at the right."""
    shade = _VERDICTS[claim.verdict]
    low, high = (claim.margin + sign * claim.equal_within for sign in (-1, 1))
    ax.fill_between([low, high], y - 0.3, y + 0.3, color="black", alpha=0.08, lw=0)
    ax.plot([claim.margin] * 2, [y - 0.3, y + 0.3], color="black", lw=1)
    spread = [[claim.difference - claim.low], [claim.high - claim.difference]]
    ax.errorbar(claim.difference, y, xerr=spread, fmt="s", color=shade, ms=4, capsize=3)
    ax.text(1.01, y, claim.verdict, transform=ax.get_yaxis_transform(), fontsize=9, va="center", color=shade)
