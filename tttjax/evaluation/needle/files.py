"""Needle results on disk: needle.json, two CSV tables, one heat map per task."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tttjax.evaluation.files import estimate_values, round_number, to_csv
from tttjax.evaluation.needle import plots
from tttjax.evaluation.needle.results import (
    MEASURES,
    REGIONS,
    NeedleResults,
    Sample,
    SampleGroup,
    difference,
    mean,
    wilson,
)
from tttjax.evaluation.needle.tables import sentence, table
from tttjax.io.atomic import write_files, write_text

FORMAT = 1
WHERE = ("length", "depth", "distance", "distance_stop", "region")


def write_needle(results: NeedleResults, out: str | os.PathLike) -> dict[str, Path]:
    """Writes all files under `out`, each atomically; returns their paths by name."""
    writers: dict[str, Callable[[Path], None]] = {
        "needle.json": lambda path: write_text(path, to_json(results)),
        "needle.csv": lambda path: write_text(path, to_csv(*_groups(results))),
        "needle_samples.csv": lambda path: write_text(path, to_csv(*_samples(results))),
    }
    for task in results.tasks:
        writers[f"needle_{task}.png"] = partial(_save, results, task)
    return write_files(out, writers)


def _save(results: NeedleResults, task: str, path: Path) -> None:
    plots.heat_maps(results, task).savefig(path, format="png")


def to_json(results: NeedleResults) -> str:
    """All results but single answers, as JSON; unknown values are null."""
    return json.dumps(to_dict(results), indent=1, allow_nan=False) + "\n"


def to_dict(results: NeedleResults) -> dict[str, Any]:
    """The results as plain values; docs/evaluation.md describes the keys."""
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
                    task: [_group(group) for group in results.groups(series, task)]
                    for task in results.tasks
                },
            }
            for series in results.series
        ],
        "differences": list(_differences(results)),
        "table": table(results),
        "sentence": sentence(results),
    }


def _group(group: SampleGroup) -> dict[str, Any]:
    values: dict[str, Any] = {"by": group.by, **group.where, "needles": len(group.samples)}
    low, high = wilson(group.correct, len(group.samples))
    values |= {
        "found": group.correct,
        "found_low": round_number(low),
        "found_high": round_number(high),
    }
    for name in MEASURES:
        if group.samples:
            values[name] = estimate_values(mean(group.samples, name))
    return values


def _differences(results: NeedleResults) -> Iterator[dict[str, Any]]:
    for a, b in results.pairs():
        for task in results.tasks:
            for region in REGIONS:
                ours, theirs = (series.of(task=task, region=region) for series in (a, b))
                if ours:
                    yield {
                        "a": a.label,
                        "b": b.label,
                        "task": task,
                        "region": region,
                        "needles": len(ours),
                        **{
                            name: estimate_values(difference(ours, theirs, name))
                            for name in ("correct", "recall", "gain", "logprob")
                        },
                    }


Rows = Iterator[Sequence[Any]]


def _groups(results: NeedleResults) -> tuple[Sequence[str], Rows]:
    """One row per group of samples."""
    measures = [word for name in MEASURES for word in (name, f"{name}_stderr")]
    head = (
        *("run", "mode", "label", "task", "by", *WHERE),
        *("needles", "found", "found_low", "found_high", *measures),
    )

    def rows() -> Rows:
        for series in results.series:
            for task in results.tasks:
                for group in results.groups(series, task):
                    if not group.samples:
                        continue
                    values = _group(group)
                    pairs = (values[name].values() for name in MEASURES)
                    yield (
                        *(series.run, series.mode, series.label, task, group.by),
                        *(group.where.get(name, "") for name in WHERE),
                        *(values[n] for n in ("needles", "found", "found_low", "found_high")),
                        *(value for pair in pairs for value in pair),
                    )

    return head, rows()


def _samples(results: NeedleResults) -> tuple[Sequence[str], Rows]:
    """One row per answer."""
    head = (
        *("run", "mode", "label", "task", "length", "depth", "number", "distance", "region"),
        *("value", "written", *MEASURES),
    )

    def rows() -> Rows:
        for series in results.series:
            for sample in series.samples:
                yield (
                    *(series.run, series.mode, series.label, *_spec_columns(sample)),
                    *(sample.distance, sample.region, sample.value, sample.answer.text),
                    *(round_number(measure(sample)) for measure in MEASURES.values()),
                )

    return head, rows()


def _spec_columns(sample: Sample) -> tuple[Any, ...]:
    spec = sample.spec
    return spec.task.name, spec.length, spec.depth, spec.number
