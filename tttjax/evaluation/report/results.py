"""What a report holds: for every system, losses by document and context, costs, speed, size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tttjax.evaluation.report.statistics import Value, difference, loss
from tttjax.evaluation.statistics import Sums


@dataclass(frozen=True)
class RunFacts:
    """One run as it stood when it was read.

    step, steps: done and configured. tokens, flops: of its training with that of the runs it was
    started from; known_from_start: whether all of these were found. seconds: of its training,
    measured, likewise; None where no record is left. tokens_per_second: median of its own steps.
    """

    workdir: str
    seed: int
    context: int
    step: int | None
    steps: int
    tokens: int
    flops: float
    known_from_start: bool
    seconds: float | None
    tokens_per_second: float | None


@dataclass(frozen=True)
class SystemResult:
    """One system.

    mode: on, off or dynamic. parameters: total, non_embedding, fast. readings: by context length,
    the losses by document and position of each seed's run. runs: by context length, the runs that
    were read, one for each seed. state_bytes: by context length.
    """

    label: str
    mode: str
    inner: Mapping[str, Any] | None
    parameters: Mapping[str, int]
    readings: Mapping[int, tuple[Sums, ...]]
    runs: Mapping[int, tuple[RunFacts, ...]]
    state_bytes: Mapping[int, int]

    @property
    def learns(self) -> bool:
        return self.mode != "off"

    def seeds(self) -> int:
        """The most seeds that any context has."""
        return max(len(runs) for runs in self.readings.values())


@dataclass(frozen=True)
class Report:
    """The comparison of several systems on the same held-out tokens.

    lengths: contexts in tokens. window: where "beyond the window" begins. bins: about how many
    bins by position. text: where the tokens come from. warnings: what a reader must know before
    the numbers. summary: sentences that follow from them. paths: the files that were written, by
    name.
    """

    title: str
    systems: tuple[SystemResult, ...]
    baseline: SystemResult
    lengths: tuple[int, ...]
    window: int
    bins: int
    text: Mapping[str, Any]
    notes: str = ""
    warnings: tuple[str, ...] = ()
    summary: tuple[str, ...] = ()
    paths: Mapping[str, Path] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def others(self) -> tuple[SystemResult, ...]:
        """All systems but the baseline."""
        return tuple(system for system in self.systems if system is not self.baseline)

    def loss(self, system: SystemResult, length: int) -> Value | None:
        """Nats per token with so much context; None if it was not read with it."""
        found = system.readings.get(length)
        return loss(found) if found else None

    def difference(
        self, system: SystemResult, length: int, other: SystemResult | None = None
    ) -> Value | None:
        """Nats per token that it loses more than the other (the baseline), paired by document."""
        mine = system.readings.get(length)
        theirs = (other or self.baseline).readings.get(length)
        return difference(mine, theirs) if mine and theirs else None


def systems_at(report: Report, length: int) -> Sequence[SystemResult]:
    """Those that were read with this much context."""
    return [system for system in report.systems if system.readings.get(length)]
