"""Runs the trials of a sweep as processes on this machine, as many at once as it has room for."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from tttjax.config.checks import check_mesh
from tttjax.config.least_memory import check_memory, least_state_bytes
from tttjax.errors import UserError
from tttjax.exit_codes import SAVED
from tttjax.planning.flops import train_flops_per_token
from tttjax.sweeps.design import Design, Trial, code_flags
from tttjax.sweeps.trial import TRIALS, TrialState, trial_state, workdir

POLL_SECONDS = 0.5
RETRY_SECONDS = 5.0  # before a trial that another process holds is tried again
# A process of its own asks for the devices: JAX would keep them from the trials.
_PROBE = (
    "import json, jax; from tttjax.runtime.memory import device_memory, host_memory; "
    "print(json.dumps([jax.default_backend(), jax.local_device_count(), device_memory(), "
    "host_memory()]))"
)


@dataclass(frozen=True)
class Machine:
    """platform: "cpu", "gpu" or "tpu". device_bytes: of one device. host_bytes: of this host."""

    platform: str
    devices: int
    device_bytes: float
    host_bytes: float

    @property
    def slots(self) -> int:
        """Trials at once: one per core or GPU; a process takes all TPU chips of a host."""
        if self.platform == "cpu":
            return len(_cores())
        return self.devices if self.platform == "gpu" else 1


def find_machine() -> Machine:
    """The devices that a trial would see. Raises UserError if JAX finds none."""
    probe = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True)
    if probe.returncode:
        reason = (probe.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"JAX does not start on this machine: {reason}")
    return Machine(*json.loads(probe.stdout.splitlines()[-1]))


def check_fits(trials: Sequence[Trial], machine: Machine, jobs: int) -> None:
    """Raises UserError, naming the trial, if one certainly does not fit, or `jobs` at once."""
    devices = machine.devices if machine.platform == "tpu" else 1
    states = []
    for trial in trials:
        try:
            mesh = check_mesh(trial.config, devices)
            check_memory(trial.config, mesh, machine.device_bytes, machine.host_bytes)
        except UserError as error:
            raise UserError(f"{trial.name}: {error}") from error
        states.append(least_state_bytes(trial.config, mesh))
    largest = sum(sorted(states)[-jobs:])
    if machine.platform == "cpu" and largest > machine.host_bytes:
        raise UserError(
            f"{jobs} trials at once need more than {largest / 1e9:,.1f} GB for their weights and "
            f"optimizer states, and this host has {machine.host_bytes / 1e9:,.1f} GB; lower --jobs"
        )


def run_trials(
    design: Design,
    out: Path,
    machine: Machine,
    jobs: int,
    show: Callable[["SweepState"], None],
) -> "SweepState":
    """Runs every trial that has not ended. SIGTERM or Ctrl-C stops them, and they save.

    show: is called with the state of all trials, at least every second.
    """
    sweep = SweepState(design, out)
    with _stop_requests() as is_stopping, contextlib.ExitStack() as exit_stack:
        slots: list[_Process | None] = [None] * jobs
        exit_stack.callback(lambda: _stop([slot for slot in slots if slot]))
        while True:
            for i, process in enumerate(slots):
                if process is not None and process.popen.poll() is not None:
                    if not is_stopping():
                        sweep.record(process.trial, process.popen.returncode)
                    process.close()
                    slots[i] = None
                if slots[i] is None and not is_stopping():
                    trial = sweep.next([slot.trial for slot in slots if slot])
                    slots[i] = _start(trial, design, out, machine, jobs, i) if trial else None
            running = [slot for slot in slots if slot]
            sweep.running = frozenset(slot.trial.name for slot in running)
            sweep.refresh()
            show(sweep)
            if is_stopping():
                _stop(running)
            if not running and (is_stopping() or sweep.next([]) is None):
                sweep.was_stopped = is_stopping()
                return sweep
            time.sleep(POLL_SECONDS)


@dataclass
class SweepState:
    """The states of all trials, by name. failed: name -> exit code, in this start."""

    design: Design
    out: Path
    states: dict[str, TrialState] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    running: frozenset[str] = frozenset()
    was_stopped: bool = False

    def __post_init__(self) -> None:
        self._not_before: dict[str, float] = {}
        self._started = time.monotonic()
        self.refresh()
        self._done_before = self.share_done()

    def refresh(self) -> None:
        """Reads the states of all trials that have not ended."""
        for trial in self.design.trials:
            state = self.states.get(trial.name)
            if state is None or not state.has_ended:
                self.states[trial.name] = trial_state(self.out, trial, self.design.scoring)

    def next(self, running: Sequence[Trial]) -> Trial | None:
        """The next trial to start: in order, those held by another process last."""
        busy = {trial.name for trial in running} | set(self.failed)
        open_trials = [
            trial
            for trial in self.design.trials
            if trial.name not in busy and not self.states[trial.name].has_ended
        ]
        if not open_trials:
            return None
        first = min(open_trials, key=lambda trial: self._not_before.get(trial.name, 0.0))
        if not running:  # nothing else to wait for
            time.sleep(max(0.0, self._not_before.get(first.name, 0.0) - time.monotonic()))
        return first if self._not_before.get(first.name, 0.0) <= time.monotonic() else None

    def record(self, trial: Trial, exit_code: int) -> None:
        """Takes note of a process that has ended."""
        if exit_code == SAVED:
            self._not_before[trial.name] = time.monotonic() + RETRY_SECONDS
        elif exit_code or not trial_state(self.out, trial, self.design.scoring).has_ended:
            self.failed[trial.name] = exit_code

    def share_done(self) -> float:
        """The part of all training FLOPs that is done, 0 to 1."""
        total = done = 0.0
        for trial in self.design.trials:
            work, steps = training_flops(trial), trial.config.train.steps
            state = self.states[trial.name]
            total += work
            done += work * (1 if state.has_ended else min(state.step, steps) / steps)
        return done / total

    def seconds_left(self) -> float | None:
        """From the speed of this start; None while nothing is known."""
        done = self.share_done()
        fresh = done - self._done_before
        if fresh <= 0:
            return None
        return (1 - done) / fresh * (time.monotonic() - self._started)


def training_flops(trial: Trial) -> float:
    """Model FLOPs of a trial's training."""
    train = trial.config.train
    tokens = train.steps * train.batch_size * train.seq_len
    return tokens * train_flops_per_token(trial.config.model, trial.config.inner, train.seq_len)


# Processes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Process:
    trial: Trial
    popen: subprocess.Popen
    log: IO

    def close(self) -> None:
        """Closes the files of a process that has ended."""
        self.log.close()
        if self.popen.stdin:
            self.popen.stdin.close()


def log_path(out: Path, trial: Trial) -> Path:
    """The output of a trial's processes."""
    return out / TRIALS / f"{trial.name}.log"


def _start(
    trial: Trial, design: Design, out: Path, machine: Machine, jobs: int, slot: int
) -> _Process:
    workdir(out, trial).parent.mkdir(parents=True, exist_ok=True)
    log = log_path(out, trial).open("ab")
    command = [sys.executable, "-m", "tttjax", "sweep", f"--out={out}", f"--trial={trial.name}"]
    command += ["--follow-stdin", *code_flags(design, out)]
    environment = dict(os.environ)
    if machine.platform == "gpu":
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else list(map(str, range(machine.devices)))
        environment["CUDA_VISIBLE_DEVICES"] = names[slot % len(names)]
        if jobs > len(names):  # JAX reserves three quarters of a GPU for each process
            fraction = f"{0.9 / math.ceil(jobs / len(names)):.3f}"
            environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", fraction)
    popen = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # closes when this process ends, however it does: see `follow_stdin`
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
    )
    if machine.platform == "cpu" and hasattr(os, "sched_setaffinity"):
        cores = _cores()
        share = max(1, len(cores) // jobs)
        first = slot * share % len(cores)
        with contextlib.suppress(OSError):  # it has ended already
            os.sched_setaffinity(popen.pid, set(cores[first : first + share]))
    return _Process(trial, popen, log)


def follow_stdin() -> None:
    """Sends this process SIGTERM when its standard input closes, since its parent has ended."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _stop(processes: Sequence[_Process]) -> None:
    for process in processes:
        if process.popen.poll() is None:
            process.popen.terminate()


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or SIGINT has come; a second SIGINT interrupts."""
    received: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)

    previous = {n: signal.signal(n, handle) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
