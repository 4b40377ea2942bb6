"""Makes a report: opens the runs, reads what was not read before, writes."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import jax

from tttjax.config import EvalConfig, parameter_count
from tttjax.config.values import check_value
from tttjax.data.shards import PreparedData
from tttjax.errors import UserError
from tttjax.evaluation.compare import context_lengths, largest_window
from tttjax.evaluation.files import check_writable
from tttjax.evaluation.report.costs import run_facts, warn_unfinished
from tttjax.evaluation.report.entries import (
    Member,
    ReportEntry,
    System,
    choose_baseline,
    open_systems,
    shown_path,
)
from tttjax.evaluation.report.files import write_report
from tttjax.evaluation.report.losses import open_reader
from tttjax.evaluation.report.results import Report, SystemResult
from tttjax.evaluation.report.state import state_bytes
from tttjax.evaluation.report.summary import several, summarise
from tttjax.evaluation.statistics import Sums
from tttjax.io.paths import local_path
from tttjax.runs.run import LearningOptions, inner_config, inner_learning_rates


def make_report(
    entries: Sequence[ReportEntry],
    out: Path | str,
    *,
    data: PreparedData | Path | str | None = None,
    split: str = "",
    lengths: Sequence[int] = (),
    num_sequences: int = 0,
    baseline: str = "",
    title: str = "",
    progress: TextIO | None = None,
    notes: str = "",
) -> Report:
    """Compares the systems on the same held-out tokens, and writes the report under `out`.

    Arguments:
      entries: the runs; those with one label are seeds and contexts of one system.
      data, split: a prepared data set (default: the baseline's own) and its split.
      lengths: contexts in tokens (default: those that systems have a run of their own for, else
        the baseline's eval.context_lengths).
      num_sequences: sequences of the longest context (0: the baseline's eval.num_sequences).
      baseline: label of the system that differences are taken from (default: the first of full
        attention alone, else the first).
      progress: where progress goes; None: nowhere.
      notes: Markdown paragraphs that are put below the summary.

    Raises:
      UserError: runs, data, tokenizers or lengths that do not fit together.
    """
    out = local_path(out, "--out")
    systems = open_systems(entries)
    chosen = choose_baseline(systems, baseline)
    check_writable(out)
    settings, window = _settings(systems, chosen, lengths, num_sequences)
    ordered = [chosen, *(system for system in systems if system is not chosen)]
    reader = open_reader(ordered, data, split, settings, window, out, progress)
    readings = reader.read(systems)
    results = tuple(
        _result(system, readings[system.label]) for system in systems if readings[system.label]
    )
    described = reader.text.describe(reader.held_out)
    report = Report(
        title=title or _title([result.label for result in results]),
        systems=results,
        baseline=next(result for result in results if result.label == chosen.label),
        lengths=reader.lengths,
        window=window,
        bins=settings.bins,
        text={**described, "data": shown_path(described["data"])},
        notes=notes,
        warnings=_warnings(systems, results, reader.lengths, described["documents"]),
    )
    report = dataclasses.replace(report, summary=summarise(report))
    if jax.process_index() == 0:
        report = dataclasses.replace(report, paths=write_report(report, out))
    return report


def _title(labels: Sequence[str]) -> str:
    few = len(labels) <= 4
    return f"Comparison of {several(labels) if few else f'{len(labels)} systems'}"


def _settings(
    systems: Sequence[System], baseline: System, lengths: Sequence[int], num_sequences: int
) -> tuple[EvalConfig, int]:
    """(the baseline's settings with the contexts to be read, the largest window).

    Raises UserError for a context that does not fit a run, or if the baseline has no run for any.
    """
    settings = baseline.config.eval
    own = {context for s in systems if len(s.contexts) > 1 for context in s.contexts}
    if lengths or own:
        settings = dataclasses.replace(settings, context_lengths=tuple(lengths or sorted(own)))
    if num_sequences:
        number = check_value("eval.num_sequences", num_sequences)
        settings = dataclasses.replace(settings, num_sequences=number)
    window = largest_window([m.run for s in systems for m in s.members], settings)
    found = context_lengths([], [], settings, window, LearningOptions())
    for system in systems:
        for member in system.members:
            its_lengths = tuple(length for length in found if member in system.at(length))
            if its_lengths:
                its_settings = dataclasses.replace(settings, context_lengths=its_lengths)
                modes = [(member.mode,)]
                context_lengths([member.run], modes, its_settings, window, member.learning)
    if not any(map(baseline.at, found)):
        raise UserError(
            f"the baseline {baseline.label} has no run for any of the contexts "
            f"{', '.join(map(str, found))}, only for {', '.join(map(str, baseline.contexts))}; "
            "choose another with --baseline, or other --lengths"
        )
    return dataclasses.replace(settings, context_lengths=found), window


def _result(system: System, readings: dict[int, tuple[Sums, ...]]) -> SystemResult:
    facts = {id(member): run_facts(member) for member in system.members}
    at = {length: system.at(length) for length in readings}
    return SystemResult(
        label=system.label,
        mode=system.mode,
        inner=_inner(system.members[0]),
        parameters=parameter_count(system.config.model),
        readings=readings,
        runs={length: tuple(facts[id(member)] for member in at[length]) for length in readings},
        state_bytes={length: state_bytes(at[length][0], length) for length in readings},
    )


def _inner(member: Member) -> dict[str, Any] | None:
    if member.mode == "off":
        return None
    inner = inner_config(member.run, member.learning)
    (lr,) = inner_learning_rates(member.run, member.mode, member.learning)
    return {"rule": inner.rule, "lr": lr, "clip": inner.clip, "chunk_size": inner.chunk_size}


def _warnings(
    systems: Sequence[System],
    results: Sequence[SystemResult],
    lengths: Sequence[int],
    documents: int,
) -> tuple[str, ...]:
    read = {result.label for result in results}
    found = [
        warn_unfinished(system.label, member.run) for system in systems for member in system.members
    ]
    found += [
        f"{system.label} has runs for contexts of {', '.join(map(str, system.contexts))} tokens "
        "and none of those that were read; it is left out."
        for system in systems
        if system.label not in read
    ]
    for system in systems:
        for length in lengths:
            seeds = {member.seed for member in system.at(length)}
            missing = {member.seed for member in system.members} - seeds
            if seeds and missing:
                found.append(
                    f"{system.label} has no run with context {length} of seed "
                    f"{', '.join(map(str, sorted(missing)))}."
                )
    if documents < 2:
        found.append("There is one held-out document only, so no standard error over documents.")
    return tuple(filter(None, found))
