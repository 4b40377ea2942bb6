"""What needle tests write: needle.json, two CSV tables, one heat map per task."""

import os
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from tttjax.evaluation.files import estimate_values, records, write_results
from tttjax.evaluation.needle.results import (
    GROUPS,
    MEASURES,
    NeedleResults,
    differences,
    group_means,
)
from tttjax.evaluation.needle.summary import blocks, sentence
from tttjax.evaluation.needle.tasks import TASKS
from tttjax.evaluation.plots import DPI, draw_heat_map
from tttjax.evaluation.tables import render

FORMAT = 1


def write_needle(results: NeedleResults, out: str | os.PathLike) -> dict[str, Path]:
    """Writes all files under `out`, each atomically; returns their paths by name."""
    tables = {
        "needle.json": to_dict(results),
        "needle.csv": group_means(results),
        "needle_samples.csv": results.frame(),
    }
    maps = {f"needle_{task}.png": heat_maps(results, task) for task in results.tasks}
    return write_results(out, {**tables, **maps})


def to_dict(results: NeedleResults) -> dict[str, Any]:
    """The results as plain values; docs/evaluation.md describes the keys."""
    means = group_means(results)
    return {
        "format": FORMAT,
        "window": results.window,
        "context_lengths": list(results.lengths),
        "depths": list(results.depths),
        "samples": results.samples,
        "seed": results.seed,
        "haystacks": results.haystacks,
        "notes": list(results.notes),
        "runs": list(results.runs),
        "series": [
            {
                "label": series.label,
                "run": series.run,
                "mode": series.mode,
                "inner": series.inner,
                "seconds": round(series.seconds, 3),
                "tasks": {
                    task: _groups(means[(means["label"] == series.label) & (means["task"] == task)])
                    for task in results.tasks
                },
            }
            for series in results.series
        ],
        "differences": [
            {
                **{name: row[name] for name in ("a", "b", "task", "region")},
                "needles": row["number"],
                **_measures(row, ["correct", "recall", "gain", "logprob"]),
            }
            for row in records(differences(results))
        ],
        "table": render(blocks(results)),
        "sentence": sentence(results),
    }


def _groups(means: pd.DataFrame) -> list[dict[str, Any]]:
    counts = ("needles", "found", "found_low", "found_high")
    return [
        {
            **{name: row[name] for name in ("by", *GROUPS[row["by"]], *counts)},
            **_measures(row, MEASURES),
        }
        for row in records(means)
    ]


def _measures(row: dict[str, Any], names: list[str]) -> dict[str, dict[str, float | None]]:
    return {name: estimate_values(row[name], row[f"{name}_stderr"]) for name in names}


def heat_maps(results: NeedleResults, task: str) -> Figure:
    """One column per series: fraction found (top), recall in nats per token (bottom)."""
    width, height = 1.4 + 0.8 * len(results.lengths), 1.1 + 0.42 * len(results.depths)
    columns = len(results.series)
    size = (0.9 + max(3.2, width) * columns, 0.9 + 2 * max(2.3, height))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    rows = results.frame().query("task == @task")
    rows = rows.assign(outside=rows["region"] == "outside")
    names = {"index": "depth of the needle", "columns": "context (tokens)"}
    measures: dict[str, tuple[str, str, dict[str, Any]]] = {
        "correct": ("fraction found", "{:.0%}", {"cmap": "viridis", "vmin": 0, "vmax": 1}),
        "recall": ("recall (nats per token)", "{:+.2f}", {"cmap": "PuOr"}),
    }
    for row, (measure, (title, cell, style)) in enumerate(measures.items()):
        means = {}
        for series in results.series:
            of_series = rows[rows["label"] == series.label].groupby(["depth", "length"], sort=False)
            means[series.label] = of_series[measure].mean().unstack().rename_axis(**names)
        largest = max(table.abs().to_numpy().max() for table in means.values()) or 1
        limits = {} if "vmin" in style else {"vmin": -largest, "vmax": largest}
        for column, (label, table) in enumerate(means.items()):
            one = axes[row, column]
            outside = rows[rows["label"] == label].pivot_table(
                index="depth", columns="length", values="outside", aggfunc="all", sort=False
            )
            framed = outside.loc[table.index, table.columns]
            shown = table.set_axis(table.index.map("{:.0%}".format)).rename_axis(**names)
            image = draw_heat_map(one, shown, cell.format, framed=framed, **style, **limits)
            if row == 0:
                one.set_title(label, fontsize=9)
        figure.colorbar(image, ax=axes[row].tolist(), label=title)
    title = TASKS[task].title
    if results.window:
        title += f"; framed: outside the window of {results.window} tokens"
    figure.suptitle(title, fontsize=10)
    return figure
