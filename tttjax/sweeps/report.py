"""The report of a sweep: tables by setting and by field, plots, and tidy files."""

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from tttjax.errors import UserError
from tttjax.evaluation.files import to_png, write_results
from tttjax.evaluation.page import Page, Section, to_html, to_markdown
from tttjax.evaluation.plots import (
    Panel,
    draw_heat_map,
    line_styles,
    new_figure,
    plot_by_position,
)
from tttjax.evaluation.statistics import Estimate, by_position, difference_by_position
from tttjax.evaluation.tables import (
    MISSING,
    Block,
    CaptionedTable,
    describe_difference,
    format_estimate,
    make_table,
)
from tttjax.sweeps.design import Design
from tttjax.sweeps.results import REGIONS, SweepResults, at_an_edge, load_results, paired

REPORT = "report"
CURVES = 8  # settings in the plot by position: the best, and the baseline


def make_report(design: Design, out: Path, baseline: str = "") -> tuple[list[Block], list[Path]]:
    """Writes `report/` in the sweep's folder; returns its tables, to be shown, and its files.

    baseline: the setting that others are compared with (default: the first with results).
    Raises UserError if no trial is done, or for an unknown baseline.
    """
    results = load_results(design, out)
    if baseline and baseline not in results.settings:
        raise UserError(
            f"--baseline={baseline} is no setting with results; choose from "
            f"{', '.join(results.settings)}"
        )
    baseline = baseline or results.settings[0]
    frames = {
        "settings": _settings_frame(results, baseline),
        "trials": _trials_frame(results),
        "by_position": _positions_frame(results, baseline),
        "best": _best_frame(results),
    }
    plots = {"loss_by_position": _curves(frames["by_position"], results, baseline)}
    heat_map = _heat_map(results)
    if heat_map is not None:
        plots["heat_map"] = heat_map
    images = {name: to_png(figure) for name, figure in plots.items()}
    page = _page(results, out, baseline, main=list(plots)[-1])
    contents = {
        **{f"{name}.csv": frame for name, frame in frames.items()},
        **{f"{name}.png": image for name, image in images.items()},
        **(_parquet(frames) if importlib.util.find_spec("pyarrow") else {}),
        "report.md": to_markdown(page),
        "report.html": to_html(page, images),
    }
    tables = [CaptionedTable(section.text, section.table) for section in page.sections]
    paths = write_results(out / REPORT, contents)
    return [page.about, *tables, *page.highlights, *page.warnings], list(paths.values())


def _page(results: SweepResults, out: Path, baseline: str, main: str) -> Page:
    first, *others = sections(results, baseline)
    return Page(
        title=f"Sweep {out.resolve().name}",
        main=main,
        highlights=highlights(results),
        about=about(results),
        warnings=warnings(results),
        summary=[],
        notes="",
        sections=[replace(first, plot="loss_by_position"), *others],
        baseline=baseline,
    )


def _parquet(frames: Mapping[str, pd.DataFrame]) -> dict[str, bytes]:
    return {f"{name}.parquet": frame.to_parquet(index=False) for name, frame in frames.items()}


# Sentences ---------------------------------------------------------------------------------------


def about(results: SweepResults) -> str:
    """What was measured."""
    scoring = results.design.scoring
    count = sum(map(len, results.losses.values()))
    lengths = ", ".join(map(str, scoring.lengths))
    return (
        f"{count} trials of {len(results.settings)} settings, evaluated on the split "
        f"{scoring.split} with contexts of {lengths} tokens. Loss in nats per token ± one standard "
        "error over documents and seeds; * differences of more than two standard errors, paired by "
        "document and seed, not corrected for the number of comparisons."
    )


def highlights(results: SweepResults) -> list[str]:
    """The best settings, and whether a range was too short to hold them."""
    best, names = results.best(), results.settings
    if len(best) > 1:
        parts = [f"The best setting of each recipe: {'; '.join(best)}."]
    elif len(names) == 1:
        parts = [f"The loss of {names[0]} is {format_estimate(results.loss(names[0]))}."]
    else:
        others = [name for name in names if name != best[0]]
        second = min(others, key=lambda name: float(results.loss(name).mean))
        difference = describe_difference(results.difference(best[0], second))
        parts = [
            f"The best setting is {best[0]}, with a loss of "
            f"{format_estimate(results.loss(best[0]))}; {second} is next: the best is {difference}."
        ]
    return parts + [
        f"The {field} of {name}, {value}, is the {end} tried: the best may lie beyond it."
        for name, field, value, end in at_an_edge(results, best)
    ]


def warnings(results: SweepResults) -> list[str]:
    """Trials that the tables leave out."""
    parts = [("Diverged", results.diverged), ("Not done, and not in this report", results.missing)]
    return [f"{what}: {'; '.join(names)}." for what, names in parts if names]


# Tables ------------------------------------------------------------------------------------------


def sections(results: SweepResults, baseline: str) -> Iterator[Section]:
    """Losses of all settings, their differences from the baseline, and by every field."""
    longest, names = results.longest, results.settings
    regions = results.regions(longest)
    heads = [REGIONS[region] for region in regions]
    rows = {
        name: [
            str(len(results.losses[name])),
            *(format_estimate(results.loss(name, region)) for region in regions),
        ]
        for name in names
    }
    yield Section(
        "Loss",
        f"Loss at {longest:,} tokens, with TTT where there are fast weights.",
        make_table(rows, "setting", ["seeds", *heads]),
    )
    others = [name for name in names if name != baseline]
    if others:
        changes = {
            name: [_signed(results.difference(name, baseline, region)) for region in regions]
            for name in others
        }
        yield Section(
            "Differences",
            f"Difference from {baseline}; negative: better.",
            make_table(changes, "setting", heads),
        )
    static = {
        name: [format_estimate(results.loss(name, region, mode="off")) for region in regions]
        for name in names
        if len(results.modes(name)) > 1
    }
    if static:
        yield Section(
            "TTT off", "The same weights without TTT.", make_table(static, "setting", heads)
        )
    for axis, values in results.design.axes.items():
        if len(values) < 2 or len(results.design.axes) < 2:
            continue
        cells = {
            _text(value): [format_estimate(loss), MISSING if change is None else _signed(change)]
            for value, loss, change in results.by_value(axis)
        }
        if cells:
            yield Section(
                f"By {axis}",
                "Over the other fields and seeds that every value has.",
                make_table(cells, axis, ["loss", f"minus that of {next(iter(cells))}"]),
            )


def _signed(difference: Estimate) -> str:
    return format_estimate(difference, signed=True)


def _text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


# Frames ------------------------------------------------------------------------------------------


def _settings_frame(results: SweepResults, baseline: str) -> pd.DataFrame:
    """One row for each setting, mode, context and region."""
    rows = []
    for name in results.settings:
        values = {field: _text(v) for field, v in _values(results, name).items()}
        for mode in results.modes(name):
            for length in results.design.scoring.lengths:
                for region in results.regions(length):
                    loss = results.loss(name, region, mode=mode, length=length)
                    row = {"setting": name, **values, "mode": mode, "context": length}
                    row |= {"region": region, "seeds": len(results.losses[name])}
                    row |= _numbers("loss", loss)
                    is_main = mode == results.modes(name)[0] and length == results.longest
                    if is_main and name != baseline:
                        row |= _numbers("difference", results.difference(name, baseline, region))
                    rows.append(row)
    return pd.DataFrame(rows)


def _numbers(name: str, estimate: Estimate) -> dict[str, float]:
    errors = {"": estimate.stderr, "_documents": estimate.documents, "_seeds": estimate.seeds}
    values = {f"{name}_stderr{suffix}": float(error) for suffix, error in errors.items()}
    return {name: float(estimate.mean), **values}


def _trials_frame(results: SweepResults) -> pd.DataFrame:
    """One row for each trial, mode, context and region, without errors."""
    rows = []
    for name in results.settings:
        values = {field: _text(v) for field, v in _values(results, name).items()}
        for mode in results.modes(name):
            for length in results.design.scoring.lengths:
                for region in results.regions(length):
                    for seed, sums in results.runs(name, region, mode=mode, length=length).items():
                        row = {"setting": name, **values, "seed": seed, "mode": mode}
                        row |= {"context": length, "region": region}
                        rows.append(row | {"loss": float(sums.loss().mean)})
    return pd.DataFrame(rows)


def _positions_frame(results: SweepResults, baseline: str) -> pd.DataFrame:
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


def _best_frame(results: SweepResults) -> pd.DataFrame:
    """The best settings as a table for `tttjax sweep --trials`."""
    rows = [_values(results, name) for name in results.best()]
    return pd.DataFrame([{field: _argument(value) for field, value in row.items()} for row in rows])


def _argument(value: Any) -> str:
    """As `--config.FIELD=` takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _values(results: SweepResults, setting: str) -> dict[str, Any]:
    return dict(results.design.settings[setting][0].values)


# Plots -------------------------------------------------------------------------------------------


def _curves(frame: pd.DataFrame, results: SweepResults, baseline: str) -> Figure:
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


def _heat_map(results: SweepResults) -> Figure | None:
    """Losses over two fields, where the sweep has two."""
    axes = results.design.axes
    if len(axes) != 2 or min(map(len, axes.values())) < 2:
        return None
    y, x = axes
    rows = [
        {y: _text(v[y]), x: _text(v[x]), "loss": float(results.loss(name).mean)}
        for name in results.settings
        for v in [_values(results, name)]
    ]
    table = pd.DataFrame(rows).pivot(index=y, columns=x, values="loss")
    order = {axis: [_text(v) for v in values] for axis, values in axes.items()}
    table = table.reindex(index=order[y], columns=order[x])
    figure, (panel,) = new_figure(1)
    image = draw_heat_map(panel, table, lambda value: f"{value:.3f}", cmap="viridis_r")
    figure.colorbar(image, ax=panel, label=f"loss at {results.longest:,} tokens (nats per token)")
    return figure
