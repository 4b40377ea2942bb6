"""Plots of an evaluation as matplotlib Figures, without global state."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tttjax.evaluation.results import Comparison, Series
from tttjax.evaluation.statistics import Estimate, Sums

# The colour-blind-safe palette of Okabe and Ito; one colour per run.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = {"on": "-", "off": "--", "dynamic": "-."}
DPI = 150


def by_position(comparison: Comparison, log_x: bool = False) -> Figure:
    """Loss by token position at the longest context; lower panel: paired differences.

    Pairing by document makes the errors of differences much smaller than those of the losses.
    """
    pairs, longest = comparison.main_pairs(), comparison.longest
    figure, top, bottom = _panels(bool(pairs), width=8)
    curves = [
        _curve(top, comparison, s.contexts[longest], **_style(comparison, s))
        for s in comparison.series
    ]
    edges = comparison.edges(longest)
    set_loss_limits(top, edges, comparison.window, curves)
    top.set_ylabel("loss (nats per token)")
    documents = comparison.text["documents"]
    top.set_title(f"Loss by position ({documents} documents, shaded: ± 1 s.e.)", loc="left")
    if bottom is not None:
        curves = [
            _curve(bottom, comparison, a.contexts[longest] - b.contexts[longest], **style)
            for a, b, style in _styled_pairs(pairs)
        ]
        curves.append(np.zeros_like(curves[0]))
        set_loss_limits(bottom, edges, comparison.window, curves)
        _decorate_differences(bottom)
    for axes in (top, bottom):
        if axes is not None:
            _mark_windows(axes, comparison)
            decorate(axes)
    _label_window(top, comparison)
    _set_positions(bottom or top, comparison, log_x)
    return figure


def by_context(comparison: Comparison) -> Figure:
    """Mean loss of the same tokens by context length; lower panel: paired differences.

    With differences, only they have error bars: the errors of the losses come mostly from variation
    between documents, which all curves share.
    """
    pairs, lengths = comparison.main_pairs(), comparison.lengths
    figure, top, bottom = _panels(bool(pairs), width=6.5)
    for series in comparison.series:
        losses = [series.contexts[length].loss() for length in lengths]
        _points(top, lengths, losses, bars=not pairs, **_style(comparison, series))
    top.set_ylabel("loss (nats per token)")
    top.set_title("The same tokens, read with more context", loc="left")
    decorate(top)
    if bottom is not None:
        for a, b, style in _styled_pairs(pairs):
            changes = [(a.contexts[length] - b.contexts[length]).loss() for length in lengths]
            _points(bottom, lengths, changes, bars=True, **style)
        _decorate_differences(bottom)
        decorate(bottom)
    last = bottom or top
    last.set_xscale("log", base=2)
    last.set_xticks(lengths, [f"{length:,}" for length in lengths])
    last.minorticks_off()
    last.set_xlabel("context (tokens)")
    return figure


def _panels(two: bool, width: float) -> tuple[Figure, Axes, Axes | None]:
    rows = 2 if two else 1
    figure = Figure(figsize=(width, 3.8 * rows), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    return figure, panels[0], panels[1] if two else None


def _style(comparison: Comparison, series: Series) -> dict[str, Any]:
    """Line style: a colour for each run and further TTT setup, dashes for TTT off."""
    colours = list(dict.fromkeys(_colour_label(comparison, other) for other in comparison.series))
    learns = any(other.learns and other.run == series.run for other in comparison.series)
    return {
        "label": series.label,
        "color": COLOURS[colours.index(_colour_label(comparison, series)) % len(COLOURS)],
        "linestyle": STYLES[series.mode] if learns else "-",
    }


def _colour_label(comparison: Comparison, series: Series) -> str:
    """Label of the series that gives the colour: for off, the run's first series with TTT."""
    of_run = [other for other in comparison.series if other.run == series.run]
    first = next((other for other in of_run if other.learns), of_run[0])
    return series.label if series.learns else first.label


def _styled_pairs(
    pairs: Sequence[tuple[Series, Series]],
) -> Iterator[tuple[Series, Series, dict[str, Any]]]:
    """Pairs with line styles; colours start after those of the first two runs."""
    for i, (a, b) in enumerate(pairs):
        color = COLOURS[(2 + i) % len(COLOURS)]
        yield a, b, {"label": f"{a.label} - {b.label}", "color": color, "linestyle": "-"}


def _points(
    axes: Axes,
    lengths: Sequence[int],
    values: Sequence[Estimate],
    *,
    bars: bool,
    **style: Any,
) -> None:
    error = np.nan_to_num([float(value.stderr) for value in values]) if bars else None
    means = [float(value.mean) for value in values]
    axes.errorbar(lengths, means, yerr=error, marker="o", markersize=4, capsize=3, **style)


def _curve(axes: Axes, comparison: Comparison, sums: Sums, **style: Any) -> np.ndarray:
    """Draws bin means at bin centres, shaded by one standard error; returns the means."""
    edges = comparison.edges(comparison.longest)
    loss = sums.binned(edges).loss_by_position()
    centre = (edges[:-1] + edges[1:] + 1) / 2  # of tokens edges[i] + 1, ..., edges[i + 1]
    axes.plot(centre, loss.mean, linewidth=1.6, **style)
    error = np.nan_to_num(loss.stderr)
    low, high = loss.mean - error, loss.mean + error
    axes.fill_between(centre, low, high, color=style["color"], alpha=0.12, linewidth=0)
    return loss.mean


def set_loss_limits(
    axes: Axes, edges: np.ndarray, window: int, curves: Sequence[np.ndarray]
) -> None:
    """Fits the y axis without the first tokens, whose loss is several times higher."""
    later = edges[:-1] >= min(window, edges[-1]) / 8
    values = np.concatenate([curve[later] for curve in curves])
    values = values[np.isfinite(values)]
    if len(values):
        margin = 0.15 * (values.max() - values.min()) or 0.1
        axes.set_ylim(values.min() - margin, values.max() + margin)


def _mark_windows(axes: Axes, comparison: Comparison) -> None:
    """A line at the end of the first window; fainter lines at up to 15 further windows."""
    if not comparison.has_beyond():
        return
    axes.axvline(comparison.window, color="0.35", linewidth=1, linestyle=(0, (5, 3)))
    if comparison.longest // comparison.window <= 16:
        for end in range(2 * comparison.window, comparison.longest, comparison.window):
            axes.axvline(end, color="0.85", linewidth=0.6)


def _label_window(axes: Axes, comparison: Comparison) -> None:
    if comparison.has_beyond():
        axes.annotate(
            " beyond the window",
            (comparison.window, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, -9),
            textcoords="offset points",
            fontsize=8,
            color="0.35",
        )


def _set_positions(axes: Axes, comparison: Comparison, log_x: bool) -> None:
    axes.set_xlabel("position of the token in the context")
    if log_x:
        axes.set_xscale("log", base=2)
    axes.set_xlim(1 if log_x else 0, comparison.longest)
    ends = [1 if log_x else 0, *comparison.lengths]
    axes.set_xticks(ends, [f"{end:,}" for end in ends])
    axes.minorticks_off()


def _decorate_differences(axes: Axes) -> None:
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set_ylabel("difference (nats per token)")
    axes.set_title("Token by token; below 0 the first is better (± 1 s.e.)", loc="left")


def decorate(axes: Axes) -> None:
    """Grid, spines and legend of every line plot."""
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, framealpha=0.85, edgecolor="none")
