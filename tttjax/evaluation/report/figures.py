"""Plots of a report as matplotlib Figures, from its rows."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from tttjax.evaluation.files import to_png
from tttjax.evaluation.plots import (
    BASELINE,
    LEGEND,
    Panel,
    Style,
    add_legend,
    decorate,
    line_styles,
    new_figure,
    plot_by_context,
    plot_by_position,
)
from tttjax.evaluation.report.results import Report
from tttjax.evaluation.report.sections import mean_flops, trained

PLOTS = ("loss_difference_by_context", "loss_by_position", "loss_by_flops", "state_by_context")


def image(name: str, report: Report) -> bytes:
    """The plot as PNG."""
    return to_png(draw(name, report))


def draw(name: str, report: Report) -> Figure:
    """The plot with this name, one of `PLOTS`."""
    on = [system.label for system in report.systems if system.mode == "on"]
    labels = [system.label for system in report.systems]
    styles = line_styles(labels, baseline=report.baseline.label, with_ttt=on)
    if name == "loss_by_flops":
        runs = [
            {
                "label": system.label,
                "context": length,
                "flops": mean_flops(runs),
                "value": float(value.mean),
            }
            for system, length, runs in trained(report)
            if (value := report.loss(system, length))
        ]
        return plot_by_flops(pd.DataFrame(runs), styles)
    base, lengths = report.baseline.label, report.lengths
    longest = report.longest
    if name == "loss_by_position":
        panels = [
            Panel(
                _curves(report, "loss_by_position", longest),
                f"By position in {longest:,} tokens",
                "loss (nats per token)",
                errors=False,
            )
        ]
        differences = _curves(report, "difference_by_position", longest)
        if len(differences):
            title = "Difference at the same tokens; shaded: ± 1 s.e."
            panels.append(Panel(differences, title, f"minus {base} (nats)", zero=""))
        return plot_by_position(panels, styles, lengths, report.window)
    if name == "state_by_context":
        state = Panel(
            _curves(report, "state_bytes"),
            "Decode state",
            "state of one sequence (bytes)",
            errors=False,
        )
        figure = plot_by_context([state], styles, lengths)
        figure.axes[0].set_yscale("log")
        return figure
    difference = Panel(
        _curves(report, "difference"),
        "Below 0: better; bars: ± 1 standard error, paired",
        f"loss minus that of {base} (nats)",
        zero=base,
    )
    return plot_by_context([difference], styles, lengths)


def _curves(report: Report, quantity: str, context: int | None = None) -> pd.DataFrame:
    return report.select(quantity, context).rename(columns={"system": "label"})


def plot_by_flops(runs: pd.DataFrame, styles: dict[str, Style]) -> Figure:
    """Loss of trained runs by training FLOPs; larger markers are longer contexts.

    runs: rows with label, context, flops, value.
    """
    figure, (axes,) = new_figure(1)
    contexts = sorted(runs["context"].unique())
    areas = np.linspace(12, 90, len(contexts)) if len(contexts) > 1 else [40]
    sizes = dict(zip(contexts, areas, strict=True))
    for label, of_label in runs.groupby("label", sort=False):
        style = styles[str(label)]
        x, y, color = of_label["flops"], of_label["value"], style["color"]
        line = {"color": color, "linestyle": style["linestyle"], "linewidth": 1}
        axes.plot(x, y, **line)
        area = of_label["context"].map(sizes)
        axes.scatter(x, y, area, color=color, marker=style["marker"], alpha=0.85, label=label)
    at = f"at a context of {contexts[0]:,} tokens" if len(contexts) == 1 else "at its context"
    decorate(axes, f"Every trained run, evaluated {at}", "loss (nats per token)")
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs, including earlier stages")
    add_legend(figure, [axes])
    if len(contexts) > 1:
        markers = {f"{n:,} tokens": axes.scatter([], [], s, BASELINE) for n, s in sizes.items()}
        handles, number = list(markers.values()), len(markers)
        figure.legend(handles, list(markers), loc="outside upper right", ncols=number, **LEGEND)
    return figure
