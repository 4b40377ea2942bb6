"""Signs of life: what a slow part of a command is doing, and for how long, while it is silent.

XLA compiles for seconds to minutes inside one call, so a thread says so. The command line turns
this on (`speaking`); in a program that imports tttjax nothing is printed.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import TextIO

QUIET_SECONDS = 2.0  # after which something is said
LONGEST_PAUSE = 30.0  # between two lines in a log file

_stream: TextIO | None = None
_stack: list["_Ticker"] = []  # nested activities; the innermost speaks


@contextlib.contextmanager
def speaking(stream: TextIO) -> Iterator[None]:
    """Has `doing` speak to this stream."""
    global _stream
    earlier, _stream = _stream, stream
    try:
        yield
    finally:
        _stream = earlier


@contextlib.contextmanager
def doing(
    what: str, last_seconds: float | None = None, *, quiet_seconds: float | None = None
) -> Iterator[None]:
    """A part of a command that may be silent for long.

    After `quiet_seconds` (QUIET_SECONDS) it is said how long `what` has taken: on a terminal in a
    line that is renewed every second and erased at the end, in a file by lines at growing
    intervals. Of nested parts the innermost speaks; an empty `what` has nothing said.

    Arguments:
      what: such as "compiling the train step".
      last_seconds: how long it took the last time, where that is known.
    """
    if _stream is None:
        yield
        return
    ticker = _Ticker(_stream, what, last_seconds, quiet_seconds or QUIET_SECONDS)
    _stack.append(ticker)
    ticker.start()
    try:
        yield
    finally:
        ticker.stop()
        _stack.remove(ticker)
        if _stack:
            _stack[-1].restart()


def now(what: str) -> None:
    """The innermost part goes on with something else."""
    if _stack:
        _stack[-1].what = what
        _stack[-1].restart()


def shown() -> None:
    """Something was printed: silence begins anew, and the terminal's line is another's."""
    if _stack:
        _stack[-1].restart()


class _Ticker:
    def __init__(self, stream: TextIO, what: str, last_seconds: float | None, quiet_seconds: float):
        self._stream, self.what, self._last, self._quiet = (
            stream,
            what,
            last_seconds,
            quiet_seconds,
        )
        self._terminal = stream.isatty()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.restart()

    def start(self) -> None:
        self._thread.start()

    def restart(self) -> None:
        with self._lock:
            self._has_line = False
            self._since, self._pause = time.monotonic(), self._quiet
            self._next = self._since + self._quiet

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()
        if self._has_line:
            self._write("\r\x1b[K")

    def _run(self) -> None:
        while not self._stopped.wait(max(self._next - time.monotonic(), self._quiet / 20)):
            with self._lock:
                now = time.monotonic()
                if now < self._next or not self.what or _stack[-1] is not self:
                    continue
                self._say(now - self._since)
                if self._terminal:
                    self._next = now + min(1.0, self._quiet)
                else:
                    self._next = now + self._pause
                    self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _say(self, seconds: float) -> None:
        before = f" (the last time it took {self._last:.0f} s)" if self._last else ""
        text = f"{self.what}: {seconds:.0f} s{before}"
        self._has_line = self._terminal
        self._write(f"\r\x1b[K{text}" if self._terminal else text + "\n")

    def _write(self, text: str) -> None:
        with contextlib.suppress(ValueError, OSError):  # a closed stream ends no command
            self._stream.write(text)
            self._stream.flush()
