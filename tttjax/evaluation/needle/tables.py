"""Needle results as text: aligned Markdown tables and a summary sentence."""

import math
from collections.abc import Callable, Sequence

from tttjax.evaluation.needle.results import (
    REGIONS,
    NeedleResults,
    NeedleSeries,
    Sample,
    SampleGroup,
    difference,
    mean,
    wilson,
)
from tttjax.evaluation.needle.tasks import TASKS
from tttjax.evaluation.statistics import Estimate
from tttjax.evaluation.tables import fit_table, format_estimate

REGION_TITLES = {
    "outside": "Outside the window",
    "inside": "Inside the window",
    "edge": "On its edge",
}
REGION_LABELS = {"inside": "inside the window", "edge": "on its edge", "outside": "outside it"}


def table(results: NeedleResults) -> str:
    """All tables, with a heading that defines their columns."""
    steps = ", ".join(
        run["name"] + ("" if run["step"] is None else f" after {run['step']} steps")
        for run in results.runs
    )
    window = f"{results.window} tokens" if results.window else "all tokens (no run has a window)"
    heading = (
        f"{steps}: {results.samples} needles for each task, length and depth (seed {results.seed});"
        f" attention window: {window}.\n"
        "found: fraction of needles whose value was generated, with its 95 % interval. recall: "
        "log-probability\nof the value minus that of a decoy, nats per token; gain: with minus "
        "without the needle. Both ± standard\nerror. likeliest: fraction of the value's tokens "
        "that are the argmax, with teacher forcing."
    )
    parts = [heading, *(_task(results, task) for task in results.tasks)]
    return "\n\n".join([*parts, *results.notes])


def _task(results: NeedleResults, task: str) -> str:
    title = f"{TASKS[task].title}, hidden in {results.haystacks[task]}."
    parts = [
        title,
        _by(results, task, "length", "found by context", _share),
        _by(results, task, "distance", "found by distance", _share),
        _by(results, task, "distance", "recall by distance", _recall),
        _regions(results, task),
    ]
    if results.pairs():
        parts.append(_differences(results, task))
    return "\n\n".join(parts)


def _by(
    results: NeedleResults,
    task: str,
    by: str,
    name: str,
    cell: Callable[[Sequence[Sample]], str],
) -> str:
    """One column per length or distance range with samples."""
    series_groups = [
        [group for group in results.groups(series, task) if group.by == by and group.samples]
        for series in results.series
    ]
    rows = [
        [series.label, *(cell(group.samples) for group in groups)]
        for series, groups in zip(results.series, series_groups, strict=True)
    ]
    return fit_table([name, *map(_column, series_groups[0])], rows)


def _column(group: SampleGroup) -> str:
    if group.by == "length":
        return f"{group.where['length']} tokens"
    return f"{group.where['distance']}-{group.where['distance_stop'] - 1}"


def _share(samples: Sequence[Sample]) -> str:
    """`46 % (34-58)`."""
    correct = sum(sample.is_correct for sample in samples)
    low, high = wilson(correct, len(samples))
    return f"{correct / len(samples):.0%} ({100 * low:.0f}-{100 * high:.0f})".replace("%", " %")


def _recall(samples: Sequence[Sample]) -> str:
    return format_estimate(mean(samples, "recall"), signed=True)


def _regions(results: NeedleResults, task: str) -> str:
    head = ["needle", "needles", "found", "recall", "gain", "likeliest", "of another value"]
    rows = []
    for series in results.series:
        for region in REGIONS:
            samples = series.of(task=task, region=region)
            if samples:
                values = [_recall(samples), format_estimate(mean(samples, "gain"), signed=True)]
                tops = [f"{mean(samples, name).mean:.3f}" for name in ("top", "top_decoy")]
                label = f"{series.label}, {REGION_LABELS[region]}"
                rows.append([label, str(len(samples)), _share(samples), *values, *tops])
    return fit_table(head, rows)


def _differences(results: NeedleResults, task: str) -> str:
    head = ["a - b, needle by needle", "found", "recall"]
    rows = []
    for a, b in results.pairs():
        for region in REGIONS:
            ours, theirs = (series.of(task=task, region=region) for series in (a, b))
            if ours:
                values = [difference(ours, theirs, name) for name in ("correct", "recall")]
                label = f"{a.label} - {b.label}, {REGION_LABELS[region]}"
                rows.append([label, *(format_estimate(value, signed=True) for value in values)])
    return fit_table(head, rows)


def sentence(results: NeedleResults) -> str:
    """A summary of recall outside the attention window."""
    regions = [r for r in REGION_TITLES if any(s.of(region=r) for s in results.series)]
    region = regions[0]
    where = REGION_TITLES[region] + ("" if region == "outside" else " (none was outside)")
    parts = [
        f"{series.label} found {_counted(series, region)}, with a recall of "
        f"{_recall_in_words(mean(series.of(region=region), 'recall'))}"
        for series in results.series
    ]
    return f"{where}, {'; '.join(parts)}."


def _counted(series: NeedleSeries, region: str) -> str:
    samples = series.of(region=region)
    return f"{sum(sample.is_correct for sample in samples)} of {len(samples)} needles"


def _recall_in_words(recall: Estimate) -> str:
    value = f"{recall.mean:+.3f}"
    if math.isnan(recall.stderr):
        return f"{value} nats per token"
    verdict = "" if recall.is_significant() else ", not significantly different from none"
    return f"{value} ± {recall.stderr:.3f} nats per token{verdict}"
