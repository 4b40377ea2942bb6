"""Report entries: groups runs into systems and selects the runs for each context length."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tttjax.config import Config
from tttjax.errors import UserError
from tttjax.io.paths import is_bucket, storage_path
from tttjax.runs.eval_setup import LearningOptions, choose_modes, inner_learning_rates
from tttjax.runs.modes import MODES
from tttjax.runs.run import Run, RunSpec, open_run

AUTO, DYNAMIC = "auto", "dynamic"


@dataclass(frozen=True)
class ReportEntry:
    """One run of a system. Entries with one label are seeds and context lengths of one system.

    system: label in tables and plots. workdir: work directory or checkpoint.
    mode: "on", "off", "dynamic", or "auto" (on if the run has fast weights, else off).
    context: training context in tokens (0: its train.seq_len). If a system has runs for several
        contexts, each is evaluated at its own; a single run is evaluated at all.
    seed: repetition (None: its train.seed).
    learning: changes to the inner loop.
    """

    system: str
    workdir: Path
    mode: str = AUTO
    context: int = 0
    seed: int | None = None
    learning: LearningOptions = field(default_factory=LearningOptions)


@dataclass(frozen=True)
class Member:
    """An entry with its opened run."""

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
    """All runs with one label, evaluated in one mode."""

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
        """Context lengths of its runs, shortest first."""
        return tuple(sorted({member.context for member in self.members}))

    def at(self, length: int) -> tuple[Member, ...]:
        """The runs for this context length, one per seed."""
        several = len(self.contexts) > 1
        members = [m for m in self.members if not several or m.context == length]
        return tuple(sorted(members, key=lambda member: member.seed))

    def is_full_attention(self) -> bool:
        """Whether all mixers are full attention, without TTT."""
        return set(self.config.model.mixers) == {"full"} and self.mode == "off"


def parse_entry(text: str) -> ReportEntry:
    """`label=DIR`, `label=DIR:mode`, `DIR` or `DIR:mode`; default label: the folder's name."""
    label, folder = "", text
    if "=" in text and not is_bucket(text) and not Path(text).exists():
        label, _, folder = text.partition("=")
    if folder:
        folder = str(storage_path(folder))
    mode = AUTO
    head, colon, tail = folder.rpartition(":")
    if colon and not tail.startswith("//") and not storage_path(folder).exists():
        if tail not in (AUTO, *MODES):
            raise UserError(
                f"in {text!r} the mode {tail!r} is unknown; choose from {', '.join((AUTO, *MODES))}"
            )
        folder, mode = head, tail
    if not folder:
        raise UserError(f"{text!r} names no directory; give LABEL=DIR")
    path = storage_path(folder)
    return ReportEntry(label or path.resolve().name, path, mode)


def open_systems(entries: Sequence[ReportEntry]) -> tuple[System, ...]:
    """Opens all runs and groups them by label, in the order of first appearance.

    Raises UserError for missing or duplicate runs.
    """
    if not entries:
        raise UserError("no runs to report on; give the work directories of runs")
    members: dict[str, list[Member]] = {}
    for entry in entries:
        members.setdefault(entry.system, []).append(_resolve(entry))
    systems = tuple(System(label, tuple(of_label)) for label, of_label in members.items())
    for system in systems:
        _check(system)
    _check_distinct(systems)
    return systems


def shown_path(path: str | Path) -> str:
    """Path for a report: relative to the current directory if inside it."""
    full, current = storage_path(path).absolute(), Path.cwd()
    return str(full.relative_to(current)) if full.is_relative_to(current) else str(path)


def choose_baseline(systems: Sequence[System], label: str = "") -> System:
    """The system with the label; default: the first with full attention only, else the first."""
    if not label:
        return next((s for s in systems if s.is_full_attention()), systems[0])
    for system in systems:
        if system.label == label:
            return system
    have = ", ".join(system.label for system in systems)
    raise UserError(f"the baseline {label!r} is not among the systems {have}; choose one of them")


def _resolve(entry: ReportEntry) -> Member:
    run = open_run(RunSpec(entry.workdir, entry.system))
    auto = "on" if run.has_fast_weights else "off"
    run = dataclasses.replace(run, modes=(auto if entry.mode == AUTO else entry.mode,))
    choose_modes([run], ())  # raises for a mode that does not fit
    if len(inner_learning_rates(run, run.modes[0], entry.learning)) > 1:
        raise UserError(f"{entry.system} has several dynamic_lrs; give each its own label")
    train = run.config.train
    seed = train.seed if entry.seed is None else entry.seed
    return Member(run, entry.context or train.seq_len, seed, entry.learning)


def _check(system: System) -> None:
    modes = sorted({member.mode for member in system.members})
    if len(modes) > 1:
        raise UserError(
            f"the runs of {system.label} use different modes ({', '.join(modes)}); give "
            "each mode its own label"
        )
    sources: dict[tuple[int, int], str] = {}
    for member in system.members:
        key = member.context, member.seed
        if key in sources:
            raise UserError(
                f"{system.label} has two runs with context {member.context} and seed {member.seed}:"
                f" {sources[key]} and {member.run.source}; remove one, or give it another label"
            )
        sources[key] = member.run.source


def _check_distinct(systems: Sequence[System]) -> None:
    sources: dict[tuple, str] = {}
    for system in systems:
        for member in system.members:
            source = storage_path(member.run.source).resolve()
            key = (source, member.mode, repr(member.learning))
            if key in sources:
                raise UserError(
                    f"{member.run.source} is given twice, as {sources[key]} and as {system.label}, "
                    "with the same settings; remove one"
                )
            sources[key] = system.label
