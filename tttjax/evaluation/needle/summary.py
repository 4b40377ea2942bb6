"""Needle results as text: tables and a summary sentence."""

import numpy as np
import pandas as pd

from tttjax.evaluation.needle.results import NeedleResults, differences, group_means
from tttjax.evaluation.needle.tasks import TASKS
from tttjax.evaluation.summary import describe_runs
from tttjax.evaluation.tables import Block, CaptionedTable, format_means, pivot

REGION_TITLES = {
    "outside": "Outside the window",
    "inside": "Inside the window",
    "edge": "On its edge",
}
REGION_LABELS = {"inside": "inside the window", "edge": "on its edge", "outside": "outside it"}


def blocks(results: NeedleResults) -> list[Block]:
    """All tables, with a heading that defines their columns."""
    window = f"{results.window} tokens" if results.window else "all tokens (no run has a window)"
    heading = (
        f"{describe_runs(results.runs)}: {results.samples} needles for each task, length and depth "
        f"(seed {results.seed}); attention window: {window}."
    )
    columns = (
        "found: fraction of needles whose value was generated, with its 95 % interval. recall: "
        "log-probability of the value minus that of a decoy, nats per token; gain: with minus "
        "without the needle. Both ± standard error. likeliest: fraction of the value's tokens that "
        "are the argmax, with teacher forcing."
    )
    means, changes = group_means(results), differences(results)
    parts: list[Block] = [heading, columns]
    for task in results.tasks:
        parts.append(f"{TASKS[task].title}, hidden in {results.haystacks[task]}.")
        parts += [CaptionedTable("", table) for table in _tables(means[means["task"] == task])]
        if len(changes):
            parts.append(CaptionedTable("", _differences(changes[changes["task"] == task])))
    return [*parts, *results.notes]


def _tables(means: pd.DataFrame) -> list[pd.DataFrame]:
    """Of one task: found by context and distance, recall by distance, everything by region."""
    by = dict(list(means.groupby("by")))
    contexts = by["length"].assign(column=by["length"]["length"].map("{} tokens".format))
    near = by["distance"]
    last = (near["distance_stop"] - 1).astype(str)
    near = near.assign(column=near["distance"].astype(str) + "-" + last)
    near = near.sort_values(["distance", "label"])
    rows = by["region"]
    regions = pd.DataFrame(
        {
            "needle": _labels(rows["label"], rows["region"]),
            "needles": rows["needles"].astype(str),
            "found": _shares(rows),
            "recall": format_means(rows, "recall", "recall_stderr", signed=True),
            "gain": format_means(rows, "gain", "gain_stderr", signed=True),
            "likeliest": rows["top"].map("{:.3f}".format),
            "of another value": rows["top_decoy"].map("{:.3f}".format),
        }
    )
    recalls = format_means(near, "recall", "recall_stderr", signed=True)
    return [
        pivot(contexts, "label", "column", _shares(contexts), "found by context"),
        pivot(near, "label", "column", _shares(near), "found by distance"),
        pivot(near, "label", "column", recalls, "recall by distance"),
        regions,
    ]


def _differences(changes: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "a - b, needle by needle": _labels(
                changes["a"] + " - " + changes["b"], changes["region"]
            ),
            **{
                name: format_means(changes, measure, f"{measure}_stderr", signed=True)
                for name, measure in (("found", "correct"), ("recall", "recall"))
            },
        }
    )


def _labels(names: pd.Series, regions: pd.Series) -> pd.Series:
    return names.astype(str) + ", " + regions.astype(str).map(REGION_LABELS)


def _shares(rows: pd.DataFrame) -> list[str]:
    """`46 % (34-58)`."""
    columns = (rows["correct"], rows["found_low"], rows["found_high"])
    return [
        f"{100 * share:.0f} % ({100 * low:.0f}-{100 * high:.0f})"
        for share, low, high in zip(*columns, strict=True)
    ]


def sentence(results: NeedleResults) -> str:
    """A summary of recall outside the attention window."""
    rows = results.frame()
    region = next(region for region in REGION_TITLES if region in set(rows["region"]))
    where = REGION_TITLES[region] + ("" if region == "outside" else " (none was outside)")
    parts = []
    for label, of_label in rows[rows["region"] == region].groupby("label", observed=True):
        found, recall = int(of_label["correct"].sum()), of_label["recall"]
        parts.append(
            f"{label} found {found} of {len(of_label)} needles, with a recall of "
            f"{_recall_in_words(recall.mean(), recall.sem())}"
        )
    return f"{where}, {'; '.join(parts)}."


def _recall_in_words(mean: float, stderr: float) -> str:
    if np.isnan(stderr):
        return f"{mean:+.3f} nats per token"
    verdict = "" if abs(mean) > 2 * stderr else ", not significantly different from none"
    return f"{mean:+.3f} ± {stderr:.3f} nats per token{verdict}"
