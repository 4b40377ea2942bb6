"""Ending the process at once, from any thread, with the few clean-ups that others depend on.

The main thread may be in a collective or a compilation that never returns, so nothing unwinds.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

CLEAN_UP_SECONDS = 60.0  # after which a disk or bucket that hangs is left
_cleanups: list[Callable[[int], None]] = []


@contextlib.contextmanager
def at_sudden_end(clean_up: Callable[[int], None]) -> Iterator[None]:
    """Has `end_process` call this with the exit code, if it is called during the block."""
    _cleanups.append(clean_up)
    try:
        yield
    finally:
        _cleanups.remove(clean_up)


def end_process(code: int) -> NoReturn:
    """Cleans up, the innermost block first, and ends the process without unwinding it."""
    thread = threading.Thread(target=_clean_up, args=(code,), daemon=True)
    with contextlib.suppress(RuntimeError):  # no thread can be started
        thread.start()
        thread.join(CLEAN_UP_SECONDS)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, or a pipe that nobody reads
            stream.flush()
    os._exit(code)


def _clean_up(code: int) -> None:
    for clean_up in reversed(_cleanups):
        with contextlib.suppress(Exception):
            clean_up(code)
