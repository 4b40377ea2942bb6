"""Ends a run that hangs: writes the stacks of all threads, then leaves so that it is started again.

A thread compares the time since the last sign of progress with a limit: that of the phase the run
is in or, between steps, 20 median steps, but at least `watchdog.next_step`. The loop only notes
times.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from tttjax.config import WatchdogConfig
from tttjax.exit_codes import LOST
from tttjax.parallel.pod import end_run, stop_requested
from tttjax.training.start_account import StartAccount

CHECK_SECONDS = 0.5
SUSPENDED_SECONDS = 10.0  # between two checks: then the whole process was suspended
MEDIANS = 20  # a step may take this many medians
STOP_MEDIANS, STOP_SECONDS = 3, 20.0  # and at least, for the step after a request to stop
STACKS_DIR = "hangs"


class Watchdog:
    """A context for a run; `on_hang(sentence)` is called once, from the watching thread.

    limits: seconds of every phase; 0: none. account: is told the phases. clock: seconds that never
    go back.
    """

    def __init__(
        self,
        limits: WatchdogConfig,
        on_hang: Callable[[str], None],
        account: StartAccount,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._limits, self._on_hang, self._account, self._clock = limits, on_hang, account, clock
        self._lock = threading.Lock()
        self._phases: list[tuple[str, float]] = [("start", clock())]  # and when each began
        self._seconds: deque[float] = deque(maxlen=100)
        self._stop_since: float | None = None
        self._checked = clock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The block has the limit of the field `name`; what was before it begins anew after it."""
        with self._lock:
            self._phases.append((name, self._clock()))
        try:
            with self._account.phase(name):
                yield
        finally:
            with self._lock:
                self._phases.pop()
                self._phases[-1] = (self._phases[-1][0], self._clock())

    def step(self) -> None:
        """Notes a finished step. Between two of these, the limit is that of a step."""
        with self._lock:
            (name, began), now = self._phases[-1], self._clock()
            if name == "next_step":
                self._seconds.append(now - began)
            self._phases[-1] = ("next_step", now)

    def expect_stop(self) -> None:
        """From any thread: the run was asked to stop, and should do so after this step."""
        with self._lock:
            if self._stop_since is None:
                self._stop_since = self._clock()

    def check_clock(self) -> None:
        """Call often. What passed while the process was suspended, as by Ctrl-Z, does not count."""
        with self._lock:
            gap = self._clock() - self._checked
            self._checked += gap
            if gap > SUSPENDED_SECONDS:
                self._phases = [(name, began + gap) for name, began in self._phases]

    def overdue(self) -> str:
        """What has taken too long, as a sentence; "" if nothing has."""
        with self._lock:
            (name, began), now = self._phases[-1], self._clock()
            typical = median(self._seconds) if self._seconds else 0.0
            stop_since = self._stop_since
        limit: float = getattr(self._limits, name)
        if name == "next_step":
            limit = limit and max(limit, MEDIANS * typical)
            if stop_since is not None and typical and limit:
                began, limit = max(began, stop_since), max(STOP_SECONDS, STOP_MEDIANS * typical)
        if not limit or now - began <= limit:
            return ""
        what = "no step ended" if name == "next_step" else f"{_PHASES[name]} did not end"
        return f"{what} in {limit:.0f} s (watchdog.{name})"

    def _watch(self) -> None:
        while not self._closed.wait(CHECK_SECONDS):
            self.check_clock()
            if stop_requested():
                self.expect_stop()
            if problem := self.overdue():
                self._on_hang(problem)
                return


_PHASES = {
    "start": "the start",
    "compile": "compiling",
    "restore": "restoring a checkpoint",
    "save": "saving a checkpoint",
    "evaluate": "the evaluation of held-out data",
}


def end_hung_run(workdir: Path, problem: str) -> None:
    """Ends all processes with LOST and the stacks of their threads, whatever they are doing."""
    folder = workdir / STACKS_DIR
    end_run(LOST, f"{problem}; the stacks of all threads are in {folder}", stacks=folder)
