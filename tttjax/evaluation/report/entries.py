"""The runs of a report: which belong to one system, and which of them is read at which context."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tttjax.config import Config
from tttjax.errors import UserError
from tttjax.io.paths import local_path
from tttjax.runs.run import (
    MODES,
    LearningOptions,
    Run,
    RunSpec,
    choose_modes,
    inner_learning_rates,
    open_run,
)

AUTO, DYNAMIC = "auto", "dynamic"


@dataclass(frozen=True)
class ReportEntry:
    """One run of a system. Entries with one label are its seeds, and its runs at other contexts.

    system: label in tables and plots. workdir: work directory, or one checkpoint.
    mode: how it reads: "on", "off", "dynamic", or "auto" (on if it has fast weights, else off).
    context: tokens for which it was made, 0 for its train.seq_len: where a system has runs of
        several contexts, each is evaluated at its own; the only one is evaluated at all.
    seed: which repetition it belongs to; None for its train.seed.
    learning: changes to how it learns while reading.
    """

    system: str
    workdir: Path
    mode: str = AUTO
    context: int = 0
    seed: int | None = None
    learning: LearningOptions = field(default_factory=LearningOptions)


@dataclass(frozen=True)
class Member:
    """An entry whose run has been found."""

    run: Run
    context: int
    seed: int
    learning: LearningOptions

    @property
    def mode(self) -> str:
        return self.run.modes[0]

    @property
    def config(self) -> Config:
        return self.run.config


@dataclass(frozen=True)
class System:
    """What is compared: all runs under one label, read in one mode."""

    label: str
    members: tuple[Member, ...]

    @property
    def mode(self) -> str:
        return self.members[0].mode

    @property
    def config(self) -> Config:
        return self.members[0].config

    @property
    def contexts(self) -> tuple[int, ...]:
        """For which contexts it has runs, shortest first."""
        return tuple(sorted({member.context for member in self.members}))

    def at(self, length: int) -> tuple[Member, ...]:
        """The runs that are read with this much context, one for each seed; () if it has none."""
        several = len(self.contexts) > 1
        found = [m for m in self.members if not several or m.context == length]
        return tuple(sorted(found, key=lambda member: member.seed))

    def is_full_attention(self) -> bool:
        """Whether nothing but full attention mixes tokens, and nothing learns while reading."""
        return set(self.config.model.mixers) == {"full"} and self.mode == "off"


def parse_entry(text: str) -> ReportEntry:
    """`label=DIR`, `label=DIR:mode`, `DIR` or `DIR:mode`; without a label the folder's name."""
    label, folder = "", text
    if "=" in text and not Path(text).exists():
        label, _, folder = text.partition("=")
    if folder:
        folder = str(local_path(folder))
    mode = AUTO
    head, colon, tail = folder.rpartition(":")
    if colon and not Path(folder).exists():
        if tail not in (AUTO, *MODES):
            raise UserError(
                f"in {text!r} the mode {tail!r} is unknown; choose from {', '.join((AUTO, *MODES))}"
            )
        folder, mode = head, tail
    if not folder:
        raise UserError(f"{text!r} names no directory; write LABEL=DIR")
    label = label or Path(folder).resolve().name
    return ReportEntry(label, Path(folder), mode)


def open_systems(entries: Sequence[ReportEntry]) -> tuple[System, ...]:
    """Finds all runs, and groups them by label in the order of their first entries.

    Raises UserError for runs that are not there, and for two that would stand for the same.
    """
    if not entries:
        raise UserError("there is nothing to report on; give the work directories of runs")
    members: dict[str, list[Member]] = {}
    for entry in entries:
        members.setdefault(entry.system, []).append(_open(entry))
    systems = tuple(System(label, tuple(found)) for label, found in members.items())
    for system in systems:
        _check(system)
    _check_distinct(systems)
    return systems


def shown_path(path: str | Path) -> str:
    """As a report names it: from the current directory if it lies there, so that it can travel."""
    full, here = Path(path).absolute(), Path.cwd()
    return str(full.relative_to(here)) if full.is_relative_to(here) else str(path)


def choose_baseline(systems: Sequence[System], label: str = "") -> System:
    """The one with the label; without, the first of full attention alone, else the first."""
    if not label:
        return next((s for s in systems if s.is_full_attention()), systems[0])
    for system in systems:
        if system.label == label:
            return system
    have = ", ".join(system.label for system in systems)
    raise UserError(f"the baseline {label!r} is not among the systems {have}; choose one of them")


def _open(entry: ReportEntry) -> Member:
    run = open_run(RunSpec(entry.workdir, entry.system))
    auto = "on" if run.has_fast_weights else "off"
    run = dataclasses.replace(run, modes=(auto if entry.mode == AUTO else entry.mode,))
    choose_modes([run], ())  # refuses a mode that does not fit
    if len(inner_learning_rates(run, run.modes[0], entry.learning)) > 1:
        raise UserError(f"{entry.system} has several dynamic_lrs; give each a label of its own")
    train = run.config.train
    seed = train.seed if entry.seed is None else entry.seed
    return Member(run, entry.context or train.seq_len, seed, entry.learning)


def _check(system: System) -> None:
    modes = sorted({member.mode for member in system.members})
    if len(modes) > 1:
        raise UserError(
            f"the runs of {system.label} are read in different modes ({', '.join(modes)}); give "
            "each mode a label of its own"
        )
    seen: dict[tuple[int, int], str] = {}
    for member in system.members:
        key = member.context, member.seed
        if key in seen:
            raise UserError(
                f"{system.label} has two runs with context {member.context} and seed {member.seed}:"
                f" {seen[key]} and {member.run.source}; leave one out, or give it another label"
            )
        seen[key] = member.run.source


def _check_distinct(systems: Sequence[System]) -> None:
    seen: dict[tuple, str] = {}
    for system in systems:
        for member in system.members:
            source = Path(member.run.source).resolve()
            key = (source, member.mode, repr(member.learning))
            if key in seen:
                raise UserError(
                    f"{member.run.source} is given twice, as {seen[key]} and as {system.label}, "
                    "and would be read in the same way; leave one out"
                )
            seen[key] = system.label
