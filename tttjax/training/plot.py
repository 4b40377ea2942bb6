"""`loss.png`: the losses of a run by step, and what its inner loop did."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tttjax.io.atomic import atomic_write
from tttjax.io.paths import storage_path
from tttjax.training.metrics_file import HELD_OUT, read_records

if TYPE_CHECKING:  # slow to import, and not needed before the end of a run
    from matplotlib.axes import Axes

Records = Sequence[Mapping[str, Any]]

ON, OFF, GREEN, GOLD, GREY = "#D55E00", "#0072B2", "#009E73", "#E69F00", "0.25"
MODES = {"on": ("held out, TTT on", ON), "off": ("held out, TTT off", OFF)}
CHUNKS = {"first": ("first_chunk_loss", GOLD), "last": ("last_chunk_loss", GREEN)}
MAX_NAMES = 8  # layers in a legend
NATS = "loss (nats per token)"


def write_plot(workdir: str | os.PathLike) -> Path:
    """Draws metrics.jsonl and held_out.jsonl of a work directory; returns the plot's path.

    Of a run with inner updates also: the loss of the first and last chunk of a sequence, the norm
    of the inner gradient, and the drift of the fast weights by layer. Of one with held-out losses:
    those of the last evaluation by position and, with updates, their gain by step.
    """
    from matplotlib.figure import Figure

    records, held_out = read_records(workdir), read_records(workdir, HELD_OUT)
    learns = any(record.get("inner_lr") and record.get("fast_drift") for record in records)
    panels: list[Callable[[Axes], None]] = [lambda axes: _draw_loss(axes, records, held_out)]
    if held_out:
        panels.append(lambda axes: _draw_positions(axes, held_out[-1]))
    if held_out and learns:
        panels.append(lambda axes: _draw_gain(axes, held_out))
    if learns:
        panels.append(lambda axes: _draw_chunks(axes, records))
        panels.append(lambda axes: _draw_inner_gradient(axes, records))
        panels.append(lambda axes: _draw_drift(axes, records))
    columns = -(-len(panels) // (2 if learns else 1))
    figure = Figure(figsize=(1.5 + 4 * columns, 8 if learns else 4), layout="constrained")
    all_axes = figure.subplots(2 if learns else 1, columns, squeeze=False).ravel()
    for axes, draw in zip(all_axes, panels, strict=True):
        draw(axes)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        labels = axes.get_legend_handles_labels()[1]
        if labels:  # below the axes, where it covers no curve
            style: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14)}
            style["ncols"] = 2 if max(map(len, labels)) > 18 else 4
            axes.legend(fontsize=8, frameon=False, **style)
    path = storage_path(workdir) / "loss.png"
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return path


def smooth(values: Sequence[float]) -> np.ndarray:
    """An exponential moving average over half the root of the values, unbiased at the start."""
    decay = 1 - 1 / max(1, len(values) ** 0.5 / 2)
    result, total, weight = np.zeros(len(values)), 0.0, 0.0
    for i, value in enumerate(values):
        total, weight = decay * total + value, decay * weight + 1
        result[i] = total / weight
    return result


def _draw_loss(axes: "Axes", records: Records, held_out: Records) -> None:
    curves = [_draw(axes, records, "loss", GREY, "training, smoothed")]
    for mode, (label, color) in MODES.items():
        points = [{"step": r["step"], **r[mode]} for r in held_out if mode in r]
        step, loss = _values(points, "loss")
        if step:
            axes.plot(step, loss, "o-", color=color, markersize=3, label=label)
            curves.append(np.array(loss))
    if skipped := [record["step"] for record in records if record.get("nonfinite")]:
        at_bottom = axes.get_xaxis_transform()
        axes.plot(skipped, [0] * len(skipped), "rx", transform=at_bottom, label="not finite")
    _finish(axes, "loss", NATS)
    _fit(axes, curves)


def _draw_chunks(axes: "Axes", records: Records) -> None:
    curves = [
        _draw(axes, records, name, color, f"{which} chunk, smoothed")
        for which, (name, color) in CHUNKS.items()
    ]
    _finish(axes, "loss of a sequence's first and last chunk", NATS)
    _fit(axes, curves)


def _draw_inner_gradient(axes: "Axes", records: Records) -> None:
    _draw(axes, records, "inner_grad_norm", OFF)
    _finish(axes, "inner gradient, before clipping", "norm, mean over chunks")
    axes.set_ylim(bottom=0)


def _draw_drift(axes: "Axes", records: Records) -> None:
    from matplotlib import colormaps

    names = list(dict.fromkeys(n for r in records for n in r if n.startswith("fast_drift_")))
    colors = colormaps["viridis"](np.linspace(0, 0.85, len(names)))
    named = {round(i) for i in np.linspace(0, len(names) - 1, min(len(names), MAX_NAMES))}
    for i, (name, color) in enumerate(zip(names, colors, strict=True)):
        label = name.removeprefix("fast_drift_") if i in named else ""
        _draw(axes, records, name, color, label)
    _finish(axes, "drift of the fast weights in a sequence", r"$\|W - W_0\|$")
    axes.set_ylim(bottom=0)


def _draw_positions(axes: "Axes", last: Mapping[str, Any]) -> None:
    """Held-out losses of the last evaluation."""
    edges = [first - 1 for first in last["first_token"]] + last["last_token"][-1:]
    for mode, (label, color) in MODES.items():
        if mode in last:
            loss = np.array(last[mode]["by_position"], float)  # NaN where there are no targets
            axes.stairs(loss, baseline=None, color=color, linewidth=1.6, label=label)
    axes.set_title(f"held-out loss by position, step {last['step']:,}", loc="left", fontsize=10)
    axes.set_xlabel("position (tokens)")
    axes.set_ylabel(NATS)
    axes.set_xticks(range(len(edges)), [f"{edge:,}" for edge in edges])


def _draw_gain(axes: "Axes", held_out: Records) -> None:
    """What TTT gains on held-out sequences: the loss with TTT off minus that with TTT on."""

    def gains(record: Mapping[str, Any]) -> dict[str, float]:
        off, on = (
            np.array([record[mode]["loss"], *record[mode]["by_position"]], float)
            for mode in ("off", "on")
        )
        return dict(zip(names, (off - on).tolist(), strict=True))

    bins = zip(held_out[-1]["first_token"], held_out[-1]["last_token"], strict=True)
    names = ["all tokens", *(f"tokens {first:,} to {last:,}" for first, last in bins)]
    points = [{"step": r["step"], **gains(r)} for r in held_out if "on" in r]
    axes.axhline(0, color="0.6", linewidth=1)
    for name, color in {names[1]: GOLD, names[-1]: GREEN, names[0]: GREY}.items():
        step, gain = _values(points, name)
        axes.plot(step, gain, "o-", color=color, markersize=3, label=name)
    _finish(axes, "held-out gain of TTT: off minus on", "nats per token")


def _draw(axes: "Axes", records: Records, name: str, color: Any, label: str = "") -> np.ndarray:
    """Draws a metric, faint, and its moving average, which is returned."""
    step, values = _values(records, name)
    mean = smooth(values)
    axes.plot(step, values, color=color, linewidth=0.7, alpha=0.35)
    marker = "o" if len(step) == 1 else None
    axes.plot(step, mean, color=color, linewidth=1.6, marker=marker, label=label or None)
    return mean


def _values(records: Records, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the records whose value is a finite number."""
    points = [(r["step"], r[name]) for r in records if isinstance(r.get(name), int | float)]
    points = [(step, value) for step, value in points if np.isfinite(value)]
    return [step for step, _ in points], [float(value) for _, value in points]


def _finish(axes: "Axes", title: str, ylabel: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _fit(axes: "Axes", curves: Sequence[np.ndarray]) -> None:
    """Fits the y axis without the first tenth of the curves, whose loss is far higher."""
    values = np.concatenate([curve[len(curve) // 10 :] for curve in curves])
    if len(values) > 1:
        margin = 0.15 * float(np.ptp(values)) or 0.1
        axes.set_ylim(values.min() - margin, values.max() + margin)
