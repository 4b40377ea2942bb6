"""The plot of an update trace: losses around each update, gradient norms, weight drift."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tttjax.evaluation.plots import COLOURS, DPI, decorate

MAX_LINES = 8  # with more layers, drift is drawn as a heat map


def draw(about: Mapping[str, Any], means: np.ndarray) -> Figure:
    """about: the summary file's description. means: [bins, columns] from `Bins`."""
    layers = about["layers"]
    tokens, loss, after, norm, clipped, *layer_columns = means.T
    norms, drifts = np.array(layer_columns[: len(layers)]), np.array(layer_columns[len(layers) :])
    figure = Figure(figsize=(8, 10), dpi=DPI, layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    _losses(top, tokens, loss, after)
    _gradients(middle, tokens, norm, norms, layers, about["clip"], float(np.mean(clipped)))
    _drifts(bottom, tokens, drifts, layers, np.array(about["start_norm"]))
    bottom.set_xlabel("tokens read")
    top.set_title(f"{about['text']}: chunks of {about['chunk_size']} tokens", loc="left")
    return figure


def _losses(axes: Axes, tokens, loss, after) -> None:
    axes.plot(tokens, loss, color=COLOURS[0], label="before the update")
    axes.plot(tokens, after, color=COLOURS[1], label="after the update")
    _finish(axes, "loss (nats per token)")


def _gradients(axes: Axes, tokens, norm, norms, layers, clip: float, rate: float) -> None:
    if 1 < len(layers) <= MAX_LINES:
        for name, line, color in zip(layers, norms, _shades(len(layers)), strict=True):
            axes.plot(tokens, line, color=color, linewidth=0.8, label=name)
    axes.plot(tokens, norm, color=COLOURS[-1], label="all layers")
    if clip:
        label = f"clip {clip:g}: {rate:.0%} of chunks"
        axes.axhline(clip, color=COLOURS[1], linestyle="--", linewidth=1, label=label)
    axes.set_yscale("log")
    _finish(axes, "gradient norm")


def _drifts(axes: Axes, tokens, drifts, layers, start) -> None:
    relative = bool(np.all(start > 0))
    if relative:
        drifts = 100 * drifts / start[:, None]
    label = r"$\|W - W_0\|$" + (r" (% of $\|W_0\|$)" if relative else "")
    if len(layers) <= MAX_LINES:
        for name, line, color in zip(layers, drifts, _shades(len(layers)), strict=True):
            axes.plot(tokens, line, color=color, label=name)
        _finish(axes, label)
        return
    image = axes.pcolormesh(tokens, np.arange(len(layers)), drifts, shading="nearest")
    axes.set_yticks(np.arange(len(layers)), layers, fontsize=7)
    axes.figure.colorbar(image, ax=axes, label=label)


def _finish(axes: Axes, ylabel: str) -> None:
    decorate(axes, ylabel=ylabel)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _shades(number: int) -> np.ndarray:
    return colormaps["viridis"](np.linspace(0, 0.85, number))
