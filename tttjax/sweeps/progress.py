"""The state of a sweep as text: a table that renews itself on a terminal, lines in a log."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tttjax.evaluation.tables import format_seconds
from tttjax.sweeps.design import Trial
from tttjax.sweeps.local import SweepState, log_path

if TYPE_CHECKING:
    from rich.table import Table

LINE_SECONDS = 30.0  # between two lines about running trials in a log


@contextmanager
def show_sweep() -> Iterator[Callable[[SweepState], None]]:
    """Yields a function that shows the state of a sweep on stdout."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.live import Live

        console = Console()
        with Live(console=console, auto_refresh=False) as live:
            yield lambda sweep: live.update(_table(sweep, console.height), refresh=True)
    else:
        yield _Lines()


class _Lines:
    """A line when a trial starts or ends, and in between one about all that run."""

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}
        self._last = 0.0

    def __call__(self, sweep: SweepState) -> None:
        for trial in sweep.design.trials:
            word = trial_word(sweep, trial)
            before = self._seen.get(trial.name)
            if word != before and not (before is None and word == "waiting"):
                self._print(sweep, f"{trial.name}: {word}{_details(sweep, trial)}")
            self._seen[trial.name] = word
        now = time.monotonic()
        if sweep.running and now - self._last > LINE_SECONDS:
            steps = ", ".join(
                f"{trial.name}{_details(sweep, trial)}"
                for trial in sweep.design.trials
                if trial.name in sweep.running
            )
            self._print(sweep, f"{summary(sweep)}; {steps}")

    def _print(self, sweep: SweepState, line: str) -> None:
        self._last = time.monotonic()
        sys.stdout.write(f"sweep: {line}\n")
        sys.stdout.flush()


def summary(sweep: SweepState) -> str:
    """`3 of 12 trials done, 2 running, 7 waiting; 1:20:00 left`."""
    count = Counter(trial_word(sweep, trial) for trial in sweep.design.trials)
    running = sum(count[word] for word in ("training", "evaluating", "starting"))
    parts = [f"{count['done']} of {len(sweep.design.trials)} trials done"]
    parts += [
        f"{n} {word}" for word, n in (("running", running), ("waiting", count["waiting"])) if n
    ]
    parts += [f"{count[word]} {word}" for word in ("stopped", "diverged", "failed") if count[word]]
    left = sweep.seconds_left()
    return ", ".join(parts) + (f"; {format_seconds(left)} left" if left else "")


def trial_word(sweep: SweepState, trial: Trial) -> str:
    """One word for the state of a trial."""
    state = sweep.states[trial.name]
    if trial.name in sweep.failed and not state.has_ended:
        return "failed"
    if state.has_ended or trial.name in sweep.running:
        return "starting" if state.status == "waiting" else state.status
    return "stopped" if state.step else "waiting"


def _details(sweep: SweepState, trial: Trial) -> str:
    if trial.name in sweep.failed:
        return f": {_reason(sweep, trial)}; see {log_path(sweep.out, trial)}"
    state = sweep.states[trial.name]
    if not state.step:
        return ""
    loss = "" if state.loss is None else f", loss {float(state.loss):.4f}"
    return f" {state.step}/{trial.config.train.steps}{loss}"


def _reason(sweep: SweepState, trial: Trial) -> str:
    """Why a trial failed: the last line that it printed, or the signal that ended it."""
    code = sweep.failed[trial.name]
    if code < 0:
        return f"killed by signal {-code}" + (", perhaps for its memory" if code == -9 else "")
    lines = log_path(sweep.out, trial).read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), f"exit code {code}")


def _table(sweep: SweepState, height: int) -> "Table":
    """A line for each trial; where they are too many, for those that run or failed first."""
    from rich.table import Table

    table = Table(title=f"sweep {sweep.out}", caption=summary(sweep), expand=True)
    table.add_column("trial", overflow="fold")
    table.add_column("state")
    for name in ("step", "loss", "tokens/s"):
        table.add_column(name, justify="right")
    order = ("training", "evaluating", "starting", "failed", "stopped", "waiting")
    words = {trial.name: trial_word(sweep, trial) for trial in sweep.design.trials}
    trials = sorted(
        sweep.design.trials,
        key=lambda trial: order.index(words[trial.name]) if words[trial.name] in order else 9,
    )
    shown = max(4, height - 7)
    for trial in trials[:shown]:
        state = sweep.states[trial.name]
        table.add_row(
            trial.name,
            words[trial.name],
            f"{state.step:,}/{trial.config.train.steps:,}",
            "" if state.loss is None else f"{float(state.loss):.4f}",
            f"{state.rate:,.0f}" if state.rate and trial.name in sweep.running else "",
        )
    if len(trials) > shown:
        table.add_row(f"and {len(trials) - shown} more", "", "", "", "")
    return table
