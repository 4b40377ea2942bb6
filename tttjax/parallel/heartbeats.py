"""Heartbeats of a run's processes, in its store, with a payload from each."""

import json
import time
from collections.abc import Callable
from typing import Any

from tttjax.parallel.store import Store

_BEATS, _MESSAGE = "beat", "message"


class Heartbeats:
    """Those of this process and, where it collects them, of all; process 0 always does.

    payload: values of JSON that this process sends with every beat; called in the thread of the
    heartbeats. message: the last one that a process broadcast to all; "" if none has.
    """

    def __init__(self, store: Store):
        self.payload: Callable[[], dict[str, Any]] = dict
        self.message, self.collects = "", store.process_id == 0
        self._store, self._count, now = store, 0, time.monotonic()
        self.answered = now  # when the store last answered
        # By process: the text of the last beat, its values, and when it was new.
        self._received = {i: ("", dict[str, Any](), now) for i in range(store.process_count)}

    def beat(self) -> None:
        """One heartbeat. Raises StoreLostError."""
        self._count += 1
        values = json.dumps({"beat": self._count, **self.payload()})
        self._store.put(f"{_BEATS}/{self._store.process_id}", values)
        self.answered = time.monotonic()
        self.message = self._store.peek(_MESSAGE) or ""
        if self.collects:
            for key, text in self._store.items(_BEATS).items():
                if self._received[int(key)][0] != text:
                    self._received[int(key)] = (text, json.loads(text), time.monotonic())

    def received(self) -> list[tuple[dict[str, Any], float]]:
        """By process, its last payload and the age of that in seconds; {} without `collects`."""
        now = time.monotonic()
        return [(values, now - since) for _, values, since in list(self._received.values())]

    def broadcast(self, message: str) -> None:
        """Gives `message` to all processes with their next beat. Raises StoreLostError."""
        self._store.put(_MESSAGE, message)
