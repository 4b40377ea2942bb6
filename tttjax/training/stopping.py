"""Stopping after the current step on SIGTERM, SIGINT or the preemption notice of a pod."""

import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """A context for the training loop that catches requests to stop.

    One process: SIGTERM or SIGINT; a second SIGINT ends the run at once, unsaved. Several
    processes: JAX's preemption service receives SIGTERM on any of them, and all stop after the same
    step.

    A separate thread prints a line for the first signal, since Python signal handlers do not run
    while JAX compiles.
    """

    def __init__(self, on_signal: Callable[[], None] = lambda: None) -> None:
        """on_signal: called at the first signal, from another thread."""
        self._on_signal = on_signal
        self._signal: int | None = None
        self._previous_handlers: dict[int, Any] = {}
        self._exit_stack = contextlib.ExitStack()

    def __enter__(self) -> "StopRequest":
        main = threading.current_thread() is threading.main_thread()
        if main and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous_handlers[number] = signal.signal(number, self._handle)
            self._exit_stack.enter_context(_announce_signal(self._on_signal))
        return self

    def __exit__(self, *_: Any) -> None:
        self._exit_stack.close()
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._signal = number

    def after(self, step: int) -> bool:
        """Whether to stop after this step. Every process must call this after every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signal is not None


@contextlib.contextmanager
def _announce_signal(on_signal: Callable[[], None]) -> Iterator[None]:
    """At the first SIGTERM or SIGINT, calls `on_signal` and prints a line to stderr."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    handled = {bytes([number]) for number in (signal.SIGTERM, signal.SIGINT)}

    def wait_for_signal() -> None:
        while received := receiver.recv(1):
            if received in handled:
                on_signal()
                newline = "\n" if sys.stdout.isatty() else ""  # after the progress line
                print(f"{newline}stopping after this step", file=sys.stderr, flush=True)
                return

    thread = threading.Thread(target=wait_for_signal, daemon=True)
    previous_fd = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_fd)
        sender.close()
        thread.join()
        receiver.close()
