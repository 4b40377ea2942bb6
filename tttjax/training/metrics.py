"""Training metrics: `metrics.jsonl`, TensorBoard, Weights & Biases, a progress line."""

import importlib
import json
import os
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, cast

import jax

from tttjax.errors import UserError
from tttjax.io.paths import storage_path
from tttjax.io.spool import Spool
from tttjax.runtime.memory import memory_use
from tttjax.training.hosts import Hosts
from tttjax.training.metrics_file import HELD_OUT, JSONL, json_safe, truncate_after
from tttjax.training.progress import Throughput, TrainProgress
from tttjax.training.start_account import StartAccount


def _summary_writer() -> Any:
    """TensorBoard's writer, without PyTorch, which it would import where it is installed.

    That takes five seconds, and nothing of it is used. Call it before other threads import.
    """
    is_imported = "torch" in sys.modules
    if not is_imported:
        sys.modules["torch"] = cast(Any, None)  # so that an import fails
    try:
        return importlib.import_module("tensorboardX").SummaryWriter
    finally:
        if not is_imported:
            del sys.modules["torch"]


class AsyncMetrics:
    """Delays reading the device metrics of a step until the next step is dispatched.

    So the host never waits for the device while its queue is empty. account: is told the waiting.
    """

    def __init__(self, account: StartAccount) -> None:
        self._account = account
        self._dispatched: tuple[int, dict[str, jax.Array], Any] | None = None

    def swap(
        self, step: int, metrics: dict[str, jax.Array], note: Any = None
    ) -> tuple[int, dict[str, Any], Any] | None:
        """Stores the metrics of a dispatched step; returns those of the step before it."""
        for value in metrics.values():
            value.copy_to_host_async()
        previous, self._dispatched = self._dispatched, (step, metrics, note)
        return self._read(previous)

    def flush(self) -> tuple[int, dict[str, Any], Any] | None:
        """Returns the metrics of the last dispatched step, if any; waits for the device."""
        previous, self._dispatched = self._dispatched, None
        return self._read(previous)

    def _read(self, dispatched: tuple | None) -> tuple[int, dict[str, Any], Any] | None:
        if dispatched is None:
            return None
        step, metrics, note = dispatched
        with self._account.phase("device"):
            return step, {k: v.item() for k, v in jax.device_get(metrics).items()}, note


def check_wandb(project: str) -> None:
    """UserError if a W&B project is configured and wandb is not installed."""
    if not project:
        return
    try:
        importlib.import_module("wandb")
    except ImportError:
        raise UserError(
            f"train.wandb_project={project!r} needs Weights & Biases, which is not installed: "
            "run `pip install wandb`, or leave the field empty"
        ) from None


def _start_wandb(project: str, folder: Path, name: str, config: dict[str, Any] | None) -> Any:
    """Starts or resumes the W&B run of a work directory, whose id is in `wandb_id.txt`."""
    wandb = importlib.import_module("wandb")
    id_file = folder / "wandb_id.txt"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex)
    return wandb.init(
        project=project,
        id=id_file.read_text(),
        resume="allow",
        dir=str(folder),
        name=name,
        config=config,
    )


def tag(name: str) -> str:
    """The TensorBoard tag of a metric: groups, of which TensorBoard shows `loss` first."""
    if name.startswith("time/"):
        return name
    if name.startswith("held_out_") and "_tokens_" in name:
        return f"loss_by_position/{name}"
    if "loss" in name or name.startswith("held_out_"):
        return f"loss/{'train' if name == 'loss' else name}"
    if name.startswith(("inner_", "fast_")):
        return f"ttt/{name}"
    return f"norm/{name}" if "norm" in name else f"outer/{name}"


def held_out_values(losses: dict[str, Any]) -> dict[str, float]:
    """The held-out losses of an evaluation by name: `held_out_on`, `held_out_on_tokens_65_128`.

    losses: from `HeldOutLoss.evaluate`. `held_out_gain` is the loss with TTT off minus that with
    TTT on.
    """
    modes = [mode for mode in ("on", "off") if mode in losses]
    values = {f"held_out_{mode}": losses[mode]["loss"] for mode in modes}
    if len(modes) == 2:
        values["held_out_gain"] = values["held_out_off"] - values["held_out_on"]
    bins = list(zip(losses["first_token"], losses["last_token"], strict=True))
    for mode in modes:
        for (first, last), loss in zip(bins, losses[mode]["by_position"], strict=True):
            if loss is not None:  # there are targets at these positions
                values[f"held_out_{mode}_tokens_{first}_{last}"] = loss
    return values


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
    """Writes the record of every step; in a multi-process run only process 0 writes.

    start_step: the step that the run resumes from (0: a new run). Later records and a truncated
    line are removed, so the file becomes that of a run that was never stopped.
    """

    workdir: Path
    throughput: Throughput
    hosts: Hosts
    total_steps: int
    log_every: int = 10
    start_step: int = 0
    wandb_project: str = ""
    config: dict[str, Any] | None = None
    stream: TextIO | None = None
    _window: _Window = field(default_factory=_Window)

    def __post_init__(self) -> None:
        check_wandb(self.wandb_project)
        self._is_writer = jax.process_index() == 0
        if not self._is_writer:
            return
        self.workdir = storage_path(self.workdir)
        self.progress = TrainProgress(self.total_steps, self.log_every, self.hosts, self.stream)
        self._spool = Spool(self.workdir, (JSONL, HELD_OUT, "wandb_id.txt"))
        folder = self._spool.folder
        for name in (JSONL, HELD_OUT):
            truncate_after(folder / name, self.start_step)
        self._jsonl = (folder / JSONL).open("a")
        self._tensorboard = _summary_writer()(
            str(folder / "tensorboard"),
            purge_step=self.start_step + 1 if self.start_step else None,
        )
        self._wandb = None
        if self.wandb_project:
            self._wandb = _start_wandb(self.wandb_project, folder, self.workdir.name, self.config)

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
          step: the step number, 1, 2, ...
          values: host numbers from `AsyncMetrics`, among them "loss".
          seconds: wall-clock time of this step; input_seconds: its share spent on input.
          steady: False for a step that includes compilation; averages leave it out.
        """
        if not self._is_writer:
            return
        seconds = max(seconds, 1e-9)
        rates = self.throughput.rates(seconds, input_seconds)
        rates["memory_bytes"] = memory_use().peak
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
            self._write_point(
                step, {**values, **{f"time/{k}": v for k, v in (rates | smooth).items()}}
            )
            self._window = _Window()
            for line in self.hosts.stragglers():
                self.print_line(line)
        self._spool.upload_sometimes()

    def log_held_out(self, step: int, losses: dict[str, Any], seconds: float) -> None:
        """Records the held-out losses after a step, from `HeldOutLoss.evaluate`."""
        if not self._is_writer:
            return
        record = {"step": step, **losses, "time": {"seconds": seconds}}
        with (self._spool.folder / HELD_OUT).open("a") as file:
            file.write(json.dumps(json_safe(record)) + "\n")
        by_mode = {mode: losses[mode]["loss"] for mode in ("on", "off") if mode in losses}
        words = {"on": "with TTT", "off": "without" if "on" in by_mode else ""}
        shown = ", ".join(f"{loss:.4f} {words[mode]}".strip() for mode, loss in by_mode.items())
        self.print_line(f"step {step}: held-out loss {shown} ({seconds:.1f} s)")
        self._write_point(step, held_out_values(losses))

    def _write_point(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self._tensorboard.add_scalar(tag(name), float(value), step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def print_line(self, text: str) -> None:
        """Prints a line between progress lines."""
        if self._is_writer:
            self.progress.print_line(text)

    def sync(self) -> None:
        """Syncs the records to disk, or uploads them; called before a checkpoint is saved."""
        if self._is_writer:
            self._jsonl.flush()
            os.fsync(self._jsonl.fileno())
            self._tensorboard.flush()
            self._spool.upload()

    def close(self) -> None:
        """Closes all files."""
        if self._is_writer:
            self.progress.end()
            self._jsonl.close()
            self._tensorboard.close()
            if self._wandb is not None:
                self._wandb.finish()
            self._spool.close()
