"""Plots of an evaluation, as matplotlib Figures without any global state."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tttjax.evaluation.results import Comparison, Series
from tttjax.evaluation.statistics import Estimate, Sums

# The palette of Okabe and Ito, which colour-blind readers can tell apart; a colour for each run.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = {"on": "-", "off": "--", "dynamic": "-."}
DPI = 150


def by_position(comparison: Comparison, log_x: bool = False) -> Figure:
    """Loss by token position at the longest context; below it the differences, token by token.

    Differences have much smaller errors than the curves: every document is compared with itself.
    """
    pairs, longest = comparison.main_pairs(), comparison.longest
    figure, above, below = _panels(bool(pairs), width=8)
    curves = [
        _curve(above, comparison, s.contexts[longest], **_look(comparison, s))
        for s in comparison.series
    ]
    _fit_to_the_later_tokens(above, comparison, curves)
    above.set_ylabel("loss (nats per token)")
    documents = comparison.text["documents"]
    above.set_title(f"Loss by position ({documents} documents, shaded: ± 1 s.e.)", loc="left")
    if below is not None:
        curves = [
            _curve(below, comparison, a.contexts[longest] - b.contexts[longest], **look)
            for a, b, look in _pairs_and_looks(pairs)
        ]
        _fit_to_the_later_tokens(below, comparison, [*curves, np.zeros_like(curves[0])])
        _decorate_differences(below)
    for axes in (above, below):
        if axes is not None:
            _mark_windows(axes, comparison)
            _decorate(axes)
    _name_the_window(above, comparison)
    _set_positions(below or above, comparison, log_x)
    return figure


def by_context(comparison: Comparison) -> Figure:
    """Mean loss of the same tokens, read with more and more context; below it the differences.

    Where there are differences to show, only they have error bars: those of the losses say how
    documents differ from each other, which concerns all curves alike.
    """
    pairs, lengths = comparison.main_pairs(), comparison.lengths
    figure, above, below = _panels(bool(pairs), width=6.5)
    for series in comparison.series:
        losses = [series.contexts[length].loss() for length in lengths]
        _points(above, lengths, losses, bars=not pairs, **_look(comparison, series))
    above.set_ylabel("loss (nats per token)")
    above.set_title("The same tokens, read with more context", loc="left")
    _decorate(above)
    if below is not None:
        for a, b, look in _pairs_and_looks(pairs):
            changes = [(a.contexts[length] - b.contexts[length]).loss() for length in lengths]
            _points(below, lengths, changes, bars=True, **look)
        _decorate_differences(below)
        _decorate(below)
    last = below or above
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


def _look(comparison: Comparison, series: Series) -> dict[str, Any]:
    """A colour for each run (and for each further way in which it learns), dashes for TTT off."""
    colours = list(dict.fromkeys(_coloured_as(comparison, other) for other in comparison.series))
    learns = any(other.learns and other.run == series.run for other in comparison.series)
    return {
        "label": series.label,
        "color": COLOURS[colours.index(_coloured_as(comparison, series)) % len(COLOURS)],
        "linestyle": STYLES[series.mode] if learns else "-",
    }


def _coloured_as(comparison: Comparison, series: Series) -> str:
    """The label of the series whose colour it shares: off has that of the run's first learning."""
    of_run = [other for other in comparison.series if other.run == series.run]
    first = next((other for other in of_run if other.learns), of_run[0])
    return series.label if series.learns else first.label


def _pairs_and_looks(
    pairs: Sequence[tuple[Series, Series]],
) -> Iterator[tuple[Series, Series, dict[str, Any]]]:
    """Colours for differences, other than those of the first two runs while there are enough."""
    for i, (a, b) in enumerate(pairs):
        color = COLOURS[(2 + i) % len(COLOURS)]
        yield a, b, {"label": f"{a.label} - {b.label}", "color": color, "linestyle": "-"}


def _points(
    axes: Axes,
    lengths: Sequence[int],
    values: Sequence[Estimate],
    *,
    bars: bool,
    **look: Any,
) -> None:
    error = np.nan_to_num([float(value.stderr) for value in values]) if bars else None
    means = [float(value.mean) for value in values]
    axes.errorbar(lengths, means, yerr=error, marker="o", markersize=4, capsize=3, **look)


def _curve(axes: Axes, comparison: Comparison, sums: Sums, **look: Any) -> np.ndarray:
    """Draws means of the bins at their centres, shaded by one standard error; returns the means."""
    edges = comparison.edges(comparison.longest)
    loss = sums.binned(edges).loss_by_position()
    centre = (edges[:-1] + edges[1:] + 1) / 2  # of tokens edges[i] + 1, ..., edges[i + 1]
    axes.plot(centre, loss.mean, linewidth=1.6, **look)
    error = np.nan_to_num(loss.stderr)
    low, high = loss.mean - error, loss.mean + error
    axes.fill_between(centre, low, high, color=look["color"], alpha=0.12, linewidth=0)
    return loss.mean


def _fit_to_the_later_tokens(
    axes: Axes, comparison: Comparison, curves: Sequence[np.ndarray]
) -> None:
    """The very first tokens' losses are several times higher and would flatten all that follows."""
    edges = comparison.edges(comparison.longest)
    later = edges[:-1] >= min(comparison.window, comparison.longest) / 8
    values = np.concatenate([curve[later] for curve in curves])
    values = values[np.isfinite(values)]
    if len(values):
        margin = 0.15 * (values.max() - values.min()) or 0.1
        axes.set_ylim(values.min() - margin, values.max() + margin)


def _mark_windows(axes: Axes, comparison: Comparison) -> None:
    """A line where the first window ends, fainter ones at the others while they are few."""
    if not comparison.has_beyond():
        return
    axes.axvline(comparison.window, color="0.35", linewidth=1, linestyle=(0, (5, 3)))
    if comparison.longest // comparison.window <= 16:
        for end in range(2 * comparison.window, comparison.longest, comparison.window):
            axes.axvline(end, color="0.85", linewidth=0.6)


def _name_the_window(axes: Axes, comparison: Comparison) -> None:
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


def _decorate(axes: Axes) -> None:
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, framealpha=0.85, edgecolor="none")
