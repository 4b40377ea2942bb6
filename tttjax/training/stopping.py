"""Requests to stop: SIGTERM, SIGINT, and the preemption notice of a pod."""

import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

# sysexits.h: "temporary failure; the user is invited to retry". A scheduler that sees it starts
# the same command again.
EXIT_INTERRUPTED = 75


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
