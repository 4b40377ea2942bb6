"""Activity messages: what a command is doing, and for how long, while it prints nothing else.

XLA compiles for seconds to minutes inside one call, so a thread prints them. The command line
turns them on (`show_activity`); a program that imports tttjax prints none. Other output of the
command restarts the quiet period and first erases the activity line from the terminal.

By hand, because rich's Status and Live end the line at every flush of other output, which puts each
token of a streamed text on a line of its own, and print nothing in a log file while they run.
"""

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO, cast

QUIET_SECONDS = 1.5  # of silence before a message; below two, also on a busy machine
LONGEST_PAUSE = 30.0  # between two messages in a log file


_line: "_Line | None" = None  # output; None: off
_stack: list["_Ticker"] = []  # nested activities; the innermost reports
_lock = threading.RLock()  # guards both, and the stream


@contextlib.contextmanager
def show_activity(stream: TextIO) -> Iterator[None]:
    """Has `report_activity` print its messages to this stream."""
    global _line
    earlier, _line = _line, _Line(stream)
    try:
        with (
            contextlib.redirect_stdout(_line.watch(sys.stdout)),
            contextlib.redirect_stderr(_line.watch(sys.stderr)),
        ):
            yield
    finally:
        _line = earlier


@contextlib.contextmanager
def report_activity(
    activity: str, last_seconds: float | None = None, *, quiet_seconds: float | None = None
) -> Iterator[None]:
    """Reports an activity that may print nothing for long.

    After `quiet_seconds` (QUIET_SECONDS) it prints the elapsed time of `activity`: on a terminal in
    a line that is renewed every second and erased at the end, in a file in lines at growing
    intervals. Of nested activities the innermost reports; an empty `activity` prints nothing.

    Arguments:
      activity: such as "compiling the train step".
      last_seconds: how long it took the last time, if known.
    """
    if _line is None:
        yield
        return
    line = _line
    with _lock:
        ticker = _Ticker(line, activity, last_seconds, quiet_seconds or QUIET_SECONDS)
        _stack.append(ticker)
    ticker.start()
    try:
        yield
    finally:
        ticker.stop()
        with _lock:
            line.clear()
            _stack.remove(ticker)
            if _stack:
                _stack[-1].wait()


def rename_activity(activity: str) -> None:
    """Renames the innermost activity and restarts its time."""
    with _lock:
        if _stack:
            _stack[-1].begin(activity)


class _Line:
    """The activity line, and the unfinished output that it covers on the terminal."""

    def __init__(self, stream: TextIO):
        self.stream, self.terminal = stream, stream.isatty()
        self._unfinished = ""  # output since the last newline
        self._is_shown = False

    def watch(self, stream: TextIO) -> TextIO:
        """The stream, wrapped to call `before_print` if it shares this line's output."""
        same_output = stream is not None and stream.isatty() == self.terminal
        return cast(TextIO, _Watched(stream, self)) if same_output else stream

    def show(self, activity: str, suffix: str) -> None:
        if not self.terminal:
            self._write(f"{activity}{suffix}\n")
            return
        # A wrapped line could not be renewed: only its last row would be erased.
        columns = shutil.get_terminal_size().columns
        if not self._is_shown and len(self._unfinished) >= columns:
            self._unfinished = ""
            self._write("\n")
        self._is_shown = True
        text = activity[: max(columns - 1 - len(suffix), 0)] + suffix
        self._write(f"\r\x1b[K{text[: columns - 1]}")

    def clear(self) -> None:
        if self._is_shown:
            self._is_shown = False
            self._write(f"\r\x1b[K{self._unfinished}")

    def before_print(self, text: str) -> None:
        """Call before other output: erases the line and restarts the quiet period."""
        self.clear()
        last = (self._unfinished + text).rpartition("\n")[2]
        self._unfinished = last.rpartition("\r\x1b[K")[2]
        if _stack:
            _stack[-1].wait()

    def _write(self, text: str) -> None:
        with contextlib.suppress(ValueError, OSError):  # a closed stream must not end the command
            self.stream.write(text)
            self.stream.flush()


class _Watched:
    """A stream that calls `_Line.before_print` before each write."""

    def __init__(self, stream: TextIO, line: _Line):
        self._stream, self._line = stream, line

    def write(self, text: str) -> int:
        with _lock:
            self._line.before_print(text)
            written = self._stream.write(text)
            if self._line.terminal:  # keeps stdout and stderr in order
                self._stream.flush()
            return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Ticker:
    def __init__(
        self, line: _Line, activity: str, last_seconds: float | None, quiet_seconds: float
    ):
        self._line, self._last, self._quiet = line, last_seconds, quiet_seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.begin(activity)

    def start(self) -> None:
        self._thread.start()

    def begin(self, activity: str) -> None:
        """Starts the activity and its quiet period."""
        self.activity, self._since = activity, time.monotonic()
        self._line.clear()
        self.wait()

    def wait(self) -> None:
        """Restarts the quiet period."""
        self._pause, self._next = self._quiet, time.monotonic() + self._quiet

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(max(self._next - time.monotonic(), self._quiet / 20)):
            with _lock:
                now = time.monotonic()
                if now < self._next or not self.activity or _stack[-1] is not self:
                    continue
                last = f" (the last time it took {self._last:.0f} s)" if self._last else ""
                self._line.show(self.activity, f": {now - self._since:.0f} s{last}")
                if self._line.terminal:
                    self._next = now + min(1.0, self._quiet)
                else:
                    self._next = now + self._pause
                    self._pause = min(2 * self._pause, LONGEST_PAUSE)
