"""What a start has done so far: its seconds by phase and its steps."""

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

LOOP = ("input", "device", "host")  # the phases of a step


class StartAccount:
    """Every second since `began` belongs to one phase; of nested phases the innermost counts.

    "start" until `begin_steps`; then "host", the loop's own work, and in it "input" (waiting for
    a batch) and "device" (dispatching a step, waiting for its results or for other processes);
    "compile" (with all of the first step), "restore", "save" and "evaluate"; "other" after
    `end_steps`. Any thread may read.

    began: Unix time, before imports and joining. steps_before: those that the start resumes after,
    None until it has. furthest: the last step that an earlier start recorded (of process 0): up to
    it, steps are computed again. step: the last one that this start recorded.
    """

    def __init__(
        self, began: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        now = time.time()
        self.began = now if began is None else began
        self.steps_before: int | None = None
        self.furthest = self.step = 0
        self._clock, self._since, self._lock = clock, clock(), threading.Lock()
        self._phases = ["start"]
        self._seconds = defaultdict[str, float](float, start=max(0.0, now - self.began))
        self._finished = self._lost = 0.0, 0.0  # of input and of the loop, up to the steps

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The block is of this phase. Only of the loop's thread."""
        with self._lock:
            self._book()
            self._phases.append(name)
        try:
            yield
        finally:
            with self._lock:
                self._book()
                self._phases.pop()

    def begin_steps(self, steps_before: int) -> None:
        """The loop begins, after a checkpoint of `steps_before` steps."""
        with self._lock:
            self._book()
            self._phases[0] = "host"
            self.steps_before = self.step = int(steps_before)  # NumPy's, of several processes

    def end_steps(self) -> None:
        """The loop has ended."""
        with self._lock:
            self._book()
            self._phases[0] = "other"

    def finish(self, step: int) -> None:
        """This step is recorded."""
        with self._lock:
            self._book()
            self.step = step
            self._finished = self._seconds["input"], sum(self._seconds[name] for name in LOOP)
            if step <= self.furthest:
                self._lost = self._finished

    @property
    def current(self) -> str:
        """The phase of this moment."""
        return self._phases[-1]

    def loop_seconds(self) -> tuple[float, float, float]:
        """Of the phases LOOP, so far."""
        with self._lock:
            self._book()
            return (self._seconds["input"], self._seconds["device"], self._seconds["host"])

    def spent(self, has_ended: bool = False) -> dict[str, float]:
        """Seconds by their use; they add up to the time since `began`.

        "steps" are those of device and host; "lost" is the loop's time, input included, of steps
        that an earlier start had recorded and, once the start has ended, of one that it did not
        finish.
        """
        with self._lock:
            self._book()
            seconds, (lost_input, lost) = self._seconds.copy(), self._lost
        loop = sum(seconds[name] for name in LOOP)
        if has_ended:
            lost_input += seconds["input"] - self._finished[0]
            lost += loop - self._finished[1]
        result = {name: seconds[name] for name in ("start", "compile", "restore")}
        result["input"] = seconds["input"] - lost_input
        result["steps"] = loop - lost - result["input"]
        result["lost"] = lost
        return result | {name: seconds[name] for name in ("save", "evaluate", "other")}

    def _book(self) -> None:
        now, name = self._clock(), self._phases[-1]
        if self.step == self.steps_before and name in ("device", "host"):
            name = "compile"  # the first step: other processes may compile longer
        self._seconds[name] += now - self._since
        self._since = now
