"""Diagrams of the adapted layer, in the style of ``plots``: what flows where, and how large the matrices are.

Drawn by code, so that a lesson can draw them again with other sizes, with dropout, or with another scale. W₀ is always
sky blue, A vermilion and B blue. First used in lesson 03.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, Polygon, Rectangle

from lora_edu.lab import plots

FROZEN, A_COLOR, B_COLOR = plots.COLORS["sky"], plots.COLORS["vermilion"], plots.COLORS["blue"]
HIGH, LOW = 3.0, 1.0  # the heights of the frozen path and of the update's
Point = tuple[float, float]


def lora_layer(
    in_features: int | str = "in",
    out_features: int | str = "out",
    r: int | str = "r",
    scaling: float | str = "s",
    dropout: bool = False,
    axes: Axes | None = None,
) -> Figure:
    """The layer as a diagram: x goes into W₀ and into A, then B, then s; the two results are added.

    What flows along an arrow has its shape there: (…, r) means r numbers in the last dimension, after any others.

    Args:
        in_features: what the input's size is called, or the number itself.
        out_features: the same for the output.
        r: the same for the rank.
        scaling: what the update is multiplied by.
        dropout: draw dropout on the update's path, before A.
        axes: draw here instead of in a new figure; best twice as wide as high.
    """
    fig, axes = _canvas(axes)
    into_A = 3.5 if dropout else 2.5
    _arrow(axes, (0.3, 2), (1.2, 2), (1.2, HIGH), (3.4, HIGH))
    _arrow(axes, (1.2, 2), (1.2, LOW), (2.2 if dropout else into_A, LOW))
    if dropout:
        _box(axes, 2.2, 3.1, LOW, [0.35] * 2, "white", "drop")
        _arrow(axes, (3.1, LOW), (into_A, LOW))
    _box(axes, 3.4, 5.4, HIGH, [0.75] * 2, FROZEN, "W₀", f"frozen, {out_features} × {in_features}")
    _box(axes, into_A, into_A + 0.9, LOW, [0.75, 0.3], A_COLOR, "A", f"trained, {r} × {in_features}")
    _box(axes, 5.8, 6.7, LOW, [0.3, 0.75], B_COLOR, "B", f"trained, {out_features} × {r}")
    _arrow(axes, (into_A + 0.9, LOW), (5.8, LOW), label=f"(…, {r})")
    _arrow(axes, (6.7, LOW), (7.25, LOW))
    _circle(axes, (7.5, LOW), f"× {scaling}")
    _arrow(axes, (7.75, LOW), (8.6, LOW), (8.6, 1.75))
    _arrow(axes, (5.4, HIGH), (8.6, HIGH), (8.6, 2.25), label=f"(…, {out_features})")
    _circle(axes, (8.6, 2), "+")
    _arrow(axes, (8.85, 2), (9.7, 2))
    axes.text(8.75, 1.2, f"(…, {out_features})", fontsize=12)
    for x, name, size in ((0.2, "x", in_features), (9.8, "h", out_features)):
        side = "right" if name == "x" else "left"
        axes.text(x, 2, name, ha=side, va="center", fontsize=17, style="italic")
        axes.text(x, 1.6, f"(…, {size})", ha=side, va="center", fontsize=12)
    axes.set(xlim=(-0.9, 10.9), ylim=(-0.4, 4.1))
    return fig


def to_scale(in_features: int, out_features: int, r: int, axes: Axes | None = None) -> Figure:
    """W₀ with A below it and B beside it, one unit of length for each row and column.

    Args:
        in_features: columns of W₀ and of A.
        out_features: rows of W₀ and of B.
        r: rows of A and columns of B.
        axes: draw here instead of in a new figure.
    """
    fig, axes = _canvas(axes)
    gap = 0.06 * max(out_features, in_features)
    middle = in_features / 2, out_features / 2
    for corner, width, height, color in (
        ((0.0, 0.0), in_features, out_features, FROZEN),
        ((0.0, -gap - r), in_features, r, A_COLOR),
        ((in_features + gap, 0.0), r, out_features, B_COLOR),
    ):
        axes.add_patch(Rectangle(corner, width, height, color=color, linewidth=0, snap=False))
    axes.text(*middle, f"W₀\n{out_features} × {in_features}", ha="center", va="center")
    axes.text(middle[0], -1.4 * gap - r, f"A: {r} × {in_features}", ha="center", va="top")
    axes.text(in_features + 1.4 * gap + r, middle[1], f"B: {out_features} × {r}", va="center")
    axes.set(xlim=(-gap, in_features + 7 * gap), ylim=(-3 * gap - r, out_features + gap))
    return fig


def _canvas(axes: Axes | None) -> tuple[Figure, Axes]:
    if axes is None:
        _, axes = plots.figure(size=(10, 4))
    fig: Any = axes.get_figure(root=True)
    axes.set_aspect("equal")
    axes.set_axis_off()
    return fig, axes


def _box(
    axes: Axes, left: float, right: float, height: float, half: Sequence[float], color: str, name: str, below: str = ""
) -> None:
    """A box whose two upright sides may differ in length, as those of A and B do; ``half`` has half of each."""
    corners = [(left, height - half[0]), (left, height + half[0]), (right, height + half[1]), (right, height - half[1])]
    axes.add_patch(Polygon(corners, facecolor=color, edgecolor="black", linewidth=1.2))
    middle = (left + right) / 2
    ink = "black" if color in ("white", FROZEN) else "white"
    axes.text(middle, height, name, ha="center", va="center", fontsize=14, color=ink)
    axes.text(middle, height - max(half) - 0.1, below, ha="center", va="top", fontsize=12)


def _circle(axes: Axes, centre: Point, name: str) -> None:
    axes.add_patch(Circle(centre, 0.25, facecolor="white", edgecolor="black", linewidth=1.2))
    axes.text(*centre, name, ha="center", va="center", fontsize=13)


def _arrow(axes: Axes, *points: Point, label: str = "") -> None:
    """A line through the points with its head at the last one; the label stands above its first piece."""
    for start, end in pairwise(points):
        axes.add_patch(
            FancyArrowPatch(
                start,
                end,
                arrowstyle="-|>" if end == points[-1] else "-",
                mutation_scale=14,
                shrinkA=0,
                shrinkB=0,
                linewidth=1.5,
                color="black",
            )
        )
    (left, height), (right, _) = points[:2]
    axes.text((left + right) / 2, height + 0.1, label, ha="center", fontsize=12)
