"""The report of a sweep: tables by setting and by field, plots, and tidy files."""

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from tttjax.errors import UserError
from tttjax.evaluation.files import to_png, write_results
from tttjax.evaluation.page import Page, Section, to_html, to_markdown
from tttjax.evaluation.statistics import Estimate
from tttjax.evaluation.tables import (
    MISSING,
    Block,
    CaptionedTable,
    describe_difference,
    format_estimate,
    make_table,
)
from tttjax.sweeps.design import Design
from tttjax.sweeps.figures import plot_curves, plot_heat_map
from tttjax.sweeps.frames import (
    best_frame,
    grid_frame,
    positions_frame,
    settings_frame,
    trials_frame,
    value_text,
)
from tttjax.sweeps.results import REGIONS, SweepResults, at_an_edge, load_results

REPORT = "report"


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
        "settings": settings_frame(results, baseline),
        "trials": trials_frame(results),
        "by_position": positions_frame(results, baseline),
        "best": best_frame(results),
    }
    plots = {"loss_by_position": plot_curves(frames["by_position"], results, baseline)}
    grid = grid_frame(results)
    if grid is not None:
        plots["heat_map"] = plot_heat_map(grid, results.longest)
    images = {name: to_png(figure) for name, figure in plots.items()}
    page = _page(results, out, baseline, grid)
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


def _page(results: SweepResults, out: Path, baseline: str, grid: pd.DataFrame | None) -> Page:
    first, *others = sections(results, baseline)
    if grid is not None:
        others.append(_grid_section(results, grid))
    return Page(
        title=f"Sweep {out.resolve().name}",
        main="loss_by_position" if grid is None else "heat_map",
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
    for axis in results.design.axes:
        if len(results.design.axes) < 2:
            continue
        cells = {
            value_text(value): [
                format_estimate(loss),
                MISSING if change is None else _signed(change),
            ]
            for value, loss, change in results.by_value(axis)
        }
        if cells:
            yield Section(
                f"By {axis}",
                "Over the other fields and seeds that every value has.",
                make_table(cells, axis, ["loss", f"minus that of {next(iter(cells))}"]),
            )


def _grid_section(results: SweepResults, grid: pd.DataFrame) -> Section:
    y, x = str(grid.index.name), str(grid.columns.name)
    cells = {
        str(value): [MISSING if np.isnan(loss) else f"{loss:.4f}" for loss in row]
        for value, row in zip(grid.index, grid.to_numpy(), strict=True)
    }
    return Section(
        f"{y} by {x}",
        f"Loss at {results.longest:,} tokens, mean over seeds.",
        make_table(cells, f"{y}, by {x}", list(map(str, grid.columns))),
        "heat_map",
    )


def _signed(difference: Estimate) -> str:
    return format_estimate(difference, signed=True)
