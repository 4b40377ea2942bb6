"""What an evaluation writes: results.json, three CSV tables, two plots."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from tttjax.evaluation import plots
from tttjax.evaluation.files import estimate_values, lists, records, write_results
from tttjax.evaluation.plots import Panel
from tttjax.evaluation.results import (
    IDS,
    LOSSES,
    Comparison,
    Series,
    by_context,
    by_document,
    by_position,
    pair_label,
)

FORMAT = 1
BY_DOCUMENT = "by_document.csv"


def write_comparison(
    comparison: Comparison, out: str | os.PathLike, *, log_x: bool = False
) -> dict[str, Path]:
    """Writes all files under `out`, each atomically; returns their paths by name.

    log_x: whether loss by position has a logarithmic x axis.
    """
    bins = ["first_token", "last_token"]
    return write_results(
        out,
        {
            "results.json": to_dict(comparison),
            "by_position.csv": by_position(comparison)[[*IDS[:-1], *bins, *LOSSES]],
            "by_context.csv": by_context(comparison)[[*IDS, "targets", *LOSSES]],
            BY_DOCUMENT: by_document(comparison),
            "loss_by_position.png": plot_by_position(comparison, log_x),
            "loss_by_context.png": plot_by_context(comparison),
        },
    )


# JSON --------------------------------------------------------------------------------------------


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """The results as plain values; docs/evaluation.md describes the keys."""
    pairs = list(comparison.pairs())
    of_series, of_pairs = _contexts(comparison, None), _contexts(comparison, pairs)
    return {
        "format": FORMAT,
        "text": comparison.text,
        "window": comparison.window,
        "context_lengths": list(comparison.lengths),
        "runs": list(comparison.runs),
        "series": [_series(comparison, one, of_series[one.label]) for one in comparison.series],
        "differences": [
            {"a": a.label, "b": b.label, "contexts": of_pairs[pair_label(a, b)]} for a, b in pairs
        ],
        "table": comparison.table,
        "sentence": comparison.sentence,
    }


def _series(comparison: Comparison, series: Series, contexts: dict[str, Any]) -> dict[str, Any]:
    for length, sums in series.contexts.items():
        by_token = sums.loss_by_position()
        frame = pd.DataFrame({"loss": by_token.mean, "stderr": by_token.stderr})
        contexts[str(length)]["by_token"] = lists(frame)
    change = comparison.context_change(series)
    return {
        "label": series.label,
        "run": series.run,
        "mode": series.mode,
        "inner": series.inner,
        "seconds": round(series.seconds, 3),
        "contexts": contexts,
        "longest_minus_shortest_context": change and estimate_values(change.mean, change.stderr),
    }


def _contexts(comparison: Comparison, pairs: list | None) -> dict[str, dict[str, Any]]:
    """Label -> context length -> values by region, and of the bins as columns."""
    if pairs == []:
        return {}
    result: dict[str, dict[str, Any]] = {}
    for row in records(by_context(comparison, pairs)):
        bits = estimate_values(row["bits_per_byte"], row["bits_per_byte_stderr"])
        context = result.setdefault(row["label"], {}).setdefault(str(row["context"]), {})
        context[row["tokens"]] = {
            **{name: row[name] for name in ("first_token", "last_token", "targets")},
            "nats_per_token": estimate_values(row["loss"], row["stderr"]),
            "bits_per_byte": bits if row["bits_per_byte"] is not None else None,
        }
    for (label, length), bins in by_position(comparison, pairs).groupby(["label", "context"]):
        result[label][str(length)]["bins"] = lists(bins[["first_token", "last_token", *LOSSES]])
    return result


# Plots -------------------------------------------------------------------------------------------


def plot_by_position(comparison: Comparison, log_x: bool = False) -> Figure:
    """Loss by token position at the longest context; lower panel: paired differences.

    Pairing by document makes the errors of differences much smaller than those of the losses.
    """
    pairs, documents = comparison.main_pairs(), comparison.text["documents"]
    title = f"Loss by position ({documents} documents, shaded: ± 1 s.e.)"
    panels = [_panel(by_position(comparison), title)]
    if pairs:
        panels.append(_difference_panel(by_position(comparison, pairs)))
    longest = comparison.longest
    panels = [replace(one, frame=one.frame[one.frame["context"] == longest]) for one in panels]
    styles = _styles(comparison)
    return plots.plot_by_position(panels, styles, comparison.lengths, comparison.window, log_x)


def plot_by_context(comparison: Comparison) -> Figure:
    """Mean loss of the same tokens by context length; lower panel: paired differences.

    With differences, only they have error bars: the errors of the losses come mostly from variation
    between documents, which all curves share.
    """
    pairs = comparison.main_pairs()
    title = "The same tokens, read with more context"
    panels = [replace(_panel(by_context(comparison), title), errors=not pairs)]
    if pairs:
        panels.append(_difference_panel(by_context(comparison, pairs)))
    panels = [replace(one, frame=one.frame.query("tokens == 'all'")) for one in panels]
    return plots.plot_by_context(panels, _styles(comparison), comparison.lengths)


def _panel(rows: pd.DataFrame, title: str) -> Panel:
    return Panel(rows.rename(columns={"loss": "value"}), title, "loss (nats per token)")


def _difference_panel(rows: pd.DataFrame) -> Panel:
    title = "Token by token; below 0 the first is better (± 1 s.e.)"
    return replace(_panel(rows, title), ylabel="difference (nats per token)", zero="")


def _styles(comparison: Comparison) -> dict[str, plots.Style]:
    """A colour for each run, further TTT setup and pair; dashes for TTT off."""
    first: dict[str, str] = {}  # of a run: its first label with TTT
    for series in sorted(comparison.series, key=lambda series: not series.learns):
        first.setdefault(series.run, series.label)
    full = {run["name"] for run in comparison.runs if run.get("window") == 0}
    grey = next((s.label for s in comparison.series if s.run in full and not s.learns), "")
    with_ttt = [series.label for series in comparison.series if series.mode == "on"]
    owners = {s.label: s.label if s.learns else first[s.run] for s in comparison.series}
    pairs = [pair_label(*pair) for pair in comparison.main_pairs()]
    styles = plots.line_styles([*owners.values(), *pairs], baseline=grey, with_ttt=with_ttt)
    for label, owner in owners.items():
        dashes = {} if owner == label else {"linestyle": "--"}
        styles[label] = {**styles[owner], **dashes}
    return styles
