"""Figures in one style: colours that everyone can tell apart, markers and line styles that repeat the message,
letters that a projector can show, and a sentence that says what the figure shows. Used from lesson 00 on.

The colours are Okabe and Ito's (2008); each line also gets its own marker and dash, so that a figure reads in grey.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from IPython.display import publish_display_data
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "vermilion": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "black": "#000000",
    "yellow": "#F0E442",
}
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
LINES: list[Any] = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 3))]
HATCHES = ["", "//", "..", "\\\\", "xx", "--", "oo", "++"]

STYLE: Any = {
    "figure.facecolor": "white",  # also on a dark page: a figure is a white card there
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "font.size": 13,
    "axes.titlesize": 14,
    "axes.labelsize": 13,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "legend.fontsize": 12,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=list(COLORS.values()), marker=MARKERS, linestyle=LINES),
    "image.cmap": "cividis",
}
DPI = 100


def figure(
    nrows: int = 1, ncols: int = 1, size: tuple[float, float] | None = None, **options: Any
) -> tuple[Figure, Any]:
    """A figure in the course's style: ``(fig, axes)``, with axes as ``plt.subplots`` gives them.

    Args:
        nrows: rows of axes.
        ncols: columns of axes.
        size: width and height in inches; by default 7 by 4, wider and taller as axes are added.
        options: anything else that ``plt.subplots`` takes, e.g. ``sharey=True``.
    """
    plt.rcParams.update(STYLE)  # for the whole notebook: legends and labels added later should match
    if size is None:
        size = (7.0 if ncols == 1 else min(4.5 * ncols, 13.0), 4.0 if nrows == 1 else 3.4 * nrows)
    return plt.subplots(nrows, ncols, figsize=size, layout="constrained", **options)


def losses(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]] | Sequence[float]],
    title: str = "",
    xlabel: str = "step",
    ylabel: str = "loss per token (nats)",
    axes: Axes | None = None,
) -> Figure:
    """Several curves in one figure; the legend carries their names.

    Args:
        curves: name → (steps, values), or name → values counted from 1.
        title: of the figure.
        xlabel: label of the horizontal axis.
        ylabel: label of the vertical axis.
        axes: draw here instead of in a new figure.

    Raises:
        ValueError: if there is no curve, or a curve's steps and values differ in number.
    """
    if not curves:
        raise ValueError("there is no curve to draw: give a dictionary with at least one name")
    fig, axes = _place(axes)
    for name, curve in curves.items():
        steps, values = curve if isinstance(curve, tuple) else (range(1, len(curve) + 1), curve)
        if len(steps) != len(values):
            raise ValueError(
                f"the curve {name!r} has {len(steps)} steps and {len(values)} values: expected as many of each"
            )
        axes.plot(steps, values, label=name, markevery=max(1, len(steps) // 10))
    _label(axes, title, xlabel, ylabel)
    axes.legend(frameon=False)
    return fig


def bars(
    values: Mapping[str, float] | Mapping[str, Mapping[str, float]],
    title: str = "",
    ylabel: str = "",
    fmt: str = "{:,.2f}",
    axes: Axes | None = None,
) -> Figure:
    """Bars with their value written on top.

    Args:
        values: name → height, or group → {series → height} for bars side by side.
        title: of the figure.
        ylabel: label of the vertical axis.
        fmt: how a value is written.
        axes: draw here instead of in a new figure.

    Raises:
        ValueError: if there is nothing to draw.
    """
    if not values:
        raise ValueError("there is no bar to draw: give a dictionary with at least one name")
    fig, axes = _place(axes)
    nested: dict[str, Mapping[str, float]] = {k: v if isinstance(v, Mapping) else {"": v} for k, v in values.items()}
    series = list(dict.fromkeys(name for group in nested.values() for name in group))
    width = 0.8 / len(series)
    for i, name in enumerate(series):
        places = [j for j, group in enumerate(nested.values()) if name in group]
        heights = [group[name] for group in nested.values() if name in group]
        left = np.array(places) + (i - (len(series) - 1) / 2) * width
        color = list(COLORS.values())[i % len(COLORS)]
        drawn = axes.bar(left, heights, 0.92 * width, label=name, color=color, hatch=HATCHES[i % 8], edgecolor="white")
        axes.bar_label(drawn, [fmt.format(height) for height in heights], padding=2, fontsize=12)
    axes.set_xticks(range(len(nested)), list(nested))
    axes.grid(False, axis="x")
    axes.margins(y=0.15)
    _label(axes, title, "", ylabel)
    if series != [""]:
        axes.legend(frameon=False)
    return fig


def spectrum(
    curves: Mapping[str, Any],
    title: str = "",
    xlabel: str = "index of the singular value",
    ylabel: str = "singular value",
    log: bool = True,
    axes: Axes | None = None,
) -> Figure:
    """Singular values in falling order, one curve a name, on a logarithmic axis unless ``log=False``."""
    lists = {name: [float(value) for value in values] for name, values in curves.items()}
    fig = losses(lists, title, xlabel, ylabel, axes)
    if log:
        (axes or fig.axes[0]).set_yscale("log")
    return fig


def heatmap(
    matrix: Any,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    limits: tuple[float, float] | None = None,
    axes: Axes | None = None,
) -> Figure:
    """A matrix as coloured cells with a colour bar; ``limits`` fixes the ends of the scale."""
    fig, axes = _place(axes)
    low, high = limits or (None, None)
    image = axes.imshow(np.asarray(matrix, dtype=float), aspect="auto", interpolation="nearest", vmin=low, vmax=high)
    axes.grid(False)
    fig.colorbar(image, ax=axes)
    _label(axes, title, xlabel, ylabel)
    return fig


def show(fig: Figure, alt: str) -> None:
    """Show the figure, with ``alt`` as its alternative text and printed under it; then close it.

    Args:
        fig: the figure.
        alt: one sentence with the result, computed from the data (at most two decimals for anything trained).

    Raises:
        ValueError: if alt is empty: a figure that cannot be put into a sentence shows nothing yet.
    """
    alt = " ".join(str(alt).split())
    if not alt:
        raise ValueError("alt is empty: say in one sentence, with its numbers, what the figure shows")
    picture = io.BytesIO()
    # No Software entry: it carries Matplotlib's version, and the picture should depend on the data alone.
    fig.savefig(picture, format="png", dpi=DPI, bbox_inches="tight", facecolor="white", metadata={"Software": None})
    plt.close(fig)
    publish_display_data(
        {"image/png": picture.getvalue(), "text/plain": f"[figure: {alt}]"}, {"image/png": {"alt": alt}}
    )
    print(alt)


def _place(axes: Axes | None) -> tuple[Figure, Axes]:
    if axes is None:
        return figure()
    fig = axes.get_figure(root=True)
    if fig is None:
        raise ValueError("axes belong to no figure: take them from plots.figure()")
    return fig, axes


def _label(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
