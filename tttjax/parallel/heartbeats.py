"""Signs of life of a run's processes, in its store, and what they say with them."""

import json
import time
from collections.abc import Callable
from typing import Any

from tttjax.parallel.store import Store

_BEATS, _WORD = "beat", "word"


class Heartbeats:
    """Those of this process and, where it listens, of all; process 0 always does.

    says: what this process says with every beat (values of JSON); called in the thread of the
    heartbeats. word: what a process last said to all with `tell`; "" for nothing.
    """

    def __init__(self, store: Store):
        self.says: Callable[[], dict[str, Any]] = dict
        self.word, self.listens = "", store.process_id == 0
        self._store, self._count, now = store, 0, time.monotonic()
        self.answered = now  # when the store last answered
        # By process: the text of the last beat, its values, and when it was new.
        self._heard = {i: ("", dict[str, Any](), now) for i in range(store.process_count)}

    def beat(self) -> None:
        """One sign of life. Raises StoreLostError."""
        self._count += 1
        values = json.dumps({"beat": self._count, **self.says()})
        self._store.put(f"{_BEATS}/{self._store.process_id}", values)
        self.answered = time.monotonic()
        self.word = self._store.peek(_WORD) or ""
        if self.listens:
            for key, text in self._store.items(_BEATS).items():
                if self._heard[int(key)][0] != text:
                    self._heard[int(key)] = (text, json.loads(text), time.monotonic())

    def heard(self) -> list[tuple[dict[str, Any], float]]:
        """Where this process listens: by process, what it last said, and how many seconds ago."""
        now = time.monotonic()
        return [(values, now - since) for _, values, since in list(self._heard.values())]

    def tell(self, word: str) -> None:
        """Has `word` in all processes after their next beat. Raises StoreLostError."""
        self._store.put(_WORD, word)
