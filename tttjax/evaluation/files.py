"""Evaluation results on disk: results.json, two CSV tables, two plots."""

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tttjax.errors import UserError
from tttjax.evaluation import plots
from tttjax.evaluation.results import Comparison, Series
from tttjax.evaluation.statistics import Estimate, Sums
from tttjax.io.atomic import write_files, write_text
from tttjax.io.paths import local_path

FORMAT = 1


def write_results(
    comparison: Comparison, out: str | os.PathLike, *, log_x: bool = False
) -> dict[str, Path]:
    """Writes all files under `out`, each atomically; returns their paths by name.

    log_x: whether loss by position has a logarithmic x axis.
    """
    writers: dict[str, Callable[[Path], None]] = {
        "results.json": lambda path: write_text(path, to_json(comparison)),
        "by_position.csv": lambda path: write_text(path, to_csv(*_by_position(comparison))),
        "by_context.csv": lambda path: write_text(path, to_csv(*_by_context(comparison))),
        "loss_by_position.png": lambda path: _save(plots.by_position(comparison, log_x), path),
        "loss_by_context.png": lambda path: _save(plots.by_context(comparison), path),
    }
    return write_files(out, writers)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png")


def check_writable(out: str | os.PathLike) -> None:
    """Raises UserError if `write_results` cannot write under `out`. Creates nothing."""
    folder = local_path(out, "--out").absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{existing} is a file; give a results folder with --out=DIR")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"cannot write results to {folder}: no write permission for {existing}; give another "
            "folder with --out=DIR"
        )


# JSON --------------------------------------------------------------------------------------------


def to_json(comparison: Comparison) -> str:
    """All results as JSON; unknown values are null."""
    values = to_dict(comparison)
    return json.dumps(values, indent=1, allow_nan=False) + "\n"


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """The results as plain values; docs/evaluation.md describes the keys."""
    return {
        "format": FORMAT,
        "text": comparison.text,
        "window": comparison.window,
        "context_lengths": list(comparison.lengths),
        "runs": list(comparison.runs),
        "series": [_series(comparison, series) for series in comparison.series],
        "differences": [
            {"a": a.label, "b": b.label, "contexts": _contexts(comparison, a, b)}
            for a, b in comparison.pairs()
        ],
        "table": comparison.table,
        "sentence": comparison.sentence,
    }


def _series(comparison: Comparison, series: Series) -> dict[str, Any]:
    contexts = {}
    for length in comparison.lengths:
        sums = series.contexts[length]
        by_token = sums.loss_by_position()
        contexts[str(length)] = {
            **_regions(comparison, length, sums),
            "bins": _bins(comparison, length, sums),
            "by_token": {"loss": _numbers(by_token.mean), "stderr": _numbers(by_token.stderr)},
        }
    change = comparison.context_change(series)
    return {
        "label": series.label,
        "run": series.run,
        "mode": series.mode,
        "inner": series.inner,
        "seconds": round(series.seconds, 3),
        "contexts": contexts,
        "longest_minus_shortest_context": None if change is None else estimate_values(change),
    }


def _contexts(comparison: Comparison, a: Series, b: Series) -> dict[str, Any]:
    differences = {length: a.contexts[length] - b.contexts[length] for length in comparison.lengths}
    return {
        str(length): {
            **_regions(comparison, length, sums),
            "bins": _bins(comparison, length, sums),
        }
        for length, sums in differences.items()
    }


def _regions(comparison: Comparison, length: int, sums: Sums) -> dict[str, Any]:
    regions = {}
    for name, (first, stop) in comparison.regions(length).items():
        part = sums.between(first, stop)
        bits = part.bits_per_byte()
        regions[name] = {
            "first_token": first + 1,
            "last_token": stop,
            "targets": int(part.count_DL.sum()),
            "nats_per_token": estimate_values(part.loss()),
            "bits_per_byte": None if bits is None else estimate_values(bits),
        }
    return regions


def _bins(comparison: Comparison, length: int, sums: Sums) -> dict[str, Any]:
    edges = comparison.edges(length)
    binned = sums.binned(edges)
    loss, bits = binned.loss_by_position(), binned.bits_by_position()
    unknown = [None] * (len(edges) - 1)
    return {
        "first_token": [int(edge) + 1 for edge in edges[:-1]],
        "last_token": [int(edge) for edge in edges[1:]],
        "loss": _numbers(loss.mean),
        "stderr": _numbers(loss.stderr),
        "bits_per_byte": _numbers(bits.mean) if bits else unknown,
        "bits_per_byte_stderr": _numbers(bits.stderr) if bits else unknown,
    }


def estimate_values(estimate: Estimate) -> dict[str, float | None]:
    """Mean and standard error for JSON; None where there is none."""
    return {"mean": round_number(estimate.mean), "stderr": round_number(estimate.stderr)}


def round_number(value: Any) -> float | None:
    """Seven significant digits, which keeps the files of long contexts small."""
    return float(f"{float(value):.7g}") if math.isfinite(float(value)) else None


def _numbers(values: np.ndarray) -> list[float | None]:
    return [round_number(value) for value in values]


# CSV ---------------------------------------------------------------------------------------------

Rows = Iterator[Sequence[Any]]


def to_csv(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()


def _by_position(comparison: Comparison) -> tuple[Sequence[str], Rows]:
    head = (
        *("run", "mode", "label", "context", "first_token", "last_token"),
        *("loss", "stderr", "bits_per_byte", "bits_per_byte_stderr"),
    )

    def rows() -> Rows:
        for series in comparison.series:
            for length in comparison.lengths:
                bins = _bins(comparison, length, series.contexts[length])
                for row in zip(*bins.values(), strict=True):
                    yield (series.run, series.mode, series.label, length, *row)

    return head, rows()


def _by_context(comparison: Comparison) -> tuple[Sequence[str], Rows]:
    head = (
        *("run", "mode", "label", "context", "tokens", "targets"),
        *("loss", "stderr", "bits_per_byte", "bits_per_byte_stderr"),
    )

    def rows() -> Rows:
        for series in comparison.series:
            for length in comparison.lengths:
                regions = _regions(comparison, length, series.contexts[length])
                for name, region in regions.items():
                    loss, bits = region["nats_per_token"], region["bits_per_byte"] or {}
                    yield (
                        *(series.run, series.mode, series.label, length, name, region["targets"]),
                        *(loss["mean"], loss["stderr"], bits.get("mean"), bits.get("stderr")),
                    )

    return head, rows()
