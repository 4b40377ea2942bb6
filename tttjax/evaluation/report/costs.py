"""Training cost of a run and its ancestors: FLOPs by formula, measured seconds."""

import math
import statistics
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tttjax.config import Config, InnerConfig, ModelConfig, read_config
from tttjax.config.run_info import candidate_paths, workdir_of
from tttjax.errors import UserError
from tttjax.evaluation.report.entries import Member, shown_path
from tttjax.evaluation.report.results import RunFacts
from tttjax.io.paths import storage_path
from tttjax.planning.flops import train_flops_per_token
from tttjax.runs.run import Run
from tttjax.training import checkpoint_format, checkpoints
from tttjax.training.metrics_file import read_records

OUTLIER = 20.0  # steps slower than this many medians count as the median


@dataclass(frozen=True)
class RunCost:
    """Training cost of a run or a chain of runs. seconds: None without records."""

    tokens: int
    flops: float
    seconds: float | None

    def __add__(self, other: "RunCost") -> "RunCost":
        both = self.seconds is not None and other.seconds is not None
        seconds = self.seconds + other.seconds if both else None  # type: ignore[operator]
        return RunCost(self.tokens + other.tokens, self.flops + other.flops, seconds)


def run_facts(member: Member) -> RunFacts:
    """Progress and training cost of a member's run, including the runs it was initialized from."""
    run = member.run
    steps = run.config.train.steps
    source = storage_path(run.source)
    cost, complete = _cost_with_ancestors(run.config, source, run.step, frozenset())
    rates = [record["time"]["tokens_per_second"] for record in _records(source, run.step)]
    return RunFacts(
        workdir=shown_path(run.source),
        seed=member.seed,
        context=member.context,
        step=run.step,
        steps=steps,
        tokens=cost.tokens,
        flops=cost.flops,
        known_from_start=complete,
        seconds=cost.seconds,
        tokens_per_second=statistics.median(rates) if rates else None,
    )


def warn_unfinished(label: str, run: Run) -> str:
    """A warning if the run stopped before its last step; else empty."""
    steps = run.config.train.steps
    if run.step is None or run.step >= steps:
        return ""
    return (
        f"{label}: the run {shown_path(run.source)} stopped at step {run.step} of {steps}; it is "
        "compared as it is."
    )


def _cost_with_ancestors(
    config: Config, source: Path, step: int | None, visited: frozenset[Path]
) -> tuple[RunCost, bool]:
    """(cost, whether all ancestors were found)."""
    train = config.train
    tokens = (train.steps if step is None else step) * train.batch_size * train.seq_len
    flops = tokens * _flops_per_token(config.model, config.inner, train.seq_len)
    records = _records(source, step)
    seconds = _time([record["time"]["seconds"] for record in records])
    cost = RunCost(tokens, flops, seconds)
    if not train.init_from:
        return cost, True
    paths = candidate_paths(train.init_from, workdir_of(source))
    origin = next((path for path in paths if path.exists()), paths[0])
    if origin.resolve() in visited:
        return cost, False
    origin_config, origin_step = read_config(workdir_of(origin)), _step(origin)
    if origin_config is None or origin_step is None:
        return cost, False
    earlier, complete = _cost_with_ancestors(
        origin_config, origin, origin_step, visited | {origin.resolve()}
    )
    return earlier + cost, complete


def _time(seconds: list[float]) -> float | None:
    """Total of all steps. Outliers (compilation, a suspended machine) count as the median."""
    if not seconds:
        return None
    median = statistics.median(seconds)
    return sum(median if s > OUTLIER * median else s for s in seconds)


@cache
def _flops_per_token(model: ModelConfig, inner: InnerConfig, seq_len: int) -> float:
    """Cached: runs with one configuration share the result."""
    return train_flops_per_token(model, inner, seq_len)


def _step(source: Path) -> int | None:
    """The step of a checkpoint, or of a work directory's newest; None if there is none.

    Uses file names alone, so the checkpoint may be damaged.
    """
    folder = checkpoints.absolute(source)
    if not (folder / checkpoint_format.META).exists():
        completed = checkpoint_format.completed_checkpoints(folder / checkpoints.CHECKPOINT_DIR)
        folder = completed[-1] if completed else folder
    return int(folder.name) if folder.name.isdigit() else None


def _records(source: Path, step: int | None) -> list[dict[str, Any]]:
    """The run's metrics up to `step`, one record per step.

    Raises UserError for damaged records.
    """
    records = read_records(workdir_of(source))
    for record in records:
        times = record.get("time")
        names = ("seconds", "tokens_per_second")
        if not isinstance(times, dict) or not all(_is_positive(times.get(n)) for n in names):
            raise UserError(
                f"the record of step {record['step']} in the metrics of {workdir_of(source)} has "
                "no valid times; restore metrics.jsonl from a copy, or remove the line"
            )
    return [record for record in records if step is None or record["step"] <= step]


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf
