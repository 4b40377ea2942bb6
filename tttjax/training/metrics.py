"""What a run tells while it trains: JSONL, TensorBoard, W&B if asked for, a progress line.

`metrics.jsonl` has one record per step, {"step": n, "loss": ..., ..., "time": {...}}. Everything
outside "time" is a function of configuration and data alone and is written exactly, so that the
streams of two runs can be compared as text.
"""

import importlib
import json
import math
import os
import resource
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import jax
from tensorboardX import SummaryWriter

from tttjax.errors import UserError
from tttjax.io.atomic import atomic_write
from tttjax.training.progress import Throughput, TrainProgress

JSONL = "metrics.jsonl"


class AsyncMetrics:
    """Holds the device metrics of a step until the next step has been dispatched.

    So the host never waits for a step whose successor is not yet queued on the device.
    """

    def __init__(self) -> None:
        self._held: tuple[int, dict[str, jax.Array], Any] | None = None

    def swap(
        self, step: int, metrics: dict[str, jax.Array], note: Any = None
    ) -> tuple[int, dict[str, Any], Any] | None:
        """Takes a step just dispatched; gives back the one before it, read from the device."""
        for value in metrics.values():
            value.copy_to_host_async()
        earlier, self._held = self._held, (step, metrics, note)
        return self._read(earlier)

    def flush(self) -> tuple[int, dict[str, Any], Any] | None:
        """Reads the step that is held, if any; blocks until the device has finished it."""
        earlier, self._held = self._held, None
        return self._read(earlier)

    @staticmethod
    def _read(held: tuple | None) -> tuple[int, dict[str, Any], Any] | None:
        if held is None:
            return None
        step, metrics, note = held
        return step, {k: v.item() for k, v in jax.device_get(metrics).items()}, note


# JSONL -------------------------------------------------------------------------------------------


def read_records(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The complete records of a work directory's metrics.jsonl, in order; [] if there is none.

    Raises UserError for a damaged line.
    """
    path = Path(workdir) / JSONL
    return list(_complete_records(path)) if path.exists() else []


def _complete_records(path: Path) -> Iterator[dict[str, Any]]:
    """Raises UserError for a damaged line, but for a last one that was torn by a kill."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                if type(record["step"]) is not int:
                    raise ValueError("its step is no number")
            except (ValueError, KeyError, TypeError) as error:
                if not line.endswith("\n"):
                    return
                raise UserError(
                    f"line {number} of {path} is damaged ({error}); restore the file from a copy, "
                    "or remove the line"
                ) from error
            yield record


def deterministic_records(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The records without "time": equal for two runs that computed the same numbers."""
    return [{k: v for k, v in record.items() if k != "time"} for record in read_records(workdir)]


def _truncate_after(path: Path, step: int) -> None:
    """Rewrites the file with the complete records up to `step` only."""
    if not path.exists():
        return
    with atomic_write(path) as temporary, temporary.open("w") as file:
        for record in _complete_records(path):
            if record["step"] <= step:
                file.write(json.dumps(record) + "\n")


def json_safe(value: Any) -> Any:
    """JSON has no NaN: what is not finite becomes its name, "nan", "inf" or "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


# Throughput --------------------------------------------------------------------------------------


def peak_memory() -> tuple[int, str]:
    """(bytes, where): the fullest local device's peak, or the process's on CPU."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks), "device"
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes * (1 if sys.platform == "darwin" else 1024), "process"


# Progress ----------------------------------------------------------------------------------------


# The logger --------------------------------------------------------------------------------------


def check_wandb(project: str) -> None:
    """UserError if W&B is asked for and missing."""
    if not project:
        return
    try:
        importlib.import_module("wandb")
    except ImportError:
        raise UserError(
            f"train.wandb_project={project!r} asks for Weights & Biases, which is not installed: "
            "pip install wandb, or leave the field empty"
        ) from None


def _start_wandb(project: str, workdir: Path, config: dict[str, Any] | None) -> Any:
    """One W&B run per work directory, whatever it is called: its id is kept in a file there."""
    wandb = importlib.import_module("wandb")
    id_file = workdir / "wandb_id.txt"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex)
    return wandb.init(
        project=project,
        id=id_file.read_text(),
        resume="allow",
        dir=str(workdir),
        name=workdir.name,
        config=config,
    )


@dataclass
class _Window:
    """Sums since the last progress line or TensorBoard point."""

    steps: int = 0
    seconds: float = 0.0
    input_seconds: float = 0.0

    def add(self, seconds: float, input_seconds: float) -> None:
        self.steps += 1
        self.seconds += seconds
        self.input_seconds += input_seconds


@dataclass
class MetricLogger:
    """Writes every step's record; only the first process of a multi-process run writes.

    start_step: the step that a resumed run continues from (0: a fresh run). Records beyond it,
    and a line torn by a kill, are removed, so that the file becomes that of a run never stopped.
    """

    workdir: Path
    throughput: Throughput
    total_steps: int
    log_every: int = 10
    start_step: int = 0
    wandb_project: str = ""
    config: dict[str, Any] | None = None
    stream: TextIO | None = None
    _window: _Window = field(default_factory=_Window)

    def __post_init__(self) -> None:
        check_wandb(self.wandb_project)
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        self.progress = TrainProgress(self.total_steps, self.log_every, self.stream)
        self.workdir = Path(self.workdir)
        self.workdir.mkdir(parents=True, exist_ok=True)
        _truncate_after(self.workdir / JSONL, self.start_step)
        self._jsonl = (self.workdir / JSONL).open("a")
        self._tensorboard = SummaryWriter(
            str(self.workdir / "tensorboard"),
            purge_step=self.start_step + 1 if self.start_step else None,
        )
        self._wandb = None
        if self.wandb_project:
            self._wandb = _start_wandb(self.wandb_project, self.workdir, self.config)

    def log(
        self,
        step: int,
        values: dict[str, Any],
        seconds: float,
        input_seconds: float = 0.0,
        steady: bool = True,
    ) -> None:
        """Records a finished step.

        Arguments:
          step: number of updates done with it, 1, 2, ...
          values: host numbers, as `AsyncMetrics` gives them; they must hold "loss".
          seconds: wall-clock time of this step; input_seconds: of it, waiting for a batch.
          steady: False for a step that was compiled first; it stays out of the averages.
        """
        if not self._writes:
            return
        seconds = max(seconds, 1e-9)
        rates = self.throughput.rates(seconds, input_seconds)
        rates["memory_bytes"] = peak_memory()[0]
        ordered = {"loss": values["loss"], **values}
        record = {"step": step, **{k: json_safe(v) for k, v in ordered.items()}, "time": rates}
        self._jsonl.write(json.dumps(record) + "\n")
        self._jsonl.flush()
        smooth = rates
        if steady:
            window = self._window
            window.add(seconds, input_seconds)
            smooth = self.throughput.rates(window.seconds, window.input_seconds, window.steps)
        self.progress.show(step, values["loss"], smooth, values.get("skipped", 0), steady)
        if step % self.log_every == 0 or step == self.total_steps:
            self._point(step, {**values, **{f"time/{k}": v for k, v in (rates | smooth).items()}})
            self._window = _Window()

    def _point(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self._tensorboard.add_scalar(name, float(value), step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def say(self, text: str) -> None:
        """Prints a line between progress lines."""
        if self._writes:
            self.progress.say(text)

    def sync(self) -> None:
        """Makes what was logged safe against a crash of the machine; called before a save."""
        if self._writes:
            self._jsonl.flush()
            os.fsync(self._jsonl.fileno())

    def close(self) -> None:
        """Closes all files."""
        if self._writes:
            self.progress.end()
            self._jsonl.close()
            self._tensorboard.close()
            if self._wandb is not None:
                self._wandb.finish()


def write_loss_curve(workdir: str | os.PathLike) -> Path:
    """Draws loss by step from metrics.jsonl into `workdir/loss.png` and returns its path."""
    from matplotlib.figure import Figure

    points = [(r["step"], r["loss"]) for r in read_records(workdir) if isinstance(r["loss"], float)]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([s for s, _ in points], [loss for _, loss in points], linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    path = Path(workdir) / "loss.png"
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return path
