"""Report files: Markdown, an HTML page, a CSV table in long form, JSON, plots."""

import json
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tttjax.evaluation.files import to_csv
from tttjax.evaluation.report import plots
from tttjax.evaluation.report.page import to_html
from tttjax.evaluation.report.results import Report, SystemResult
from tttjax.evaluation.report.statistics import Value, by_position, difference_by_position, loss
from tttjax.evaluation.report.tables import about_errors, about_text, sections
from tttjax.evaluation.statistics import position_bins
from tttjax.io.atomic import write_files, write_text

FORMAT = 1
COLUMNS = (
    *("system", "mode", "parameters", "non_embedding", "quantity", "unit", "seed", "context"),
    *("first_token", "last_token", "value", "stderr", "stderr_documents", "stderr_seeds"),
)
ALL = "all"


def write_report(report: Report, out: str | os.PathLike) -> dict[str, Path]:
    """Writes all files under `out`, each atomically; returns their paths by name."""
    images = {name: plots.image(name, report) for name in plots.PLOTS}
    writers: dict[str, Callable[[Path], None]] = {
        f"{name}.png": partial(_write_bytes, image) for name, image in images.items()
    }
    writers["report.csv"] = lambda path: write_text(path, _csv(report))
    writers["report.json"] = lambda path: write_text(path, to_json(report))
    writers["report.md"] = lambda path: write_text(path, to_markdown(report))
    writers["report.html"] = lambda path: write_text(path, to_html(report, images))
    return write_files(out, writers)


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


# Markdown ----------------------------------------------------------------------------------------


def to_markdown(report: Report) -> str:
    """The report as Markdown; plots are separate files."""
    parts = [f"# {report.title}", f"{about_text(report)} {about_errors(report)}"]
    if report.warnings:
        parts.append("\n".join(f"- **Note:** {warning}" for warning in report.warnings))
    parts += ["## Summary", "\n".join(f"- {sentence}" for sentence in report.summary)]
    if report.notes:
        parts.append(report.notes.strip())
    for section in sections(report):
        parts += [f"## {section.title}", section.text, section.table.markdown()]
        if section.plot:
            parts.append(f"![{section.title}]({section.plot}.png)")
    return "\n\n".join(parts) + "\n"


# Values ------------------------------------------------------------------------------------------

Row = dict[str, Any]


def to_json(report: Report) -> str:
    """All results as JSON; unknown values are null."""
    values = {
        "format": FORMAT,
        "title": report.title,
        "text": report.text,
        "baseline": report.baseline.label,
        "context_lengths": report.lengths,
        "window": report.window,
        "errors": about_errors(report),
        "warnings": report.warnings,
        "summary": report.summary,
        "notes": report.notes,
        "systems": [_system(system) for system in report.systems],
        "columns": COLUMNS,
    }
    head = json.dumps(values, indent=1, allow_nan=False)
    # One row per line: indented numbers would make most of the file white space.
    body = ",\n  ".join(json.dumps(list(row.values()), allow_nan=False) for row in rows(report))
    return f'{head[:-2]},\n "rows": [\n  {body}\n ]\n}}\n'


def _system(system: SystemResult) -> Row:
    runs = {run.workdir: run for runs in system.runs.values() for run in runs}
    return {
        "label": system.label,
        "mode": system.mode,
        "inner": system.inner,
        "parameters": system.parameters,
        "runs": [vars(run) for run in runs.values()],
    }


def rows(report: Report) -> Iterator[Row]:
    """One row per number, with the columns of report.csv.

    quantity: loss (seed_loss for single seeds), difference (from the baseline), both also
    _by_position; training_flops, training_tokens, training_seconds of each run including its
    ancestors; state_bytes.
    """
    for system in report.systems:
        for length in report.lengths:
            if system.sums.get(length):
                yield from _of_length(report, system, length)


def _of_length(report: Report, system: SystemResult, length: int) -> Iterator[Row]:
    row = partial(_row, system, length)
    sums, theirs = system.sums[length], report.baseline.sums.get(length)
    edges = position_bins(length, report.window, report.bins)
    yield row("loss", "nats per token", 1, length, loss(sums))
    for run, one in zip(system.runs[length], sums, strict=True):
        yield row("seed_loss", "nats per token", 1, length, loss([one]), run.seed)
        for quantity, unit, value in (
            ("training_flops", "FLOPs", run.flops),
            ("training_tokens", "tokens", run.tokens),
            ("training_seconds", "s", run.seconds),
        ):
            yield row(quantity, unit, 1, length, value, run.seed)
    if theirs and system is not report.baseline:
        yield row("difference", "nats per token", 1, length, report.difference(system, length))
    yield row("state_bytes", "bytes", 1, length, system.state_bytes.get(length))
    curves = {"loss_by_position": by_position(sums, edges)}
    if theirs and system is not report.baseline:
        curves["difference_by_position"] = difference_by_position(sums, theirs, edges)
    for quantity, curve in curves.items():
        for i in range(len(edges) - 1):
            of_bin = Value(curve.mean[i], curve.documents[i], curve.seeds[i])
            first, last = int(edges[i]) + 1, int(edges[i + 1])
            yield row(quantity, "nats per token", first, last, of_bin)


def _row(
    system: SystemResult,
    length: int,
    quantity: str,
    unit: str,
    first: int,
    last: int,
    value: Value | float | None,
    seed: int | str = ALL,
) -> Row:
    nothing = np.asarray(math.nan)
    if not isinstance(value, Value):
        value = Value(np.asarray(math.nan if value is None else value), nothing, nothing)
    numbers = map(_number, (value.mean, value.stderr, value.documents, value.seeds))
    parameters = (system.parameters["total"], system.parameters["non_embedding"])
    of_system = (system.label, system.mode, *parameters)
    cells = (*of_system, quantity, unit, seed, length, first, last, *numbers)
    return dict(zip(COLUMNS, cells, strict=True))


def _number(value: Any) -> float | int | None:
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() and abs(number) < 2**53 else float(f"{number:.7g}")


def _csv(report: Report) -> str:
    return to_csv(COLUMNS, (list(row.values()) for row in rows(report)))
