"""Report data: losses by document and context, training cost and state size of every system."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tttjax.data.held_out import doubling_windows
from tttjax.evaluation.statistics import (
    UNKNOWN,
    Estimate,
    Sums,
    by_position,
    change_with_context,
    difference,
    difference_by_position,
    loss,
    position_bins,
)

COLUMNS = (
    *("system", "mode", "parameters", "non_embedding", "quantity", "unit", "seed", "context"),
    *("first_token", "last_token", "value", "stderr", "stderr_documents", "stderr_seeds"),
)
ALL = "all"  # seeds
NATS = "nats per token"


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

    def loss(self, system: SystemResult, length: int) -> Estimate | None:
        """Nats per token at a context length; None if not evaluated there."""
        sums = system.sums.get(length)
        return loss(sums) if sums else None

    def difference(
        self, system: SystemResult, length: int, other: SystemResult | None = None
    ) -> Estimate | None:
        """Loss minus that of `other` (default: the baseline) in nats per token, paired."""
        mine = system.sums.get(length)
        theirs = (other or self.baseline).sums.get(length)
        return difference(mine, theirs) if mine and theirs else None

    def change(self, system: SystemResult) -> Estimate | None:
        """Difference from the baseline at the longest context minus that at the shortest."""
        short, long = min(self.lengths), self.longest
        mine, theirs = system.sums, self.baseline.sums
        if short == long or not all(n in r for n in (short, long) for r in (mine, theirs)):
            return None
        return change_with_context((mine[long], theirs[long]), (mine[short], theirs[short]))

    @cached_property
    def rows(self) -> pd.DataFrame:
        """Every number of the report, one per row: the table of report.csv.

        quantity: loss (seed_loss for single seeds), difference (from the baseline), both also
        _by_position (bins) and _by_window (columns of the tables); difference_change from the
        shortest to the longest context; training_flops, training_tokens, training_seconds of each
        run including its ancestors; state_bytes.
        """
        parts = [
            row
            for system in self.systems
            for length in self.lengths
            if system.sums.get(length)
            for row in _rows(self, system, length)
        ]
        return pd.DataFrame(parts, columns=COLUMNS)

    def select(self, quantity: str, context: int | None = None) -> pd.DataFrame:
        """The rows of one quantity, at one context length or at all."""
        rows = self.rows[self.rows["quantity"] == quantity]
        return rows if context is None else rows[rows["context"] == context]


def _rows(report: Report, system: SystemResult, length: int) -> Iterator[dict[str, Any]]:
    row = partial(_row, system, length)
    sums, theirs = system.sums[length], report.baseline.sums.get(length)
    if system is report.baseline:
        theirs = None
    yield row("loss", NATS, loss(sums))
    for run, one in zip(system.runs[length], sums, strict=True):
        yield row("seed_loss", NATS, loss([one]), seed=run.seed)
        yield row("training_flops", "FLOPs", run.flops, seed=run.seed)
        yield row("training_tokens", "tokens", run.tokens, seed=run.seed)
        yield row("training_seconds", "s", run.seconds, seed=run.seed)
    if theirs:
        yield row("difference", NATS, difference(sums, theirs))
        change = report.change(system)
        if length == report.longest and change is not None:
            yield row("difference_change", NATS, change)
    yield row("state_bytes", "bytes", system.state_bytes.get(length))
    ranges = {"position": position_bins(length, report.window, report.bins)}
    if length == report.longest:
        ranges["window"] = np.asarray(doubling_windows(length, report.window))
    for name, edges in ranges.items():
        curves = {f"loss_by_{name}": by_position(sums, edges)}
        if theirs:
            curves[f"difference_by_{name}"] = difference_by_position(sums, theirs, edges)
        for quantity, curve in curves.items():
            for i, (first, stop) in enumerate(pairwise(map(int, edges))):
                yield row(quantity, NATS, curve[i], first + 1, stop)


def _row(
    system: SystemResult,
    length: int,
    quantity: str,
    unit: str,
    value: Estimate | float | None,
    first: int = 1,
    last: int = 0,
    seed: int | str = ALL,
) -> dict[str, Any]:
    if not isinstance(value, Estimate):
        value = Estimate(np.asarray(np.nan if value is None else value), UNKNOWN)
    numbers = map(float, (value.mean, value.stderr, value.documents, value.seeds))
    parameters = (system.parameters["total"], system.parameters["non_embedding"])
    of_system = (system.label, system.mode, *parameters)
    cells = (*of_system, quantity, unit, seed, length, first, last or length, *numbers)
    return dict(zip(COLUMNS, cells, strict=True))


def systems_at(report: Report, length: int) -> Sequence[SystemResult]:
    """Systems evaluated at this context length."""
    return [system for system in report.systems if system.sums.get(length)]
