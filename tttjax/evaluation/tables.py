"""Evaluation results as text: aligned Markdown tables and a summary sentence."""

import math
import textwrap
from collections.abc import Sequence
from itertools import pairwise

from tttjax.evaluation.results import Comparison, Series
from tttjax.evaluation.statistics import Estimate, doubling_windows

WIDTH = 100  # columns of a terminal or a page


def table(comparison: Comparison) -> str:
    """All tables, each with a heading."""
    text = comparison.text
    steps = ", ".join(
        run["name"] + ("" if run["step"] is None else f" after {run['step']} steps")
        for run in comparison.runs
    )
    heading = (
        f"{steps}: {text['tokens']:,} target tokens of {text['documents']} held-out documents "
        f"(split {text['split']} of {text['data']}), as {text['sequences']} sequences of "
        f"{comparison.longest} tokens. Values: mean ± standard error over documents."
    )
    heading = textwrap.fill(heading, WIDTH, break_long_words=False, break_on_hyphens=False)
    parts = [heading, _by_context(comparison), _by_position(comparison)]
    if comparison.main_pairs():
        parts.append(_differences(comparison))
    if not text["bytes_are_exact"] and _bits(comparison.series[0], comparison.longest):
        parts.append("Bits per byte are approximate: the tokenizer does not keep every byte.")
    return "\n\n".join(parts)


def _by_context(comparison: Comparison) -> str:
    longest = comparison.longest
    head = ["loss by context", *(f"{length} tokens" for length in comparison.lengths)]
    changes = [comparison.context_change(series) for series in comparison.series]
    if changes[0] is not None:
        head.append(f"{longest} - {min(comparison.lengths)}")
    head.append(f"bits per byte at {longest}")
    rows = []
    for series, change in zip(comparison.series, changes, strict=True):
        cells = [format_estimate(series.contexts[length].loss()) for length in comparison.lengths]
        if change is not None:
            cells.append(format_estimate(change, signed=True))
        bits = _bits(series, longest)
        rows.append([series.label, *cells, format_estimate(bits) if bits else "unknown"])
    return (
        f"Loss in nats per token, the same tokens read with more context.\n{fit_table(head, rows)}"
    )


def _by_position(comparison: Comparison) -> str:
    longest = comparison.longest
    edges = doubling_windows(longest, comparison.window)
    head = ["loss by position", *_ranges(edges)]
    rows = []
    for series in comparison.series:
        mean, stderr = series.contexts[longest].binned(edges).loss_by_position()
        values = [Estimate(m, s) for m, s in zip(mean, stderr, strict=True)]
        rows.append([series.label, *map(format_estimate, values)])
    return (
        f"Loss in nats per token by position in a context of {longest} tokens (window: "
        f"{comparison.window}).\n{fit_table(head, rows)}"
    )


def _differences(comparison: Comparison) -> str:
    longest = comparison.longest
    regions = comparison.regions(longest)
    names = {"within_window": "first window", "beyond_window": "beyond it", "all": "all tokens"}
    shown = [name for name in names if name in regions and (name == "all" or len(regions) == 3)]
    head = ["a - b, token by token", *(names[name] for name in shown)]
    rows = []
    for a, b in comparison.main_pairs():
        difference = a.contexts[longest] - b.contexts[longest]
        values = [difference.between(*regions[name]).loss() for name in shown]
        pair = f"{a.label} - {b.label.removeprefix(f'{a.run}, ')}"
        rows.append([pair, *(format_estimate(v, signed=True) for v in values)])
    return (
        f"Differences in nats per token at {longest} tokens; negative: a is better; * over two "
        f"standard errors.\n{fit_table(head, rows)}"
    )


def _bits(series: Series, length: int) -> Estimate | None:
    return series.contexts[length].bits_per_byte()


def _ranges(edges: Sequence[int]) -> list[str]:
    return [f"{a + 1}-{b}" for a, b in pairwise(edges)]


def format_estimate(estimate: Estimate, signed: bool = False) -> str:
    """`1.2345 ± 0.0067`; signed: with a star if more than two standard errors from 0."""
    mean, stderr = float(estimate.mean), float(estimate.stderr)
    if math.isnan(mean):
        return "no targets"
    text = f"{mean:+.4f}" if signed else f"{mean:.4f}"
    if math.isnan(stderr):
        return text
    star = " *" if signed and estimate.is_significant() else ""
    return f"{text} ± {stderr:.4f}{star}"


def fit_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """`markdown_table` within WIDTH columns; wide tables are split, repeating the first column."""
    widths = [max(map(len, column)) + 3 for column in zip(head, *rows, strict=True)]
    tables = [[0]]
    for column, width in enumerate(widths[1:], start=1):
        total = sum(widths[other] for other in tables[-1]) + 1
        if len(tables[-1]) > 1 and total + width > WIDTH:
            tables.append([0])
        tables[-1].append(column)

    def part(columns: Sequence[int]) -> str:
        chosen = [[cells[column] for column in columns] for cells in (head, *rows)]
        return markdown_table(chosen[0], chosen[1:])

    return "\n\n".join(map(part, tables))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table; the first column is left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        cells = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([first, *cells]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])


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
            _difference(comparison, learning, other, region),
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


def _difference(comparison: Comparison, a: Series, b: Series, region: tuple[int, int]) -> Estimate:
    longest = comparison.longest
    return (a.contexts[longest] - b.contexts[longest]).between(*region).loss()


def format_difference(difference: Estimate, signed: bool = False) -> str:
    """`0.012 ± 0.003`, with or without sign."""
    mean, error = float(difference.mean), float(difference.stderr)
    digits = 3 if abs(mean) >= 0.01 else 4
    text = f"{mean:+.{digits}f}" if signed else f"{abs(mean):.{digits}f}"
    return text if math.isnan(error) else f"{text} ± {error:.{digits}f}"


def is_insignificant(difference: Estimate) -> bool:
    """Whether it is zero, or known to be within two standard errors of zero."""
    known = not math.isnan(float(difference.stderr))
    return difference.mean == 0 or (known and not difference.is_significant())


def _describe_change(difference: Estimate, what: str, against: str) -> str:
    """`lowered X by 0.1 ± 0.0 against Y`, or `did not change X significantly`."""
    if is_insignificant(difference):
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
    beyond = _difference(comparison, a, b, region)
    than = f"from that of {b.label}" if is_insignificant(beyond) else f"than that of {b.label}"
    text = f"{subject} was {describe_difference(beyond)} {than}"
    if region[0] == 0:
        return text
    start, when = region[0], "within the first window"
    if a.inner and a.inner["chunk_size"] <= start:
        start, when = a.inner["chunk_size"], "before its first step"
    early = _difference(comparison, a, b, (0, start))
    return f"{text} ({when}, tokens 1-{start}: {describe_difference(early)})"


def describe_difference(difference: Estimate) -> str:
    """`0.012 ± 0.003 lower`, or `not significantly different`."""
    if is_insignificant(difference):
        return f"not significantly different ({format_difference(difference, signed=True)})"
    return f"{format_difference(difference)} {'lower' if difference.mean < 0 else 'higher'}"
