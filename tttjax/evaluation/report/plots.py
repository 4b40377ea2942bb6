"""Plots of a report as matplotlib Figures, without global state."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tttjax.evaluation.plots import COLOURS, DPI, set_loss_limits
from tttjax.evaluation.report.results import Report, SystemResult, systems_at
from tttjax.evaluation.report.statistics import Value, by_position, difference_by_position
from tttjax.evaluation.report.tables import mean_flops, trained
from tttjax.evaluation.statistics import position_bins

BASELINE = "0.55"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES = ("-", (0, (4, 1.5)), (0, (1.5, 1)))
Draw = Callable[[Axes, Report], None]


def image(name: str, report: Report) -> bytes:
    """The plot as PNG."""
    file = io.BytesIO()
    draw(name, report).savefig(file, format="png")
    return file.getvalue()


def draw(name: str, report: Report) -> Figure:
    """The plot with this name, one of `PLOTS`."""
    two = name == "loss_by_position" and _has_differences(report)
    legend = 0.2 * -(-len(report.systems) // 4)
    height = (7.0 if two else 4.2) + legend
    figure = Figure(figsize=(7.5, height), dpi=DPI, layout="constrained")
    if two:
        top, bottom = figure.subplots(2, 1, sharex=True)
        _loss_by_position(top, report)
        _difference_by_position(bottom, report)
        panels = [top, bottom]
    else:
        panels = [figure.subplots()]
        PLOTS[name](panels[0], report)
    for axes in panels:
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


# Plots -------------------------------------------------------------------------------------------


def _difference_by_context(axes: Axes, report: Report) -> None:
    others = report.others() or report.systems
    for i, system in enumerate(others):
        values = [(n, report.difference(system, n)) for n in report.lengths]
        known = [(n, v) for n, v in values if v is not None]
        # Offset in x, so that error bars do not overlap.
        shift = 2 ** (0.04 * (i - (len(others) - 1) / 2))
        _errorbar(axes, [n * shift for n, _ in known], [v for _, v in known], report, system)
    axes.axhline(0, color=BASELINE, linewidth=1.4, label=report.baseline.label)
    axes.set_ylabel(f"loss minus that of {report.baseline.label} (nats)")
    axes.set_title("Below 0: better; bars: ± 1 standard error, paired", loc="left", fontsize=10)
    _contexts(axes, report)


def _loss_by_position(axes: Axes, report: Report) -> None:
    edges = position_bins(report.longest, report.window, report.bins)
    centre = (edges[:-1] + edges[1:] + 1) / 2
    curves = []
    for system in systems_at(report, report.longest):
        value = by_position(system.sums[report.longest], edges)
        axes.plot(centre, value.mean, linewidth=1.5, **_style(report, system))
        curves.append(value.mean)
    set_loss_limits(axes, edges, report.window, curves)
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"By position in {report.longest:,} tokens", loc="left", fontsize=10)
    _positions(axes, report)


def _difference_by_position(axes: Axes, report: Report) -> None:
    edges = position_bins(report.longest, report.window, report.bins)
    centre = (edges[:-1] + edges[1:] + 1) / 2
    curves = [np.zeros(len(centre))]
    for system in systems_at(report, report.longest):
        if system is report.baseline:
            continue
        theirs = report.baseline.sums[report.longest]
        value = difference_by_position(system.sums[report.longest], theirs, edges)
        style = _style(report, system)
        axes.plot(centre, value.mean, linewidth=1.5, **style)
        error = np.nan_to_num(value.stderr)
        low, high = value.mean - error, value.mean + error
        alpha = 0.14 if len(report.systems) <= 4 else 0.08
        axes.fill_between(centre, low, high, color=style["color"], alpha=alpha, linewidth=0)
        curves.append(value.mean)
    axes.axhline(0, color=BASELINE, linewidth=1.4)
    set_loss_limits(axes, edges, report.window, curves)
    axes.set_ylabel(f"minus {report.baseline.label} (nats)")
    axes.set_title("Difference at the same tokens; shaded: ± 1 s.e.", loc="left", fontsize=10)
    axes.set_xlabel("position of the token in the context")
    _positions(axes, report)


def _loss_by_flops(axes: Axes, report: Report) -> None:
    points: dict[str, list[tuple[float, float]]] = {system.label: [] for system in report.systems}
    trained_runs = list(trained(report))
    several = len({length for _, length, _ in trained_runs}) > 1
    for system, length, runs in trained_runs:
        loss = report.loss(system, length)
        assert loss is not None  # `trained` gives evaluated lengths
        point = mean_flops(runs), float(loss.mean)
        points[system.label].append(point)
        text = f"{length:,}" if several else ""
        axes.annotate(text, point, (4, 4), textcoords="offset points", fontsize=6, color=BASELINE)
    for system in report.systems:
        x, y = zip(*points[system.label], strict=True)
        axes.plot(x, y, **_point(report, system))
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs, including earlier stages")
    axes.set_ylabel("loss (nats per token)")
    contexts = (
        "its context (small numbers)" if several else f"a context of {trained_runs[0][1]:,} tokens"
    )
    axes.set_title(f"Every trained run, evaluated at {contexts}", loc="left", fontsize=10)


def _state(axes: Axes, report: Report) -> None:
    _plain(axes, report, lambda system: system.state_bytes)
    axes.set_yscale("log")
    axes.set_ylabel("state of one sequence (bytes)")
    axes.set_title("Decode state", loc="left", fontsize=10)


PLOTS: dict[str, Draw] = {
    "loss_difference_by_context": _difference_by_context,
    "loss_by_position": _loss_by_position,
    "loss_by_flops": _loss_by_flops,
    "state_by_context": _state,
}


# Styles ------------------------------------------------------------------------------------------


def _has_differences(report: Report) -> bool:
    """Whether there are differences by position."""
    systems = systems_at(report, report.longest)
    return report.baseline in systems and len(systems) > 1


def _style(report: Report, system: SystemResult) -> dict[str, Any]:
    """Line style: the baseline in grey, the others in colours, then dashed colours."""
    if system is report.baseline:
        return {"label": system.label, "color": BASELINE, "linestyle": "-"}
    number = _number(report, system)
    dashes = DASHES[number // len(COLOURS) % len(DASHES)]
    return {"label": system.label, "color": COLOURS[number % len(COLOURS)], "linestyle": dashes}


def _number(report: Report, system: SystemResult) -> int:
    return report.others().index(system)


def _point(report: Report, system: SystemResult) -> dict[str, Any]:
    """Line style with the system's marker."""
    number = 0 if system is report.baseline else 1 + _number(report, system)
    marker = MARKERS[number % len(MARKERS)]
    return {**_style(report, system), "marker": marker, "markersize": 5}


def _errorbar(
    axes: Axes,
    x: Sequence[float],
    values: Sequence[Value],
    report: Report,
    system: SystemResult,
) -> None:
    means = [float(value.mean) for value in values]
    errors = np.nan_to_num([float(value.stderr) for value in values])
    axes.errorbar(x, means, yerr=errors, capsize=3, **_point(report, system))


def _plain(axes: Axes, report: Report, values: Callable[[SystemResult], Any]) -> None:
    for system in report.systems:
        x, y = zip(*sorted(values(system).items()), strict=True)
        axes.plot(x, y, **_point(report, system))
    _contexts(axes, report)


def _contexts(axes: Axes, report: Report) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(report.lengths, [f"{length:,}" for length in report.lengths])
    axes.minorticks_off()
    axes.set_xlabel("context (tokens)")


def _positions(axes: Axes, report: Report) -> None:
    if report.longest > report.window:
        axes.axvline(report.window, color=BASELINE, linewidth=1, linestyle=(0, (5, 3)))
    axes.set_xlim(0, report.longest)
    axes.set_xticks([0, *report.lengths], [f"{n:,}" for n in (0, *report.lengths)])
