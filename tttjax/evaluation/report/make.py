"""Makes a report: opens runs, evaluates missing losses, writes files."""

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
from tttjax.evaluation.report.losses import make_loss_evaluator
from tttjax.evaluation.report.outputs import write_report
from tttjax.evaluation.report.results import Report, SystemResult
from tttjax.evaluation.report.state import state_bytes
from tttjax.evaluation.report.summary import summarise
from tttjax.evaluation.statistics import Sums
from tttjax.evaluation.tables import join_words
from tttjax.io.paths import local_path
from tttjax.runs.eval_setup import LearningOptions, inner_config, inner_learning_rates


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
    """Compares systems on the same held-out tokens and writes the report under `out`.

    Arguments:
      entries: the runs; entries with one label are seeds and contexts of one system.
      data, split: a prepared data set (default: the baseline's own) and its split.
      lengths: contexts in tokens (default: the training contexts of systems with several, else the
        baseline's eval.context_lengths).
      num_sequences: sequences of the longest context (0: the baseline's eval.num_sequences).
      baseline: label of the reference system for differences (default: the first with full
        attention only, else the first).
      progress: stream for progress; None for no output.
      notes: Markdown, at the end of the report.

    Raises:
      UserError: incompatible runs, data, tokenizers or lengths.
    """
    out = local_path(out, "--out")
    systems = open_systems(entries)
    chosen = choose_baseline(systems, baseline)
    check_writable(out)
    settings, window = _settings(systems, chosen, lengths, num_sequences)
    ordered = [chosen, *(system for system in systems if system is not chosen)]
    evaluator = make_loss_evaluator(ordered, data, split, settings, window, out, progress)
    sums = evaluator.evaluate(systems)
    results = tuple(_result(system, sums[system.label]) for system in systems if sums[system.label])
    described = evaluator.text.describe(evaluator.held_out)
    report = Report(
        title=title or _title([result.label for result in results]),
        systems=results,
        baseline=next(result for result in results if result.label == chosen.label),
        lengths=evaluator.lengths,
        window=window,
        bins=settings.bins,
        text={**described, "data": shown_path(described["data"])},
        notes=notes,
        warnings=_warnings(systems, results, evaluator.lengths, described["documents"]),
    )
    report = dataclasses.replace(report, summary=summarise(report))
    if jax.process_index() == 0:
        report = dataclasses.replace(report, paths=write_report(report, out))
    return report


def _title(labels: Sequence[str]) -> str:
    few = len(labels) <= 4
    return f"Comparison of {join_words(labels) if few else f'{len(labels)} systems'}"


def _settings(
    systems: Sequence[System], baseline: System, lengths: Sequence[int], num_sequences: int
) -> tuple[EvalConfig, int]:
    """(the baseline's settings with the chosen context lengths, the largest window).

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
    chosen = context_lengths([], [], settings, window, LearningOptions())
    for system in systems:
        for member in system.members:
            member_lengths = tuple(length for length in chosen if member in system.at(length))
            if member_lengths:
                member_settings = dataclasses.replace(settings, context_lengths=member_lengths)
                modes = [(member.mode,)]
                context_lengths([member.run], modes, member_settings, window, member.learning)
    if not any(map(baseline.at, chosen)):
        raise UserError(
            f"the baseline {baseline.label} has no run for any of the contexts "
            f"{', '.join(map(str, chosen))}, only for {', '.join(map(str, baseline.contexts))}; "
            "choose another with --baseline, or other --lengths"
        )
    return dataclasses.replace(settings, context_lengths=chosen), window


def _result(system: System, sums: dict[int, tuple[Sums, ...]]) -> SystemResult:
    facts = {id(member): run_facts(member) for member in system.members}
    at = {length: system.at(length) for length in sums}
    return SystemResult(
        label=system.label,
        mode=system.mode,
        inner=_inner(system.members[0]),
        parameters=parameter_count(system.config.model),
        sums=sums,
        runs={length: tuple(facts[id(member)] for member in at[length]) for length in sums},
        state_bytes={length: state_bytes(at[length][0], length) for length in sums},
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
    evaluated = {result.label for result in results}
    warnings = [
        warn_unfinished(system.label, member.run) for system in systems for member in system.members
    ]
    warnings += [
        f"{system.label} has runs for contexts of {', '.join(map(str, system.contexts))} tokens, "
        "but not for the evaluated ones; it is left out."
        for system in systems
        if system.label not in evaluated
    ]
    for system in systems:
        for length in lengths:
            seeds = {member.seed for member in system.at(length)}
            missing = {member.seed for member in system.members} - seeds
            if seeds and missing:
                warnings.append(
                    f"{system.label} has no run with context {length} of seed "
                    f"{', '.join(map(str, sorted(missing)))}."
                )
    if documents < 2:
        warnings.append(
            "There is only one held-out document, so there is no standard error over documents."
        )
    return tuple(filter(None, warnings))
