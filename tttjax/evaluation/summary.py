"""An evaluation as text: captioned tables and a summary sentence."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from tttjax.data.held_out import doubling_windows
from tttjax.evaluation import statistics
from tttjax.evaluation.results import Comparison, Series, by_context, pair_label
from tttjax.evaluation.statistics import Estimate
from tttjax.evaluation.tables import (
    Block,
    CaptionedTable,
    describe_difference,
    format_difference,
    format_estimate,
    format_means,
    make_table,
    pivot,
)
from tttjax.evaluation.text import MASKED_NOTE


def blocks(comparison: Comparison) -> list[Block]:
    """A heading, the tables, and notes."""
    text = comparison.text
    parts: list[Block] = [
        f"{describe_runs(comparison.runs)}: {text['tokens']:,} target tokens of "
        f"{text['documents']} held-out documents (split {text['split']} of {text['data']}), as "
        f"{text['sequences']} sequences of {comparison.longest} tokens. Values: mean ± standard "
        "error over documents.",
        _by_context(comparison),
        _by_position(comparison),
    ]
    if comparison.main_pairs():
        parts.append(_differences(comparison))
    if text.get("masked"):
        parts.append(MASKED_NOTE)
    if not text["bytes_are_exact"] and _bits(comparison.series[0], comparison.longest):
        parts.append("Bits per byte are approximate: the tokenizer does not keep every byte.")
    return parts


def describe_runs(runs: Sequence[Mapping[str, Any]]) -> str:
    """`a after 3 steps, b`: names, with steps if known."""
    steps = ("" if run["step"] is None else f" after {run['step']} steps" for run in runs)
    return ", ".join(f"{run['name']}{step}" for run, step in zip(runs, steps, strict=True))


def _by_context(comparison: Comparison) -> CaptionedTable:
    longest = comparison.longest
    rows = by_context(comparison).query("tokens == 'all'")
    rows = rows.assign(column=rows["context"].map("{} tokens".format))
    table = pivot(rows, "label", "column", format_means(rows, "loss"), "loss by context")
    changes = [comparison.context_change(series) for series in comparison.series]
    if changes[0] is not None:
        cells = [format_estimate(change, signed=True) for change in changes if change]
        table[f"{longest} - {min(comparison.lengths)}"] = cells
    bits = [_bits(series, longest) for series in comparison.series]
    cells = [format_estimate(value) if value else "unknown" for value in bits]
    table[f"bits per byte at {longest}"] = cells
    return CaptionedTable("Loss in nats per token, the same tokens read with more context.", table)


def _by_position(comparison: Comparison) -> CaptionedTable:
    longest = comparison.longest
    edges = doubling_windows(longest, comparison.window)
    columns = [f"{a + 1}-{b}" for a, b in pairwise(edges)]
    cells = {}
    for series in comparison.series:
        loss = statistics.by_position([series.contexts[longest]], edges)
        cells[series.label] = [format_estimate(loss[i]) for i in range(len(columns))]
    return CaptionedTable(
        f"Loss in nats per token by position in a context of {longest} tokens (window: "
        f"{comparison.window}).",
        make_table(cells, "loss by position", columns),
    )


def _differences(comparison: Comparison) -> CaptionedTable:
    names = {"within_window": "first window", "beyond_window": "beyond it", "all": "all tokens"}
    if not comparison.has_beyond():
        names = {"all": "all tokens"}
    longest, pairs = comparison.longest, comparison.main_pairs()
    rows = by_context(comparison, pairs).query("context == @longest")
    rows = rows.assign(column=rows["tokens"].map(names)).dropna(subset="column")
    short = {
        pair_label(a, b): f"{a.label} - {b.label.removeprefix(f'{a.run}, ')}" for a, b in pairs
    }
    rows = rows.assign(pair=rows["label"].map(short))
    cells = format_means(rows, "loss", signed=True)
    order = list(short.values()), list(names.values())
    return CaptionedTable(
        f"Differences in nats per token at {longest} tokens; negative: a is better; * over two "
        "standard errors.",
        pivot(rows, "pair", "column", cells, "a - b, token by token", order),
    )


def _bits(series: Series, length: int) -> Estimate | None:
    return series.contexts[length].bits_per_byte()


# The sentence ------------------------------------------------------------------------------------


def sentence(comparison: Comparison) -> str:
    """A summary; differences within two standard errors of zero are called not significant."""
    learning = next((series for series in comparison.series if series.learns), None)
    if learning is not None:
        return _about_learning(comparison, learning)
    if len(comparison.series) > 1:
        return _about_runs(comparison)
    return _about_context(comparison, comparison.series[0])


def _about_learning(comparison: Comparison, learning: Series) -> str:
    where, region = _main_region(comparison)
    others = [b for a, b in comparison.main_pairs() if a is learning]
    same = [b for b in others if b.run == learning.run]
    parts = [
        _describe_change(
            comparison.difference(learning, other, region),
            f"the loss of {learning.run}",
            "against the same weights with TTT off",
        )
        for other in same
    ]
    other_runs = [other for other in others if other.run != learning.run]
    subject = "its loss with TTT" if same else f"the loss of {learning.label}"
    parts += [
        _describe_advantage(comparison, learning, other, region, subject) for other in other_runs
    ]
    if not parts:
        loss = learning.contexts[comparison.longest].between(*region).loss()
        return f"{where}, {learning.label} had a loss of {format_estimate(loss)} nats per token."
    several = sum(s.learns and s.run == learning.run for s in comparison.series) > 1
    how = f" ({learning.label})" if several else ""
    lead = f"test-time training{how} " if same else ""
    return f"{where}, {lead}{'; '.join(parts)} {_unit(comparison)}."


def _about_runs(comparison: Comparison) -> str:
    where, region = _main_region(comparison)
    first = comparison.series[0]
    subject = f"the loss of {first.label}"
    parts = [
        _describe_advantage(comparison, first, other, region, subject)
        for other in comparison.series[1:]
    ]
    return f"{where}, {'; '.join(parts)} {_unit(comparison)}."


def _about_context(comparison: Comparison, series: Series) -> str:
    long = comparison.longest
    value = format_estimate(series.contexts[long].loss())
    loss = f"{series.label} had a loss of {value} nats per token"
    change = comparison.context_change(series)
    if change is None:
        return f"With a context of {long} tokens, {loss}."
    verb = _describe_change(change, "it", f"against one of {min(comparison.lengths)} tokens")
    return f"With a context of {long} tokens, {loss}; the longer context {verb}."


def _unit(comparison: Comparison) -> str:
    if comparison.text["documents"] == 1:
        return "(nats per token; one document, so no standard error)"
    return "(nats per token, ± standard error)"


def _main_region(comparison: Comparison) -> tuple[str, tuple[int, int]]:
    """(Description, positions) of the main region: beyond the window, if any context reaches it."""
    documents = comparison.text["documents"]
    held_out = f"{documents} held-out document{'s' if documents > 1 else ''}"
    if not comparison.has_beyond():
        where = f"Within the window (tokens 1-{comparison.longest} of {held_out})"
        return where, (0, comparison.longest)
    region = comparison.window, comparison.longest
    return f"Beyond the window (tokens {region[0] + 1}-{region[1]} of {held_out})", region


def _describe_change(difference: Estimate, what: str, against: str) -> str:
    """`lowered X by 0.1 ± 0.0 against Y`, or `did not change X significantly`."""
    if difference.is_insignificant():
        amount = format_difference(difference, signed=True)
        return f"did not change {what} significantly ({amount}) {against}"
    verb = "lowered" if difference.mean < 0 else "raised"
    return f"{verb} {what} by {format_difference(difference)} {against}"


def _describe_advantage(
    comparison: Comparison, a: Series, b: Series, region: tuple[int, int], subject: str
) -> str:
    """`the loss of A was 0.1 ± 0.0 lower than that of B`, with the difference at the start.

    An advantage before the first update is not memory, so both are given. The start is the first
    chunk of a series with TTT, else the first window.
    """
    beyond = comparison.difference(a, b, region)
    than = f"from that of {b.label}" if beyond.is_insignificant() else f"than that of {b.label}"
    text = f"{subject} was {describe_difference(beyond)} {than}"
    if region[0] == 0:
        return text
    start, when = region[0], "within the first window"
    if a.inner and a.inner["chunk_size"] <= start:
        start, when = a.inner["chunk_size"], "before its first step"
    early = comparison.difference(a, b, (0, start))
    return f"{text} ({when}, tokens 1-{start}: {describe_difference(early)})"
