"""A sweep's results as tidy DataFrames, which become its CSV files, tables and plots."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from tttjax.evaluation.statistics import Estimate, by_position, difference_by_position
from tttjax.sweeps.results import SweepResults, paired

Region = tuple[str, str, int, str]  # setting, mode, context length, region


def _regions(results: SweepResults) -> Iterator[tuple[Region, dict[str, Any]]]:
    """Every region of every setting, mode and context, with the columns that name it."""
    for name in results.settings:
        values = {field: value_text(v) for field, v in _values(results, name).items()}
        for mode in results.modes(name):
            for length in results.design.scoring.lengths:
                for region in results.regions(length):
                    ids = {"setting": name, **values, "mode": mode, "context": length}
                    yield (name, mode, length, region), {**ids, "region": region}


def settings_frame(results: SweepResults, baseline: str) -> pd.DataFrame:
    """One row for each setting, mode, context and region."""
    rows = []
    for (name, mode, length, region), row in _regions(results):
        row["seeds"] = len(results.losses[name])
        row |= _numbers("loss", results.loss(name, region, mode=mode, length=length))
        is_main = mode == results.modes(name)[0] and length == results.longest
        if is_main and name != baseline:
            row |= _numbers("difference", results.difference(name, baseline, region))
        rows.append(row)
    return pd.DataFrame(rows)


def _numbers(name: str, estimate: Estimate) -> dict[str, float]:
    errors = {"": estimate.stderr, "_documents": estimate.documents, "_seeds": estimate.seeds}
    values = {f"{name}_stderr{suffix}": float(error) for suffix, error in errors.items()}
    return {name: float(estimate.mean), **values}


def trials_frame(results: SweepResults) -> pd.DataFrame:
    """One row for each trial, mode, context and region, without errors."""
    return pd.DataFrame(
        {**row, "seed": seed, "loss": float(sums.loss().mean)}
        for (name, mode, length, region), row in _regions(results)
        for seed, sums in results.runs(name, region, mode=mode, length=length).items()
    )


def positions_frame(results: SweepResults, baseline: str) -> pd.DataFrame:
    """The curves by position at the longest context."""
    edges, length = results.edges[results.longest], results.longest
    bins = list(range(len(edges)))
    parts = []
    for name in results.settings:
        for mode in results.modes(name):
            runs = {seed: losses[mode, length] for seed, losses in results.losses[name].items()}
            curves = {"loss": by_position(list(runs.values()), bins)}
            if mode == results.modes(name)[0] and name != baseline:
                main = results.modes(baseline)[0]
                theirs = {s: of[main, length] for s, of in results.losses[baseline].items()}
                curves["difference"] = difference_by_position(*paired(runs, theirs), bins)
            for quantity, curve in curves.items():
                parts.append(
                    pd.DataFrame(
                        {
                            "setting": name,
                            "mode": mode,
                            "quantity": quantity,
                            "context": length,
                            "first_token": edges[:-1] + 1,
                            "last_token": edges[1:],
                            "value": curve.mean,
                            "stderr": np.broadcast_to(curve.stderr, curve.mean.shape),
                        }
                    )
                )
    return pd.concat(parts, ignore_index=True)


def best_frame(results: SweepResults) -> pd.DataFrame:
    """The best settings as a table for `tttjax sweep --trials`."""
    rows = [_values(results, name) for name in results.best()]
    return pd.DataFrame([{field: _argument(value) for field, value in row.items()} for row in rows])


def _argument(value: Any) -> str:
    """As `--config.FIELD=` takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _values(results: SweepResults, setting: str) -> dict[str, Any]:
    return dict(results.design.settings[setting][0].values)


def grid_frame(results: SweepResults) -> pd.DataFrame | None:
    """Losses over two fields, if the sweep is a grid of just two; NaN: not done."""
    axes = results.design.axes
    if len(axes) != 2 or math.prod(map(len, axes.values())) != len(results.design.settings):
        return None
    y, x = axes
    rows = [
        {y: value_text(v[y]), x: value_text(v[x]), "loss": float(results.loss(name).mean)}
        for name in results.settings
        for v in [_values(results, name)]
    ]
    table = pd.DataFrame(rows).pivot(index=y, columns=x, values="loss")
    order = {axis: [value_text(v) for v in values] for axis, values in axes.items()}
    return table.reindex(index=order[y], columns=order[x])


def value_text(value: Any) -> str:
    """A value of a field in a table."""
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
