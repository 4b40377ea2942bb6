"""Plots of a sweep: curves by position, a heat map over two fields."""

import pandas as pd
from matplotlib.figure import Figure

from tttjax.evaluation.plots import (
    Panel,
    draw_heat_map,
    line_styles,
    new_figure,
    plot_by_position,
)
from tttjax.sweeps.results import SweepResults

CURVES = 8  # settings in the plot by position: the best, and the baseline


def plot_curves(frame: pd.DataFrame, results: SweepResults, baseline: str) -> Figure:
    names = sorted(results.settings, key=lambda name: float(results.loss(name).mean))[:CURVES]
    main = frame[frame["mode"] == frame["setting"].map(lambda name: results.modes(name)[0])]
    main = main[main["setting"].isin([baseline, *names])]
    frames = {
        quantity: rows.rename(columns={"setting": "label"})
        for quantity, rows in main.groupby("quantity", sort=False)
    }
    panels = [
        Panel(
            frames["loss"],
            f"By position in {results.longest:,} tokens",
            "loss (nats per token)",
            errors=False,
        )
    ]
    if "difference" in frames:
        title = "Difference at the same tokens; shaded: ± 1 s.e."
        panels.append(Panel(frames["difference"], title, f"minus {baseline} (nats)", zero=baseline))
    styles = line_styles(results.settings, baseline=baseline)
    scoring = results.design.scoring
    return plot_by_position(panels, styles, scoring.lengths, scoring.window)


def plot_heat_map(grid: pd.DataFrame, longest: int) -> Figure:
    """Losses over two fields, from `frames.grid_frame`. longest: the context, in tokens."""
    figure, (panel,) = new_figure(1)
    image = draw_heat_map(panel, grid, lambda value: f"{value:.3f}", cmap="viridis_r")
    figure.colorbar(image, ax=panel, label=f"loss at {longest:,} tokens (nats per token)")
    return figure
