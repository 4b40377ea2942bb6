"""What an evaluation writes: results.json, three CSV tables, two plots."""

import os
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from tttjax.evaluation import plots
from tttjax.evaluation.files import estimate_values, lists, records, write_results
from tttjax.evaluation.plots import Panel
from tttjax.evaluation.results import (
    Comparison,
    Series,
    by_context,
    by_document,
    by_position,
    differences,
)

FORMAT = 1
BY_DOCUMENT = "by_document.csv"
IDS = ["run", "mode", "label", "context"]
LOSSES = ["loss", "stderr", "bits_per_byte", "bits_per_byte_stderr"]


def write_comparison(
    comparison: Comparison, out: str | os.PathLike, *, log_x: bool = False
) -> dict[str, Path]:
    """Writes all files under `out`, each atomically; returns their paths by name.

    log_x: whether loss by position has a logarithmic x axis.
    """
    return write_results(
        out,
        {
            "results.json": to_dict(comparison),
            "by_position.csv": by_position(comparison),
            "by_context.csv": by_context(comparison)[[*IDS, "tokens", "targets", *LOSSES]],
            BY_DOCUMENT: by_document(comparison),
            "loss_by_position.png": plot_by_position(comparison, log_x),
            "loss_by_context.png": plot_by_context(comparison),
        },
    )


# JSON --------------------------------------------------------------------------------------------


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """The results as plain values; docs/evaluation.md describes the keys."""
    return {
        "format": FORMAT,
        "text": comparison.text,
        "window": comparison.window,
        "context_lengths": list(comparison.lengths),
        "runs": list(comparison.runs),
        "series": _series(comparison),
        "differences": [
            {
                "a": a.label,
                "b": b.label,
                "contexts": {
                    str(length): _context(*differences(comparison, a, b, length))
                    for length in comparison.lengths
                },
            }
            for a, b in comparison.pairs()
        ],
        "table": comparison.table,
        "sentence": comparison.sentence,
    }


def _series(comparison: Comparison) -> list[dict[str, Any]]:
    regions, bins = by_context(comparison), by_position(comparison)
    result = []
    for series in comparison.series:
        contexts = {}
        for length, sums in series.contexts.items():
            parts = (
                f[(f["label"] == series.label) & (f["context"] == length)] for f in (regions, bins)
            )
            by_token = sums.loss_by_position()
            frame = pd.DataFrame({"loss": by_token.mean, "stderr": by_token.stderr})
            contexts[str(length)] = {**_context(*parts), "by_token": lists(frame)}
        change = comparison.context_change(series)
        result.append(
            {
                "label": series.label,
                "run": series.run,
                "mode": series.mode,
                "inner": series.inner,
                "seconds": round(series.seconds, 3),
                "contexts": contexts,
                "longest_minus_shortest_context": change
                and estimate_values(change.mean, change.stderr),
            }
        )
    return result


def _context(regions: pd.DataFrame, bins: pd.DataFrame) -> dict[str, Any]:
    """Values of one context length by region, and of its bins as columns."""
    by_region = {}
    for row in records(regions):
        bits = estimate_values(row["bits_per_byte"], row["bits_per_byte_stderr"])
        by_region[row["tokens"]] = {
            **{name: row[name] for name in ("first_token", "last_token", "targets")},
            "nats_per_token": estimate_values(row["loss"], row["stderr"]),
            "bits_per_byte": bits if row["bits_per_byte"] is not None else None,
        }
    return {**by_region, "bins": lists(bins[["first_token", "last_token", *LOSSES]])}


# Plots -------------------------------------------------------------------------------------------

DIFFERENCE = "difference (nats per token)"


def plot_by_position(comparison: Comparison, log_x: bool = False) -> Figure:
    """Loss by token position at the longest context; lower panel: paired differences.

    Pairing by document makes the errors of differences much smaller than those of the losses.
    """
    longest, documents = comparison.longest, comparison.text["documents"]
    losses = by_position(comparison).query("context == @longest")
    pairs = {
        _pair_label(a, b): differences(comparison, a, b, longest)[1]
        for a, b in comparison.main_pairs()
    }
    panels = [
        Panel(
            losses.rename(columns={"loss": "value"}),
            f"Loss by position ({documents} documents, shaded: ± 1 s.e.)",
            "loss (nats per token)",
        )
    ]
    if pairs:
        title = "Token by token; below 0 the first is better (± 1 s.e.)"
        panels.append(Panel(_stack(pairs), title, DIFFERENCE, zero=""))
    styles = _styles(comparison)
    return plots.plot_by_position(panels, styles, comparison.lengths, comparison.window, log_x)


def plot_by_context(comparison: Comparison) -> Figure:
    """Mean loss of the same tokens by context length; lower panel: paired differences.

    With differences, only they have error bars: the errors of the losses come mostly from variation
    between documents, which all curves share.
    """
    pairs = {
        _pair_label(a, b): pd.concat(
            [
                differences(comparison, a, b, length)[0].assign(context=length)
                for length in comparison.lengths
            ]
        ).query("tokens == 'all'")
        for a, b in comparison.main_pairs()
    }
    losses = by_context(comparison).query("tokens == 'all'").rename(columns={"loss": "value"})
    title = "The same tokens, read with more context"
    panels = [Panel(losses, title, "loss (nats per token)", errors=not pairs)]
    if pairs:
        title = "Token by token; below 0 the first is better (± 1 s.e.)"
        panels.append(Panel(_stack(pairs), title, DIFFERENCE, zero=""))
    return plots.plot_by_context(panels, _styles(comparison), comparison.lengths)


def _pair_label(a: Series, b: Series) -> str:
    return f"{a.label} - {b.label}"


def _stack(pairs: dict[str, pd.DataFrame]) -> pd.DataFrame:
    parts = [frame.assign(label=label) for label, frame in pairs.items()]
    return pd.concat(parts).rename(columns={"loss": "value"})


def _styles(comparison: Comparison) -> dict[str, plots.Style]:
    """A colour for each run, further TTT setup and pair; dashes for TTT off."""
    first: dict[str, str] = {}  # of a run: its first label with TTT
    for series in sorted(comparison.series, key=lambda series: not series.learns):
        first.setdefault(series.run, series.label)
    full = {run["name"] for run in comparison.runs if run.get("window") == 0}
    grey = next((s.label for s in comparison.series if s.run in full and not s.learns), "")
    with_ttt = [series.label for series in comparison.series if series.mode == "on"]
    owners = {s.label: s.label if s.learns else first[s.run] for s in comparison.series}
    pairs = [_pair_label(*pair) for pair in comparison.main_pairs()]
    styles = plots.line_styles([*owners.values(), *pairs], baseline=grey, with_ttt=with_ttt)
    for label, owner in owners.items():
        dashes = {} if owner == label else {"linestyle": "--"}
        styles[label] = {**styles[owner], **dashes}
    return styles
