"""Profiler traces of training steps: those of the configuration, and those asked for meanwhile.

A file `profile_now` in the work directory asks for the next steps. A thread of process 0 sees and
removes it, and broadcasts with the heartbeats from which step on to trace, late enough that all
processes know.
"""

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

import jax

from tttjax.io.paths import is_bucket
from tttjax.io.spool import Spool
from tttjax.parallel.pod import current_pod
from tttjax.training.hosts import BROADCAST_SECONDS, Hosts
from tttjax.types import PyTree

REQUEST, PROFILE_DIR = "profile_now", "profile"
REQUESTED_STEPS = 5
LOOK_SECONDS, BUCKET_LOOK_SECONDS = 2.0, 15.0  # in a bucket each look is a request


class Profiler:
    """A context for the loop, which traces steps into `profile/` (for TensorBoard and Perfetto).

    steps: the first and last of the configuration, () for none. log: prints a line.
    """

    def __init__(
        self, steps: tuple[int, ...], workdir: Path, hosts: Hosts, log: Callable[[str], None]
    ):
        self._first, self._last = steps or (0, 0)
        self._workdir, self._hosts, self._log = workdir, hosts, log
        self._pod, self._message, self._seen = current_pod(), "", ""
        self._running = False
        self._closed = threading.Event()

    def __enter__(self) -> "Profiler":
        if jax.process_index() == 0:
            threading.Thread(target=self._look, name="profiler", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._stop()

    def before(self, step: int) -> None:
        """Begins a trace if this step is the first of one."""
        message = self._pod.heartbeats.message if self._pod else self._message
        if message != self._seen and not self._running:
            self._seen, self._first = message, max(step, int(message))
            self._last = self._first + REQUESTED_STEPS - 1
        if step == self._first:
            self._spool, folder = Spool(self._workdir), self._workdir / PROFILE_DIR
            self._log(f"profiling steps {self._first} to {self._last} into {folder}")
            jax.profiler.start_trace(str(self._spool.folder / PROFILE_DIR))
            self._running = True

    def after(self, step: int, result: PyTree) -> None:
        """Ends the trace after the last step, once its arrays `result` are computed."""
        if self._running and step >= self._last:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            self._spool.close()

    def _look(self) -> None:
        """Of process 0's thread: turns the file into a message to all."""
        seconds = BUCKET_LOOK_SECONDS if is_bucket(self._workdir) else LOOK_SECONDS
        while not self._closed.wait(seconds):
            with contextlib.suppress(Exception):  # no file, no store, a bucket that does not answer
                (self._workdir / REQUEST).unlink()
                first = self._hosts.next_step(BROADCAST_SECONDS if self._pod else 0.0)
                if self._pod:
                    self._pod.heartbeats.broadcast(str(first))
                else:
                    self._message = str(first)
