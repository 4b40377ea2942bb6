"""Report data: losses by document and context, training cost and state size of every system."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tttjax.evaluation.report.statistics import Value, difference, loss
from tttjax.evaluation.statistics import Sums


@dataclass(frozen=True)
class RunFacts:
    """One evaluated run.

    step, steps: completed and configured. tokens, flops, seconds: of its training including its
    ancestors; seconds are measured, None without records. known_from_start: whether all ancestors
    were found. tokens_per_second: median of its own steps.
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
    """Results of one system.

    mode: on, off or dynamic. parameters: total, non_embedding, fast. By context length: sums, the
    losses by document and position of each seed's run; runs, one per seed; state_bytes.
    """

    label: str
    mode: str
    inner: Mapping[str, Any] | None
    parameters: Mapping[str, int]
    sums: Mapping[int, tuple[Sums, ...]]
    runs: Mapping[int, tuple[RunFacts, ...]]
    state_bytes: Mapping[int, int]

    @property
    def learns(self) -> bool:
        return self.mode != "off"

    def seeds(self) -> int:
        """The largest number of seeds at any context."""
        return max(len(runs) for runs in self.sums.values())


@dataclass(frozen=True)
class Report:
    """The comparison of several systems on the same held-out tokens.

    lengths: contexts in tokens. window: tokens after which "beyond the window" begins. bins:
    approximate number of position bins. text: source and size of the text. warnings: caveats.
    summary: sentences. paths: written files by name.
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
        """Nats per token at a context length; None if not evaluated there."""
        sums = system.sums.get(length)
        return loss(sums) if sums else None

    def difference(
        self, system: SystemResult, length: int, other: SystemResult | None = None
    ) -> Value | None:
        """Loss minus that of `other` (default: the baseline) in nats per token, paired."""
        mine = system.sums.get(length)
        theirs = (other or self.baseline).sums.get(length)
        return difference(mine, theirs) if mine and theirs else None


def systems_at(report: Report, length: int) -> Sequence[SystemResult]:
    """Systems evaluated at this context length."""
    return [system for system in report.systems if system.sums.get(length)]
