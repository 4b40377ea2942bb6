"""Trains one run of four processes with random faults, and compares it with an undisturbed run.

    PYTHONPATH=.:tests python tests/pod/soak.py [--faults 24] [--steps 0] [--seed 0] [--bucket]

The processes are real ones on loopback (`helpers/pod.py`) that train `helpers/tiny_run.py` with
FSDP and data parallelism of two. Every fault is drawn by the seed: its kind (each of FAULTS once,
then again), the process, and a moment after steps that no earlier start has reached. After it, all
processes have ended, with the codes that the launchers know, and are started again.

Prints a line for every fault. In the end metrics records and train states must be bit-identical,
and the run's ledger must know the time and the steps that the faults cost; exit code 1, with a
sentence, if not, or if a fault ended with other codes.

With --bucket, data and both runs are in a bucket, of an emulator, and the processes share no disk.
"""

import argparse
import contextlib
import logging
import os
import random
import re
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# Of this process and those that it starts, before JAX is imported; tests have their own.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(  # three of the four processes compile at every start
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0 "
    "--xla_cpu_parallel_codegen_split_count=1",
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("TTTJAX_COMPILATION_CACHE", "off")

import numpy as np
from etils import epath
from helpers.pod import PodServer
from training import kill_and_resume

from tttjax.data.preparation import prepare
from tttjax.exit_codes import DONE, FAILED, LOST, SAVED, USER_ERROR
from tttjax.io.paths import file_sizes
from tttjax.runs.status import run_status
from tttjax.training.checkpoint_format import completed_checkpoints
from tttjax.training.checkpoint_integrity import find_damage
from tttjax.training.checkpoints import CHECKPOINT_DIR, absolute
from tttjax.training.metrics_file import deterministic_records

COUNT = 4
EVERY = 6  # steps from one checkpoint to the next
STEPS_PER_FAULT = 16  # more than a fault needs, so that all of them fall into training
BEATS = 10  # seconds of the heartbeat limit
SOON = 180  # seconds for the slowest start or end, on a busy machine
KILLED = -signal.SIGKILL


class SoakError(Exception):
    """The run did not survive a fault as it should."""


class Run:
    """A run. pod: the processes of its newest start. furthest: the last step of all starts.

    folder: what the processes print. hosts: their working folders, which stay empty, and caches.
    began, ended: Unix times of the first start's begin and the newest one's end.
    """

    def __init__(self, server: PodServer, folder: Path, data: str, workdir: str, steps: int):
        self._server, self._folder, self._data, self.workdir = server, folder, data, workdir
        self._hosts = [folder / f"host{process}" for process in range(COUNT)]
        for host in self._hosts:
            host.mkdir(parents=True)
        settings = {"train.steps": steps, "train.log_every": 1, "train.checkpoint_every": EVERY}
        settings |= {"train.max_skipped_steps": 3, "mesh.fsdp": 2, "model.num_layers": 1}
        self._words = [f"--config.{field}={value}" for field, value in settings.items()]
        self._steps, self.furthest, self.began, self.ended = steps, 0, 0.0, 0.0

    def complete(self) -> None:
        """A start without a fault, up to the last step."""
        self.start(f"--config.train.checkpoint_every={10 * EVERY}")  # saves take most of the time
        self.end([DONE] * COUNT, SOON + self._steps)

    def start(self, *words: str, rank: int = -1, fault: str = "slow", own: str = "") -> None:
        """Starts all processes; the process `rank` with this fault, and a flag of its own."""
        self.pod = self._server.pod(self._folder, self._data, COUNT, heartbeat=BEATS)
        self.began = self.began or time.time()
        for process, host in enumerate(self._hosts):
            is_it = process == rank
            self.pod.start(
                [process],
                fault=fault if is_it else "slow",
                words=[*self._words, *words, *([own] if own and is_it else [])],
                workdir=self.workdir,
                cwd=host,
                TTTJAX_DATA_CACHE=f"{host}.cache/data",
            )

    def end(self, expected: list[int], seconds: float = SOON) -> None:
        """Waits until all processes have ended, as they should, and looks at what they left."""
        ended = self.pod.wait(seconds)
        self.ended = time.time()
        if ended != expected:
            raise SoakError(f"the exit codes {ended} should be {expected}:\n{self.pod.report()}")
        self.furthest = max(self.furthest, self.step())
        for path in self.checkpoints():
            damage = find_damage(path)
            state = kill_and_resume.train_state(path)
            if damage or not all(np.isfinite(array).all() for array in state.values()):
                raise SoakError(f"{path} was sealed bad: {damage or 'it is not finite'}")

    def steps(self) -> list[int]:
        """The steps that process 0 has printed, in all starts."""
        return [int(step) for step in re.findall(r"^step +(\d+)/", self.pod.read(0, "out"), re.M)]

    def step(self) -> int:
        """The last step of all starts."""
        return max(self.steps(), default=0)

    def wait_for(self, step: int) -> None:
        """Returns after this step of the start."""
        pod = self.pod
        pod.wait_until(lambda: pod.codes or self.step() >= step, SOON)
        if pod.codes:
            raise SoakError(f"a start ended by itself before step {step}:\n{pod.report()}")

    def checkpoints(self) -> list[epath.Path]:
        """The complete checkpoints, the newest first."""
        return completed_checkpoints(absolute(self.workdir) / CHECKPOINT_DIR)[::-1]

    def check_ledger(self) -> None:
        """Its time is that of all starts; steps are lost that were printed twice."""
        status, wall = run_status(self.workdir), self.ended - self.began
        known, steps = sum(status.goodput.values()), self.steps()
        print(f"the ledger knows {known:.1f} s of {wall:.1f} s, {status.lost_steps} lost steps")
        if abs(known - wall) > 0.02 * wall:
            raise SoakError("that is not the time within 2%")
        if status.lost_steps != len(steps) - len(set(steps)):
            raise SoakError(f"{len(steps) - len(set(steps))} steps were printed again")

    def check_hosts(self) -> None:
        """No process has left a file where it was started."""
        if left := [path for host in self._hosts for path in host.iterdir()]:
            raise SoakError(f"the processes left {left[0]}")


# Faults ------------------------------------------------------------------------------------------
#
# Each starts the run, disturbs it, and returns what it did and the codes to expect.

Outcome = tuple[str, list[int]]


def codes(rank: int, own: int, others: int = LOST) -> list[int]:
    return [own if process == rank else others for process in range(COUNT)]


def draw_step(run: Run, rng: random.Random) -> int:
    """A step that no start has reached, of those until a checkpoint and some more."""
    return run.furthest + rng.randint(3, 2 + EVERY)


def start_until(run: Run, rng: random.Random) -> None:
    """Starts the run and waits for a moment in its training."""
    run.start()
    run.wait_for(draw_step(run, rng))
    time.sleep(rng.uniform(0, 0.3))


def sigkill(run: Run, rng: random.Random, rank: int) -> Outcome:
    start_until(run, rng)
    run.pod.signal(rank)
    return f"SIGKILL of process {rank}", codes(rank, KILLED)


def sigterm(run: Run, rng: random.Random, rank: int) -> Outcome:
    start_until(run, rng)
    run.pod.signal(rank, signal.SIGTERM)
    return f"SIGTERM to process {rank}", [SAVED] * COUNT


def suspend(run: Run, rng: random.Random, rank: int) -> Outcome:
    """Until the others have given it up."""
    start_until(run, rng)
    run.pod.signal(rank, signal.SIGSTOP)
    run.pod.wait(SOON, [process for process in range(COUNT) if process != rank])
    run.pod.signal(rank, signal.SIGCONT)
    return f"SIGSTOP of process {rank}", [LOST] * COUNT


def hang(run: Run, rng: random.Random, rank: int) -> Outcome:
    step = draw_step(run, rng)
    run.start("--config.watchdog.next_step=15", rank=rank, fault=f"slow, hangs at {step}")
    return f"process {rank} hangs at step {step}", [LOST] * COUNT


def bug(run: Run, rng: random.Random, rank: int) -> Outcome:
    step = draw_step(run, rng)
    run.start(rank=rank, fault=f"slow, bug at {step}")
    return f"an exception in process {rank} at step {step}", codes(rank, FAILED)


def bad_weights(run: Run, rng: random.Random, rank: int) -> Outcome:
    """Every other time after a step whose state is saved next."""
    step = draw_step(run, rng)
    if rng.random() < 0.5:
        step += -step % EVERY
    run.start(rank=rank, fault=f"slow, NaN at {step}")
    return f"NaN in the weights of process {rank} after step {step}", [USER_ERROR] * COUNT


def kill_in_save(run: Run, rng: random.Random, rank: int) -> Outcome:
    kind, step = "killed in a save", draw_step(run, rng)
    if rank == 0 and rng.random() < 0.5:
        kind = "killed at the seal"
    run.start(rank=rank, fault=f"slow, {kind} at {step}")
    return f"process {rank} {kind} from step {step} on", codes(rank, KILLED)


def truncate(run: Run, rng: random.Random, rank: int) -> Outcome:
    """A file of the newest checkpoint, between two starts, with an intact one before it."""
    while len(run.checkpoints()) < 2:
        run.start()
        run.wait_for(run.furthest + EVERY + 1)
        run.pod.signal(rank, signal.SIGTERM)
        run.end([SAVED] * COUNT)
    newest = run.checkpoints()[0]
    name = rng.choice(sorted(file_sizes(newest)))
    content = (newest / name).read_bytes()
    (newest / name).write_bytes(content[: len(content) // 2])
    what, expected = sigterm(run, rng, rank)
    return f"{newest.name}/{name} truncated, then {what}", expected


def other_settings(run: Run, rng: random.Random, rank: int) -> Outcome:
    run.start(rank=rank, own="--config.optim.peak_lr=0.5")
    return f"process {rank} starts with another learning rate", [USER_ERROR] * COUNT


FAULTS: tuple[Callable[[Run, random.Random, int], Outcome], ...] = (
    *(sigkill, sigterm, suspend, hang, bug, bad_weights, kill_in_save, truncate, other_settings),
)


def draw_faults(count: int, rng: random.Random) -> list[Callable]:
    """All kinds in random order, then again."""
    drawn: list[Callable] = []
    while len(drawn) < count:
        drawn += rng.sample(FAULTS, len(FAULTS))
    return drawn[:count]


def soak(root: Path, faults: int, steps: int, seed: int, bucket: str = "") -> None:
    """The whole comparison in a folder. bucket: for data and runs. Raises SoakError."""
    rng, began, place = random.Random(seed), time.monotonic(), bucket or root
    library = Path(os.__file__).parent
    texts = [str(library / name) for name in ("argparse.py", "ast.py", "shutil.py")]
    prepare(texts, f"{place}/data", num_workers=0)
    with PodServer(root / "compiled") as server:
        undisturbed, disturbed = runs = [
            Run(server, root / f"{name}-out", f"{place}/data", f"{place}/{name}", steps)
            for name in ("alone", "disturbed")
        ]
        undisturbed.complete()
        print(f"{time.monotonic() - began:6.1f} s: {steps} steps without a fault", flush=True)
        for number, fault in enumerate(draw_faults(faults, rng), start=1):
            started = time.monotonic()
            what, expected = fault(disturbed, rng, rng.randrange(COUNT))
            disturbed.end(expected)
            now = time.monotonic()
            print(
                f"{now - began:6.1f} s: fault {number}, {now - started:.1f} s: {what}; codes "
                f"{disturbed.pod.wait(0)}, {disturbed.step()} steps done",
                flush=True,
            )
        disturbed.complete()
        print(f"{time.monotonic() - began:6.1f} s: the disturbed run is complete", flush=True)
        disturbed.check_ledger()
        disturbed.check_hosts()
    records = [deterministic_records(run.workdir) for run in runs]
    if len(records[0]) != steps or records[0] != records[1]:
        pairs = zip(*records, strict=False)
        first = next((a["step"] for a, b in pairs if a != b), "none")
        lengths = " and ".join(str(len(each)) for each in records)
        raise SoakError(f"the records of {lengths} steps differ; the first that does: {first}")
    if not kill_and_resume.same_state(undisturbed.workdir, disturbed.workdir):
        raise SoakError("the records are equal, but the final train states differ")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=24)
    parser.add_argument("--steps", type=int, default=0, help=f"0: {STEPS_PER_FAULT} per fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bucket", action="store_true", help="no shared disk")
    options = parser.parse_args(arguments)
    steps = options.steps or STEPS_PER_FAULT * (options.faults + 1)
    with contextlib.ExitStack() as exit_stack:
        folder = exit_stack.enter_context(tempfile.TemporaryDirectory(prefix="soak"))
        if options.bucket:
            from helpers.bucket_emulators import Emulators

            logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
            os.environ.update(exit_stack.enter_context(Emulators()).environment)
        bucket = "gs://bkt" if options.bucket else ""
        try:
            soak(Path(folder), options.faults, steps, options.seed, bucket)
        except (SoakError, AssertionError) as error:  # the latter of a process that did not end
            print(f"error: {error}", flush=True)
            return 1
    print(f"{options.faults} faults: records and final states of {steps} steps are bit-identical")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
