"""Heat maps of needle tests, by context length and depth."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tttjax.evaluation.needle.results import NeedleResults, SampleGroup, mean
from tttjax.evaluation.needle.tasks import TASKS
from tttjax.evaluation.plots import DPI


def heat_maps(results: NeedleResults, task: str) -> Figure:
    """One column per series: fraction found (top), recall in nats per token (bottom)."""
    columns = len(results.series)
    width, height = 1.4 + 0.8 * len(results.lengths), 1.1 + 0.42 * len(results.depths)
    size = (0.9 + max(3.2, width) * columns, 0.9 + 2 * max(2.3, height))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    largest = max(
        (
            abs(_cell(group, "recall"))
            for series in results.series
            for group in _cells(results, task, series)
        ),
        default=1.0,
    )
    styles: list[tuple[str, dict[str, Any]]] = [
        ("correct", {"cmap": "viridis", "vmin": 0, "vmax": 1}),
        ("recall", {"cmap": "PuOr", "vmin": -largest or -1, "vmax": largest or 1}),
    ]
    for row, (measure, style) in enumerate(styles):
        for column, series in enumerate(results.series):
            cells = _cells(results, task, series)
            image = _draw(axes[row, column], results, cells, measure, style)
            if row == 0:
                axes[row, column].set_title(series.label, fontsize=9)
        name = {"correct": "fraction found", "recall": "recall (nats per token)"}[measure]
        figure.colorbar(image, ax=axes[row].tolist(), label=name)
    title = TASKS[task].title
    if results.window:
        title += f"; framed: outside the window of {results.window} tokens"
    figure.suptitle(title, fontsize=10)
    return figure


def _cells(results: NeedleResults, task: str, series) -> list[SampleGroup]:
    return [group for group in results.groups(series, task) if group.by == "cell"]


def _cell(group: SampleGroup, measure: str) -> float:
    return float(mean(group.samples, measure).mean)


def _draw(axes: Axes, results: NeedleResults, cells: list[SampleGroup], measure: str, style: dict):
    shape = len(results.lengths), len(results.depths)
    values_LD = np.array([_cell(group, measure) for group in cells]).reshape(shape)
    image = axes.imshow(values_LD.T, aspect="auto", **style)
    for i, group in enumerate(cells):
        length, depth = divmod(i, shape[1])
        value = values_LD[length, depth]
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
        text = f"{value:.0%}" if measure == "correct" else f"{value:+.2f}"
        colour = "white" if dark else "black"
        axes.text(length, depth, text, ha="center", va="center", fontsize=7, color=colour)
        if all(sample.region == "outside" for sample in group.samples):
            corner = length - 0.46, depth - 0.46
            axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor="red", linewidth=1))
    axes.set_xticks(range(shape[0]), [f"{length:,}" for length in results.lengths], fontsize=8)
    axes.set_yticks(range(shape[1]), [f"{depth:.0%}" for depth in results.depths], fontsize=8)
    axes.set_xlabel("context (tokens)", fontsize=8)
    axes.set_ylabel("depth of the needle", fontsize=8)
    return image
