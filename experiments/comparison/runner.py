"""Runs the tasks of a plan in parallel, each in its own process, until done or interrupted.

A new process for each run frees all memory. On a CPU, two single-core processes train faster
together than one with two cores: the models are too small to parallelise.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from experiments.comparison.plan import Task
from tttjax.errors import UserError

POLL_SECONDS = 0.3
REPORT_SECONDS = 60.0
Log = Callable[[str], None]


@dataclass
class Record:
    """Seconds of every finished task, and total elapsed seconds; stored in a file."""

    path: Path
    seconds: dict[str, float] = field(default_factory=dict)
    elapsed: float = 0.0

    @staticmethod
    def read(path: Path) -> "Record":
        return Record(path, **json.loads(path.read_text())) if path.exists() else Record(path)

    def write(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        values = {"seconds": self.seconds, "elapsed": self.elapsed}
        temporary.write_text(json.dumps(values, indent=1) + "\n")
        os.replace(temporary, self.path)

    def pace(self, tasks: Sequence[Task]) -> float:
        """Measured over expected seconds of the finished tasks; 1 if there are none."""
        finished = [task for task in tasks if task.name in self.seconds]
        expected = sum(task.seconds for task in finished)
        measured = sum(self.seconds[task.name] for task in finished)
        return measured / expected if finished else 1.0


@dataclass
class _Running:
    task: Task
    process: subprocess.Popen
    slot: int
    log: Path
    started: float


class Stop:
    """A context in which SIGTERM and Ctrl-C only set `requested`."""

    def __init__(self) -> None:
        self.requested = False

    @contextlib.contextmanager
    def listening(self) -> Iterator["Stop"]:
        signals = (signal.SIGTERM, signal.SIGINT)
        earlier = {number: signal.signal(number, self._note) for number in signals}
        try:
            yield self
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _note(self, *_) -> None:
        self.requested = True


def run_tasks(
    plan: Callable[[], Sequence[Task]], out: Path, *, jobs: int, stop: Stop, log: Log
) -> bool:
    """Runs all tasks of `plan`; False if interrupted before the end.

    plan: called again after each task, because results may add tasks.
    Raises UserError if a task fails; the others are stopped first, and continue the next time.
    """
    record = Record.read(out / "progress.json")
    before = record.elapsed
    (out / "logs").mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str((out / "cache").absolute())}
    running: list[_Running] = []
    start = last_report = time.monotonic()
    tasks = list(plan())
    try:
        while True:
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                record.elapsed = before + time.monotonic() - start
                _conclude(one, record, stop)
                tasks = list(plan())
                if one.task.is_done():
                    log(_line(tasks, one, record, jobs))
            if not stop.requested:
                for task in _ready(tasks, running)[: jobs - len(running)]:
                    running.append(_start(task, out, environment, jobs, running))
            if not running:
                return not stop.requested
            if stop.requested:
                return False
            if time.monotonic() - last_report > REPORT_SECONDS:
                last_report = time.monotonic()
                log(f"  running: {'; '.join(map(_state, running))}")
            time.sleep(POLL_SECONDS)
    finally:
        _end(running, log)
        record.elapsed = before + time.monotonic() - start
        record.write()


def _ready(tasks: Sequence[Task], running: Sequence[_Running]) -> list[Task]:
    done = {task.name for task in tasks if task.is_done()}
    busy = {one.task.name for one in running}
    return [
        task
        for task in tasks
        if task.name not in done | busy and task.command and done.issuperset(task.needs)
    ]


def _start(
    task: Task, out: Path, environment: dict[str, str], jobs: int, running: Sequence[_Running]
) -> _Running:
    slot = min(set(range(jobs)) - {one.slot for one in running})
    path = out / "logs" / f"{task.name.replace('/', '-')}.log"
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), environment.get("PYTHONPATH", "")]
    with path.open("ab") as file, _own_cores(slot, jobs):
        process = subprocess.Popen(
            task.command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            start_new_session=True,  # only this process receives Ctrl-C, and forwards it
        )
    return _Running(task, process, slot, path, time.monotonic())


@contextlib.contextmanager
def _own_cores(slot: int, jobs: int) -> Iterator[None]:
    """Gives a process started here its own share of the cores."""
    if jobs == 1 or not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[slot::jobs] or cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _conclude(one: _Running, record: Record, stop: Stop) -> None:
    """Records a task that has ended. Raises UserError if it failed."""
    if one.task.is_done():
        record.seconds[one.task.name] = round(time.monotonic() - one.started, 1)
        record.write()
        return
    if stop.requested:
        return
    words = one.log.read_text(errors="replace").strip().splitlines() or ["no output"]
    raise UserError(
        f"{one.task.name} failed with exit code {one.process.returncode}: "
        f"{words[-1].removeprefix('error: ')} (the full log is {one.log}; run the same command "
        "again to continue)"
    )


def _end(running: Sequence[_Running], log: Log) -> None:
    """Terminates all processes, which save first."""
    for one in running:
        one.process.terminate()
    if running:
        log(f"stopping after the step in progress: {', '.join(one.task.name for one in running)}")
    for one in running:
        one.process.wait()


def _line(tasks: Sequence[Task], one: _Running, record: Record, jobs: int) -> str:
    done = sum(task.is_done() for task in tasks)
    remaining = (
        sum(task.seconds for task in tasks if not task.is_done()) * record.pace(tasks) / jobs
    )
    return (
        f"[{done}/{len(tasks)}] {one.task.name} done in {clock(record.seconds[one.task.name])}; "
        f"elapsed {clock(record.elapsed)}, about {clock(remaining)} remaining"
    )


def _state(one: _Running) -> str:
    """Progress of a task: the last line of its log."""
    words = one.log.read_text(errors="replace").strip().splitlines()
    last = words[-1] if words else "starting"
    return f"{one.task.name} ({last[:60]})"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
