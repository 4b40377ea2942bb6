"""Plots of an evaluation, as matplotlib Figures without any global state."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tttjax.evaluate.results import Comparison, Series
from tttjax.evaluate.statistics import Sums

# The palette of Okabe and Ito, which colour-blind readers can tell apart; a colour for each run.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = {"on": "-", "off": "--", "dynamic": "-."}
DPI = 150


def by_position(comparison: Comparison, log_x: bool = False) -> Figure:
    """Loss by token position at the longest context; below it the differences, token by token.

    Differences have much smaller errors than the curves: every document is compared with itself.
    """
    pairs = comparison.main_pairs()
    rows = 2 if pairs else 1
    figure = Figure(figsize=(8, 4.2 * rows), dpi=DPI, layout="constrained")
    all_axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for series in comparison.series:
        _curve(
            all_axes[0],
            comparison,
            series.contexts[comparison.longest],
            label=series.label,
            color=_colour(comparison, series),
            linestyle=_style(comparison, series),
        )
    all_axes[0].set_ylabel("loss (nats per token)")
    all_axes[0].set_title(
        f"Loss by position, {comparison.text['documents']} held-out documents", loc="left"
    )
    _fit_to_the_later_tokens(all_axes[0], comparison)
    if pairs:
        _draw_differences(all_axes[1], comparison, pairs)
    for axes in all_axes:
        _mark_windows(axes, comparison)
        _decorate(axes)
    _set_positions(all_axes[-1], comparison, log_x)
    return figure


def by_context(comparison: Comparison) -> Figure:
    """Mean loss of the same tokens, read with more and more context."""
    figure = Figure(figsize=(6.5, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for series in comparison.series:
        losses = [series.contexts[length].loss() for length in comparison.lengths]
        axes.errorbar(
            comparison.lengths,
            [float(loss.mean) for loss in losses],
            yerr=np.nan_to_num([float(loss.stderr) for loss in losses]),
            label=series.label,
            color=_colour(comparison, series),
            linestyle=_style(comparison, series),
            marker="o",
            markersize=4,
            capsize=3,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(comparison.lengths, [f"{length:,}" for length in comparison.lengths])
    axes.minorticks_off()
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("The same tokens, read with more context", loc="left")
    _decorate(axes)
    return figure


def _draw_differences(
    axes: Axes, comparison: Comparison, pairs: list[tuple[Series, Series]]
) -> None:
    longest = comparison.longest
    for i, (a, b) in enumerate(pairs):
        _curve(
            axes,
            comparison,
            a.contexts[longest] - b.contexts[longest],
            label=f"{a.label} - {b.label}",
            color=COLOURS[-1 - i % len(COLOURS)],
            linestyle="-",
        )
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set_ylabel("difference (nats per token)")
    axes.set_title("Differences of the same tokens; below 0 the first is better", loc="left")


def _curve(
    axes: Axes, comparison: Comparison, sums: Sums, *, label: str, color: str, linestyle: str
) -> None:
    """Means of the bins at their centres, shaded by one standard error."""
    edges = comparison.edges(comparison.longest)
    loss = sums.binned(edges).loss_by_position()
    centre = (edges[:-1] + edges[1:] + 1) / 2  # of tokens edges[i] + 1, ..., edges[i + 1]
    axes.plot(centre, loss.mean, label=label, color=color, linestyle=linestyle, linewidth=1.6)
    error = np.nan_to_num(loss.stderr)
    axes.fill_between(
        centre, loss.mean - error, loss.mean + error, color=color, alpha=0.15, linewidth=0
    )


def _fit_to_the_later_tokens(axes: Axes, comparison: Comparison) -> None:
    """The first tokens' losses, several times higher, would flatten everything else."""
    edges = comparison.edges(comparison.longest)
    later = edges[:-1] >= min(comparison.window, comparison.longest) / 8
    if later.sum() < 2:
        return
    bounds: list[float] = []
    for series in comparison.series:
        mean, stderr = series.contexts[comparison.longest].binned(edges).loss_by_position()
        error = np.nan_to_num(stderr)
        bounds += [*(mean - error)[later], *(mean + error)[later]]
    low, high = float(np.nanmin(bounds)), float(np.nanmax(bounds))
    margin = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)


def _mark_windows(axes: Axes, comparison: Comparison) -> None:
    """A line where the first window ends, fainter ones at the others while they are few."""
    if not comparison.has_beyond():
        return
    axes.axvline(comparison.window, color="0.35", linewidth=1, linestyle=(0, (5, 3)))
    if comparison.longest // comparison.window <= 16:
        for end in range(2 * comparison.window, comparison.longest, comparison.window):
            axes.axvline(end, color="0.8", linewidth=0.6)
    axes.annotate(
        " beyond the window",
        (comparison.window, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, -11),
        textcoords="offset points",
        fontsize=8,
        color="0.35",
    )


def _set_positions(axes: Axes, comparison: Comparison, log_x: bool) -> None:
    axes.set_xlabel("position of the token in the context")
    if log_x:
        axes.set_xscale("log", base=2)
        axes.set_xlim(1, comparison.longest)
    else:
        axes.set_xlim(0, comparison.longest)
        ends = [0, *comparison.lengths]
        if len(ends) > 2:
            axes.set_xticks(ends, [f"{end:,}" for end in ends])


def _decorate(axes: Axes) -> None:
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def _colour(comparison: Comparison, series: Series) -> str:
    names = [run["name"] for run in comparison.runs]
    return COLOURS[names.index(series.run) % len(COLOURS)]


def _style(comparison: Comparison, series: Series) -> str:
    """Dashed where the same run was also read with learning."""
    learns = any(other.learns and other.run == series.run for other in comparison.series)
    return STYLES[series.mode] if learns else "-"
