"""The sections of a report: titles, text and tables, rendered as Markdown or HTML elsewhere."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean

from tttjax.evaluation.report.results import Report, RunFacts, SystemResult, systems_at
from tttjax.evaluation.report.statistics import (
    Value,
    by_position,
    change_with_context,
    difference_by_position,
)
from tttjax.evaluation.statistics import Estimate, doubling_windows
from tttjax.evaluation.tables import format_estimate, markdown_table

MISSING = "-"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is left-aligned, the others right-aligned."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        return markdown_table(self.head, self.rows)


@dataclass(frozen=True)
class Section:
    """A heading with text, a table, and the name of a plot ("" for none)."""

    title: str
    text: str
    table: Table
    plot: str = ""


def sections(report: Report) -> list[Section]:
    """All sections below the summary."""
    base, longest = report.baseline.label, report.longest
    return [
        Section(
            f"Loss by context, as difference from {base}",
            f"Loss minus that of {base}, nats per token; below 0 is better. Every context length "
            "scores the same tokens. The last column is the change of the difference from the "
            "shortest to the longest context.",
            _differences(report),
            "loss_difference_by_context",
        ),
        Section(
            "Loss by context",
            "Nats per token. These errors come mostly from variation between documents, which all "
            "systems share; the paired differences above do not contain it.",
            _losses(report),
        ),
        Section(
            "Loss by position",
            f"Nats per token by position in a context of {longest:,} tokens; the window ends at "
            f"{report.window:,}.",
            _positions(report, _loss_at),
            "loss_by_position",
        ),
        Section(
            f"Loss by position, as difference from {base}",
            f"Loss minus that of {base} at the same positions, nats per token.",
            _positions(report, _difference_at),
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
            _by_length(report, lambda s, n: _bytes(s.state_bytes.get(n))),
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

COMMON = ("parameters", "non-embedding")


def _common(system: SystemResult) -> tuple[str, str, str]:
    total, non_embedding = (system.parameters[key] for key in ("total", "non_embedding"))
    return system.label, _count(total), _count(non_embedding)


def _by_length(report: Report, cell: Callable[[SystemResult, int], str]) -> Table:
    head = ("", *COMMON, *(f"{length:,} tokens" for length in report.lengths))
    rows = (
        (*_common(system), *(cell(system, length) for length in report.lengths))
        for system in report.systems
    )
    return Table(head, tuple(rows))


def _differences(report: Report) -> Table:
    table = _by_length(
        report, lambda s, n: "0" if s is report.baseline else _signed(report.difference(s, n))
    )
    if len(report.lengths) == 1:
        return table
    changes = [_signed(change(report, system)) for system in report.systems]
    changes[report.systems.index(report.baseline)] = "0"
    rows = tuple((*row, cell) for row, cell in zip(table.rows, changes, strict=True))
    return Table((*table.head, f"{report.longest:,} - {min(report.lengths):,}"), rows)


def change(report: Report, system: SystemResult) -> Value | None:
    """Difference from the baseline at the longest context minus that at the shortest."""
    short, long = min(report.lengths), report.longest
    mine, theirs = system.sums, report.baseline.sums
    if short == long or not all(n in r for n in (short, long) for r in (mine, theirs)):
        return None
    return change_with_context((mine[long], theirs[long]), (mine[short], theirs[short]))


def _losses(report: Report) -> Table:
    def cell(system: SystemResult, length: int) -> str:
        value = report.loss(system, length)
        return format_estimate(value.estimate) if value else MISSING

    return _by_length(report, cell)


Position = Callable[[Report, SystemResult, Sequence[int]], Value | None]


def _loss_at(report: Report, system: SystemResult, edges: Sequence[int]) -> Value | None:
    return by_position(system.sums[report.longest], edges)


def _difference_at(report: Report, system: SystemResult, edges: Sequence[int]) -> Value | None:
    theirs = report.baseline.sums.get(report.longest)
    if theirs is None or system is report.baseline:
        return None
    return difference_by_position(system.sums[report.longest], theirs, edges)


def _positions(report: Report, values: Position) -> Table:
    edges = doubling_windows(report.longest, report.window)
    ranges = [f"{a + 1:,}-{b:,}" for a, b in pairwise(edges)]
    signed = values is _difference_at
    rows = []
    for system in systems_at(report, report.longest):
        value = values(report, system, edges)
        cells = [MISSING] * len(ranges) if value is None else _cells(value, signed)
        if signed and system is report.baseline:
            cells = ["0"] * len(ranges)
        rows.append((*_common(system), *cells))
    return Table(("", *COMMON, *ranges), tuple(rows))


def _cells(value: Value, signed: bool) -> list[str]:
    pairs = zip(value.mean, value.stderr, strict=True)
    return [format_estimate(Estimate(m, s), signed) for m, s in pairs]


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


def _costs(report: Report) -> Table:
    head = ("", *COMMON, "context", "trained on", "FLOPs", "time", "tokens/s", "loss")
    rows = []
    for system, length, runs in trained(report):
        seconds = [run.seconds for run in runs if run.seconds is not None]
        rates = [run.tokens_per_second for run in runs if run.tokens_per_second is not None]
        at_least = "" if all(run.known_from_start for run in runs) else "≥ "
        value = report.loss(system, length)
        rows.append(
            (
                *_common(system),
                f"{length:,} tokens",
                f"{at_least}{_count(round(mean(run.tokens for run in runs)))} tokens",
                f"{at_least}{mean_flops(runs):.3g}",
                at_least + _duration(mean(seconds)) if seconds else "unknown",
                f"{mean(rates):,.0f}" if rates else "unknown",
                format_estimate(value.estimate) if value else MISSING,
            )
        )
    return Table(head, tuple(rows))


# Cells -------------------------------------------------------------------------------------------


def _signed(value: Value | None) -> str:
    return format_estimate(value.estimate, signed=True) if value else MISSING


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:,}"


def _bytes(value: int | None) -> str:
    if value is None:
        return MISSING
    power = min(3, int(math.log(value, 1024))) if value else 0
    return f"{value:,} B" if power == 0 else f"{value / 1024**power:.4g} {' KMG'[power]}iB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, secs = divmod(round(seconds), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02}:{secs:02}" if minutes >= 60 else f"{minutes}:{secs:02}"
    )
