"""Around the training loop: several processes, requests to stop, the profiler, what went wrong."""

import contextlib
import hashlib
import json
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tttjax.coordinator import (
    await_coordinator,
    check_port,
    saying_that_it_waits,
    split_address,
)
from tttjax.errors import UserError
from tttjax.metrics import MetricLogger, json_safe
from tttjax.types import Batch, PyTree
from tttjax.whole_files import whole_file

# sysexits.h: "temporary failure; the user is invited to retry". A scheduler that sees it starts
# the same command again.
EXIT_INTERRUPTED = 75

JOIN_SECONDS = 300  # that processes wait for each other at the start
_LATE = (
    "the other processes of the run did not join in time: check that every one was started, with "
    "the same --coordinator and --process-count and a --process-id of its own"
)


def start_distributed(
    coordinator: str | None = None, process_id: int | None = None, process_count: int | None = None
) -> None:
    """Joins this process to a multi-process run; call it before JAX touches a device.

    Without arguments, a cluster that JAX knows (TPU pod, Slurm, Open MPI, Kubernetes) tells them.

    Raises:
      UserError: only some of the three are given, the address is none, its port is taken, nobody
        answers there, or the cluster cannot be joined. Where others do not join in time the process
        ends with one sentence and exit code 2.
    """
    given = {
        "--coordinator": coordinator,
        "--process-id": process_id,
        "--process-count": process_count,
    }
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise UserError(
            f"a multi-process run needs {', '.join(given)} together; {', '.join(missing)} is "
            "missing (or leave out all three where the cluster tells them)"
        )
    if coordinator is not None and process_id is not None and process_count is not None:
        _check_address(coordinator, process_id, process_count)
    try:
        with saying_that_it_waits("the other processes of the run", JOIN_SECONDS, _LATE):
            jax.distributed.initialize(
                *(coordinator, process_count, process_id),
                initialization_timeout=2 * JOIN_SECONDS,  # it must not be the first to give up
            )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"joining the multi-process run failed ({str(error).splitlines()[0]}): check that "
            "--coordinator=HOST:PORT is process 0's address, that every process is started, and "
            "that each has its own --process-id below --process-count"
        ) from error


def _check_address(coordinator: str, process_id: int, process_count: int) -> None:
    """UserError for what would end or hang JAX's runtime; waits until process 0 is there."""
    if not 0 <= process_id < process_count:
        raise UserError(
            f"--process-id={process_id} must be from 0 to {process_count - 1}, below "
            f"--process-count={process_count}"
        )
    host, port = split_address(coordinator)
    if process_id == 0:
        check_port(port)
        return
    with saying_that_it_waits(f"process 0 at {coordinator}", JOIN_SECONDS):
        await_coordinator(host, port, JOIN_SECONDS)


class StopRequest:
    """Whether the run was asked to end at the next step: a context for the loop.

    One process: SIGTERM or SIGINT; a second SIGINT ends at once, unsaved. Several processes: JAX's
    preemption service receives SIGTERM on any of them and lets all stop after the same step.

    The answer to a signal is printed by a thread that the interpreter wakes up, since handlers
    written in Python have to wait while JAX compiles.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._earlier: dict[int, Any] = {}
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> "StopRequest":
        main = threading.current_thread() is threading.main_thread()
        if main and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._earlier[number] = signal.signal(number, self._note)
            self._closing.enter_context(_answer_signals())
        return self

    def __exit__(self, *_: Any) -> None:
        self._closing.close()
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._signal = number

    def after(self, step: int) -> bool:
        """Whether to stop after this step; every process must ask after every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signal is not None


@contextlib.contextmanager
def _answer_signals() -> Iterator[None]:
    """Prints a line to stderr at the first signal that has a handler in Python."""
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    handled = {bytes([number]) for number in (signal.SIGTERM, signal.SIGINT)}

    def answer() -> None:
        while received := reading.recv(1):
            if received in handled:
                begin = "\n" if sys.stdout.isatty() else ""  # below the progress line
                print(f"{begin}stopping after this step", file=sys.stderr, flush=True)
                return

    thread = threading.Thread(target=answer, daemon=True)
    earlier = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier)
        writing.close()
        thread.join()
        reading.close()


class Profiler:
    """Traces steps `first` to `last` into `folder` (readable by TensorBoard and Perfetto)."""

    def __init__(self, steps: tuple[int, ...], folder: Path):
        self._first, self._last = steps or (0, 0)
        self._folder = folder
        self._running = False

    def before(self, step: int) -> None:
        if step == self._first and self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, result: PyTree) -> None:
        """`result`: arrays of the step, waited for so that the trace holds all of its work."""
        if self._running and step >= self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


@dataclass
class Totals:
    """What a run has used over all its starts; kept in its checkpoints."""

    seconds: float = 0.0


class FinishedSteps:
    """Takes the steps that the device has finished: records and times them, watches for NaN."""

    def __init__(self, workdir: Path, nonfinite_limit: int, logger: MetricLogger, totals: Totals):
        self._workdir, self._limit, self._logger = workdir, nonfinite_limit, logger
        self._totals = totals
        self._seconds: list[float] = []
        self._last = time.perf_counter()
        self.loss: float | None = None
        self.first_seconds: float | None = None

    def start_clock(self) -> None:
        """The next step begins now: time spent saving is no step's."""
        self._last = time.perf_counter()

    def add(self, finished: tuple[int, dict[str, Any], Any] | None) -> None:
        """Takes what `LateMetrics` gave back.

        Raises:
          UserError: too many steps in a row were not finite.
        """
        if finished is None:
            return
        step, values, (waited, batch, data_state) = finished
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._totals.seconds += seconds
        steady = self.first_seconds is not None
        self._logger.log(step, values, seconds, waited, steady=steady)
        self.loss = values["loss"]
        if steady:
            self._seconds.append(seconds)
        else:
            self.first_seconds = seconds
            self._logger.say(f"first step after {seconds:.1f} s, compilation included")
        if values["nonfinite"]:
            self._logger.say(f"step {step}: loss or gradient not finite, skipped")
            if values["skipped_in_row"] >= self._limit:
                refuse_nonfinite(self._workdir, step, values, batch, data_state)

    def steady_rates(self) -> dict[str, float | None]:
        """step_seconds, tokens_per_second and mfu of the median step after the first."""
        if not self._seconds:
            return {"step_seconds": None, "tokens_per_second": None, "mfu": None}
        median = statistics.median(self._seconds)
        rates = self._logger.throughput.rates(median, 0.0)
        return {
            "step_seconds": median,
            "tokens_per_second": rates["tokens_per_second"],
            "mfu": rates.get("mfu"),
        }


def batch_fingerprint(batch: Batch) -> str:
    """A hash of this process's part of a batch, to find it again."""
    digest = hashlib.blake2b(digest_size=8)
    for array in (batch.inputs, batch.targets, batch.mask):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def refuse_nonfinite(
    workdir: Path, step: int, values: dict[str, Any], batch: Batch, data_state: Any
) -> None:
    """Ends a run whose last steps were all skipped: tells what it saw, and writes it down.

    Raises:
      UserError: always; `nonfinite.json` in the work directory holds the details.
    """
    norms = {name: value for name, value in values.items() if "norm" in name or name == "loss"}
    fingerprint = batch_fingerprint(batch)
    report = {
        "step": step,
        "batch": {"fingerprint": fingerprint, "data_state": data_state},
        "values": {name: json_safe(value) for name, value in values.items()},
    }
    path = workdir / "nonfinite.json"
    if jax.process_index() == 0:
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    shown = ", ".join(f"{name}={value:.4g}" for name, value in norms.items())
    raise UserError(
        f"loss or gradient was not finite in {values['skipped_in_row']} steps in a row; the last "
        f"was step {step}, batch {fingerprint}, with {shown}. Lower "
        "optim.peak_lr or inner.lr, or clip; details are in "
        f"{path}, and the checkpoints hold the weights from before"
    )
