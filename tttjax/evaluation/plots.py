"""Plots of tidy rows as matplotlib Figures, without global state: styles, axes, curves, heat maps.

Legends and explanations are outside the axes, so that no label covers a curve.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, NullLocator

# The colour-blind-safe palette of Okabe and Ito; wine instead of yellow, which is faint on white.
# Vermilion is reserved.
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#000000")
E2E = "#D55E00"  # of TTT-E2E, in every plot
BASELINE = "0.55"  # grey
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1.5, 1)))
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">")
LEGEND: dict[str, Any] = {"fontsize": 8, "frameon": False, "handlelength": 3}
DPI = 170
WIDTH = 6.4  # inches; text has to be readable on a phone

Style = dict[str, Any]


# Styles ------------------------------------------------------------------------------------------


def line_styles(
    labels: Iterable[str], *, baseline: str = "", with_ttt: Collection[str] = ()
) -> dict[str, Style]:
    """Colour, dashes and marker of every label.

    TTT-E2E (`find_e2e`) has vermilion and a solid line. The baseline is grey. The others have
    colours in their order, then dashed colours.
    """
    labels = list(dict.fromkeys(labels))
    e2e = find_e2e(labels, with_ttt)
    styles: dict[str, Style] = {}
    if baseline in labels:
        styles[baseline] = {"color": BASELINE, "linestyle": "-", "marker": "o"}
    if e2e is not None:
        styles[e2e] = {"color": E2E, "linestyle": "-", "marker": "o", "linewidth": 2}
    for i, label in enumerate(label for label in labels if label not in styles):
        styles[label] = {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": DASHES[i // len(COLOURS) % len(DASHES)],
            "marker": MARKERS[i % len(MARKERS)],
        }
    return {label: styles[label] for label in labels}


def find_e2e(labels: Iterable[str], with_ttt: Collection[str] = ()) -> str | None:
    """The label of TTT-E2E: `ttt_e2e`, else one that contains it, else one with TTT on."""
    candidates = [label for label in labels if "ttt_e2e" in label or label in with_ttt]

    def rank(label: str) -> tuple[bool, bool, bool]:
        return label != "ttt_e2e", "ttt_e2e" not in label, label not in with_ttt

    return min(candidates, key=rank, default=None)


def new_figure(panels: int, width: float = WIDTH, height: float = 3.3) -> tuple[Figure, list[Axes]]:
    """A figure with panels above each other that share their x axis; sizes in inches."""
    figure = Figure(figsize=(width, height * panels + 0.3), dpi=DPI, layout="constrained")
    return figure, list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])


def add_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend of all panels below the figure, which grows by its rows."""
    entries: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    width, height = figure.get_size_inches()
    columns = max(1, min(4, int(13 * width / (max(map(len, entries), default=0) + 5))))
    figure.set_size_inches(width, height + 0.2 * -(-len(entries) // columns))
    handles = list(entries.values())
    figure.legend(handles, list(entries), loc="outside lower center", ncols=columns, **LEGEND)


def decorate(axes: Axes, title: str = "", ylabel: str = "") -> None:
    """Grid, spines, title and y label of every line plot."""
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        axes.set_title(title, loc="left", fontsize=10)
    if ylabel:
        axes.set_ylabel(ylabel)


def set_ticks(axes: Axes, ticks: Sequence[float], *, log: bool) -> None:
    """Ticks with numbers on the x axis, only as many as have room; the last always stays."""
    low, high = (np.log2(x) if log else x for x in axes.get_xlim())
    kept: list[float] = []
    for tick in sorted(ticks, reverse=True):
        at = np.log2(tick) if log else tick
        if not kept or (np.log2(kept[-1]) if log else kept[-1]) - at > 0.07 * (high - low):
            kept.append(tick)
    axes.xaxis.set_major_locator(FixedLocator(kept))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(kept, [f"{tick:,}" for tick in kept])


# Curves ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """Curves in one pair of axes.

    frame: rows with `label`, `value`, `stderr` (NaN: none) and `context`, or `first_token` and
    `last_token`. zero: label of a grey line at 0; "" for a line without one, None for no line.
    errors: whether standard errors are drawn.
    """

    frame: pd.DataFrame
    title: str
    ylabel: str
    zero: str | None = None
    errors: bool = True


def plot_by_position(
    panels: Sequence[Panel],
    styles: Mapping[str, Style],
    lengths: Sequence[int],
    window: int,
    log_x: bool = False,
) -> Figure:
    """Values of bins of positions, shaded by one standard error.

    lengths: contexts to mark on the x axis; the longest is its end. window: tokens after which a
    dashed line is drawn.
    """
    longest, start = max(lengths), 1 if log_x else 0
    figure, all_axes = new_figure(len(panels))
    for axes, panel in zip(all_axes, panels, strict=True):
        frame = panel.frame
        centre = (frame["first_token"] + frame["last_token"]) / 2
        for label, curve in frame.assign(x=centre).groupby("label", sort=False):
            style = {**styles[str(label)], "marker": None}
            axes.plot(curve["x"], curve["value"], label=label, **{"linewidth": 1.5, **style})
            if panel.errors:
                error = curve["stderr"].fillna(0)
                low, high = curve["value"] - error, curve["value"] + error
                color = style["color"]
                axes.fill_between(curve["x"], low, high, color=color, alpha=0.1, linewidth=0)
        _draw_zero(axes, panel)
        _set_loss_limits(axes, frame, min(window, longest), panel.zero is not None)
        if longest > window:
            axes.axvline(window, color=BASELINE, linewidth=1, linestyle=(0, (5, 3)), zorder=1)
        decorate(axes, panel.title, panel.ylabel)
    last = all_axes[-1]
    marked = f"; dashed: end of the window, {window:,}" if longest > window else ""
    last.set_xlabel(f"position of the token in the context{marked}")
    if log_x:
        last.set_xscale("log", base=2)
    last.set_xlim(start, longest)
    set_ticks(last, [start, *lengths], log=log_x)
    add_legend(figure, all_axes)
    return figure


def plot_by_context(
    panels: Sequence[Panel], styles: Mapping[str, Style], lengths: Sequence[int]
) -> Figure:
    """Values by context length, with bars of one standard error."""
    figure, all_axes = new_figure(len(panels))
    for axes, panel in zip(all_axes, panels, strict=True):
        curves = list(panel.frame.groupby("label", sort=False))
        for i, (label, curve) in enumerate(curves):
            # Offset in x, so that error bars do not overlap.
            shift = 2 ** (0.04 * (i - (len(curves) - 1) / 2)) if panel.errors else 1.0
            x, style = curve["context"] * shift, styles[str(label)]
            axes.plot(
                x, curve["value"], label=label, **{"markersize": 5, "linewidth": 1.5, **style}
            )
            if panel.errors:
                error = curve["stderr"].fillna(0)
                color = style["color"]
                axes.errorbar(x, curve["value"], error, fmt="none", ecolor=color, capsize=3)
        _draw_zero(axes, panel)
        decorate(axes, panel.title, panel.ylabel)
    last = all_axes[-1]
    last.set_xscale("log", base=2)
    set_ticks(last, lengths, log=True)
    last.set_xlabel("context (tokens)")
    add_legend(figure, all_axes)
    return figure


def _draw_zero(axes: Axes, panel: Panel) -> None:
    if panel.zero is not None:
        label = panel.zero or "_none"  # matplotlib leaves out names with an underscore
        axes.axhline(0, color=BASELINE, linewidth=1.4, zorder=1, label=label)


def _set_loss_limits(axes: Axes, frame: pd.DataFrame, window: int, with_zero: bool) -> None:
    """Fits the y axis without the first tokens, whose loss is several times higher."""
    values = frame.loc[frame["first_token"] > window / 8, "value"].dropna()
    values = [*values, *([0.0] if with_zero else [])]
    if values:
        margin = 0.15 * (max(values) - min(values)) or 0.1
        axes.set_ylim(min(values) - margin, max(values) + margin)


# Heat maps ---------------------------------------------------------------------------------------


def draw_heat_map(
    axes: Axes,
    table: pd.DataFrame,
    cell: Callable[[float], str],
    *,
    framed: pd.DataFrame | None = None,
    **style: Any,
):
    """Draws a table of numbers, with their text in the cells; returns the image for a colour bar.

    table: values of two fields, as `DataFrame.pivot` gives them: the index is the y axis, the
    columns the x axis, their names the axis labels. NaN cells stay empty. framed: which cells get a
    red frame, aligned with `table`. style: options of `imshow`, such as cmap and vmin.
    """
    values_YX = table.to_numpy(float)
    image = axes.imshow(values_YX, aspect="auto", **style)
    for (y, x), value in np.ndenumerate(values_YX):
        if np.isnan(value):
            continue
        red, green, blue, _ = image.cmap(image.norm(value))
        color = "white" if 0.3 * red + 0.6 * green + 0.1 * blue < 0.5 else "black"
        axes.text(x, y, cell(value), ha="center", va="center", fontsize=7, color=color)
        if framed is not None and framed.to_numpy(bool)[y, x]:
            box = Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor="red")
            axes.add_patch(box)
    for axis, names in ((axes.xaxis, table.columns), (axes.yaxis, table.index)):
        text = [name if isinstance(name, str) else f"{name:,}" for name in names]
        axis.set_ticks(range(len(names)), text, fontsize=8)
        axis.set_label_text(str(names.name or ""), fontsize=8)
    return image
