"""`loss.png`: the loss of a run by step, and what its inner loop did."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tttjax.io.atomic import atomic_write
from tttjax.training.metrics_file import HELD_OUT, read_records

if TYPE_CHECKING:  # slow to import, and not needed before the end of a run
    from matplotlib.axes import Axes

SMOOTH = 50  # spans of the moving average in a run
E2E, GREY = "#D55E00", "0.6"
MODES = {"on": ("held out, TTT on", E2E), "off": ("held out, TTT off", "#0072B2")}


def write_plot(workdir: str | os.PathLike) -> Path:
    """Draws metrics.jsonl and held_out.jsonl of a work directory; returns the plot's path.

    Of a run with inner updates also: the loss of the first and last chunk of a sequence, the norm
    of the inner gradient, and the drift of the fast weights by layer.
    """
    from matplotlib.figure import Figure

    records, held_out = read_records(workdir), read_records(workdir, HELD_OUT)
    learns = any(record.get("inner_lr") and record.get("fast_drift") for record in records)
    figure = Figure(figsize=(10, 7) if learns else (7, 4), layout="constrained")
    panels = figure.subplots(2, 2).ravel() if learns else [figure.subplots()]
    _draw_loss(panels[0], records, held_out)
    if learns:
        chunks = {"first chunk": "first_chunk_loss", "last chunk": "last_chunk_loss"}
        _draw(panels[1], records, chunks, "loss by chunk (nats per token)")
        _draw(panels[2], records, {"": "inner_grad_norm"}, "inner gradient norm")
        layers = [name for name in records[-1] if name.startswith("fast_drift_")]
        names = {name.removeprefix("fast_drift_"): name for name in layers}
        _draw(panels[3], records, names, "drift of the fast weights in a sequence")
    path = Path(workdir) / "loss.png"
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return path


def smooth(values: Sequence[float]) -> np.ndarray:
    """An exponential moving average without a bias at the start."""
    decay = 1 - 1 / max(1, len(values) / SMOOTH)
    result, total, weight = np.zeros(len(values)), 0.0, 0.0
    for i, value in enumerate(values):
        total, weight = decay * total + value, decay * weight + 1
        result[i] = total / weight
    return result


def _draw_loss(axes: "Axes", records: Sequence[Mapping], held_out: Sequence[Mapping]) -> None:
    step, loss = _values(records, "loss")
    axes.plot(step, loss, color=GREY, linewidth=0.7, alpha=0.6)
    axes.plot(step, smooth(loss), color="0.25", linewidth=1.6, label="training, smoothed")
    for mode, (label, color) in MODES.items():
        points = [(record["step"], record[mode]["loss"]) for record in held_out if mode in record]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=3, label=label)
    _finish(axes, "loss (nats per token)")


def _draw(axes: "Axes", records: Sequence[Mapping], names: Mapping[str, str], ylabel: str) -> None:
    for label, name in names.items():
        step, values = _values(records, name)
        axes.plot(step, smooth(values), linewidth=1.4, label=label)
    _finish(axes, ylabel)


def _values(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the records whose value is a finite number."""
    points = [(r["step"], r[name]) for r in records if isinstance(r.get(name), int | float)]
    return [step for step, _ in points], [float(value) for _, value in points]


def _finish(axes: "Axes", ylabel: str) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, frameon=False)
