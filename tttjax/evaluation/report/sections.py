"""The sections of a report: titles, text and tables, rendered as Markdown or HTML elsewhere."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import mean

import pandas as pd

from tttjax.data.held_out import doubling_windows
from tttjax.evaluation.page import Section
from tttjax.evaluation.report.results import Report, RunFacts, SystemResult, systems_at
from tttjax.evaluation.tables import (
    MISSING,
    format_bytes,
    format_count,
    format_estimate,
    format_means,
    format_seconds,
    pivot,
)
from tttjax.evaluation.text import MASKED_NOTE


def sections(report: Report) -> list[Section]:
    """All sections below the summary."""
    base, longest = report.baseline.label, report.longest
    return [
        Section(
            f"Loss by context, as difference from {base}",
            f"Loss minus that of {base}, nats per token; below 0 is better. Every context length "
            "scores the same tokens. The last column is the change of the difference from the "
            "shortest to the longest context.",
            _by_context(report, "difference"),
            "loss_difference_by_context",
        ),
        Section(
            "Loss by context",
            "Nats per token. These errors come mostly from variation between documents, which all "
            "systems share; the paired differences above do not contain it.",
            _by_context(report, "loss"),
        ),
        Section(
            "Loss by position",
            f"Nats per token by position in a context of {longest:,} tokens; the window ends at "
            f"{report.window:,}.",
            _positions(report, "loss_by_window"),
            "loss_by_position",
        ),
        Section(
            f"Loss by position, as difference from {base}",
            f"Loss minus that of {base} at the same positions, nats per token.",
            _positions(report, "difference_by_window"),
        ),
        Section(
            "Loss against training FLOPs",
            "Model FLOPs by formula, including second-order terms, and measured time, both "
            "including the runs that a run was initialized from (≥: one of these was not found). "
            "Times on different machines are not comparable.",
            _costs(report),
            "loss_by_flops",
        ),
        Section(
            "State",
            "Bytes of one sequence's decode state: keys and values, recurrent states, and the fast "
            "weights of systems with TTT.",
            _by_context(report, "state_bytes"),
            "state_by_context",
        ),
    ]


def about_text(report: Report) -> str:
    """The evaluated tokens."""
    text = report.text
    return (
        f"{text['tokens']:,} target tokens of {text['documents']} held-out documents (split "
        f"{text['split']} of {text['data']}), as {text['sequences']} sequences of "
        f"{report.longest:,} tokens, split further for shorter contexts."
        + (f" {MASKED_NOTE}" if text.get("masked") else "")
    )


def about_errors(report: Report) -> str:
    """The definition of ± in this report."""
    documents = report.text["documents"]
    several = [s for s in report.systems if s.seeds() > 1]
    single = [s.label for s in report.systems if s.seeds() == 1]
    over = f"over the {documents} held-out documents, paired by document for differences"
    if not several:
        text = f"± is one standard error {over}; every system has one seed, so none over seeds."
    else:
        seeds = ", ".join(f"{s.label} {s.seeds()}" for s in several)
        text = (
            f"± is one standard error: the root of the sum of squares of that {over}, and that "
            f"over seeds (runs: {seeds})."
        )
        if min(s.seeds() for s in several) == 2:
            text += " An error from two seeds is itself uncertain."
        if single:
            text += f" Systems with one seed have no error over seeds: {', '.join(single)}."
    return (
        f"{text} * marks differences of more than two standard errors; they are not corrected for "
        "the number of comparisons."
    )


# Tables ------------------------------------------------------------------------------------------


def _by_context(report: Report, quantity: str) -> pd.DataFrame:
    rows = report.select(quantity)
    heads = [f"{length:,} tokens" for length in report.lengths]
    if quantity == "difference" and len(report.lengths) > 1:
        heads.append(f"{report.longest:,} - {min(report.lengths):,}")
        rows = pd.concat([rows, report.select("difference_change")])
    names = [
        heads[-1] if name == "difference_change" else f"{context:,} tokens"
        for name, context in zip(rows["quantity"], rows["context"], strict=True)
    ]
    return _by_system(
        report, quantity, rows, names, heads, [system.label for system in report.systems]
    )


def _positions(report: Report, quantity: str) -> pd.DataFrame:
    rows = report.select(quantity)
    edges = doubling_windows(report.longest, report.window)
    heads = [f"{a + 1:,}-{b:,}" for a, b in pairwise(edges)]
    bins = zip(rows["first_token"], rows["last_token"], strict=True)
    names = [f"{first:,}-{last:,}" for first, last in bins]
    labels = [system.label for system in systems_at(report, report.longest)]
    return _by_system(report, quantity, rows, names, heads, labels)


def _by_system(
    report: Report,
    quantity: str,
    rows: pd.DataFrame,
    names: Sequence[str],
    heads: Sequence[str],
    labels: Sequence[str],
) -> pd.DataFrame:
    """A row for each label, a column for each head, and parameter counts."""
    if quantity == "state_bytes":
        cells = [format_bytes(value) for value in rows["value"]]
    else:
        cells = format_means(rows, signed=quantity.startswith("difference"))
    table = pivot(rows.assign(head=names), "system", "head", cells, order=(labels, heads))
    if quantity.startswith("difference") and report.baseline.label in labels:
        table.loc[table[""] == report.baseline.label, list(heads)] = "0"
    return _with_parameters(report, table)


def _with_parameters(report: Report, table: pd.DataFrame) -> pd.DataFrame:
    """The table with parameter counts in its last columns."""
    systems = {system.label: system for system in report.systems}

    def counts(key: str) -> list[str]:
        return [format_count(systems[label].parameters[key]) for label in table[""]]

    return table.assign(**{"parameters": counts("total"), "non-embedding": counts("non_embedding")})


def trained(report: Report) -> Iterator[tuple[SystemResult, int, tuple[RunFacts, ...]]]:
    """(system, context, runs) for all distinct runs, at the longest context of each."""
    for system in report.systems:
        longest: dict[tuple[str, ...], int] = {}
        for length, runs in system.runs.items():
            longest[tuple(run.workdir for run in runs)] = length
        for length in sorted(longest.values()):
            yield system, length, system.runs[length]


def mean_flops(runs: Sequence[RunFacts]) -> float:
    """Training FLOPs of one run, averaged over seeds."""
    return mean(run.flops for run in runs)


def _costs(report: Report) -> pd.DataFrame:
    rows = []
    for system, length, runs in trained(report):
        seconds = [run.seconds for run in runs if run.seconds is not None]
        rates = [run.tokens_per_second for run in runs if run.tokens_per_second is not None]
        at_least = "" if all(run.known_from_start for run in runs) else "≥ "
        value = report.loss(system, length)
        tokens = format_count(round(mean(run.tokens for run in runs)))
        rows.append(
            {
                "": system.label,
                "context": f"{length:,} tokens",
                "trained on": f"{at_least}{tokens} tokens",
                "FLOPs": f"{at_least}{mean_flops(runs):.3g}",
                "time": at_least + format_seconds(mean(seconds)) if seconds else "unknown",
                "tokens/s": f"{mean(rates):,.0f}" if rates else "unknown",
                "loss": format_estimate(value) if value else MISSING,
            }
        )
    return _with_parameters(report, pd.DataFrame(rows))
