"""The progress line of evaluations and prefills, with rate and ETA.

By hand, because rich's Progress redraws its line from a thread of its own, against that of
`runtime/progress.py`, and its rate and ETA count the steps that include compilation.
"""

import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TextIO

import jax

from tttjax.runtime import progress


@dataclass
class _Work:
    """Work done, and the seconds it took."""

    tokens: int = 0
    cost: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, cost: int, seconds: float) -> None:
        self.tokens, self.cost = self.tokens + tokens, self.cost + cost
        self.seconds += seconds

    def describe(self, remaining: int) -> str:
        """Rate and ETA; empty before the first measurement."""
        if not self.cost:
            return ""
        eta = timedelta(seconds=round(self.seconds * remaining / self.cost))
        return f"  {self.tokens / self.seconds:,.0f} tok/s  eta {eta}"


@dataclass
class Progress:
    """A progress line, updated in place on a terminal; one line every 10 s in a file.

    Rate and ETA exclude the first step of every program, which includes compilation.
    """

    total: int
    stream: TextIO | None = None
    what: str = ""
    title: str = "evaluate"
    _cost: int = 1
    _done: int = 0
    _steady: _Work = field(default_factory=_Work)  # steps for rate and ETA
    _is_first: bool = True  # the first step of a program includes compilation
    _last: float = field(default_factory=time.perf_counter)
    _shown: float = -1e9

    def doing(self, what: str, cost: int) -> None:
        """Names the next stage, with the cost of one token."""
        self.what, self._cost, self._is_first = what, cost, True
        progress.rename_activity(f"{self.title}: {what}, compiling or reading")

    def add(self, tokens: int) -> None:
        """Counts processed tokens and updates the line."""
        now = time.perf_counter()
        if not self._is_first:
            self._steady.add(tokens, tokens * self._cost, now - self._last)
        self._last, self._is_first = now, False
        self._done += tokens * self._cost
        if self.stream is None or jax.process_index():
            return
        terminal = self.stream.isatty()
        if now - self._shown < (0.2 if terminal else 10) and self._done < self.total:
            return
        self._shown = now
        line = (
            f"{self.title} {self._done / self.total:4.0%}  {self.what}"
            f"{self._steady.describe(self.total - self._done)}"
        )
        self.stream.write(f"\r\x1b[K{line}" if terminal else line + "\n")
        self.stream.flush()

    def close(self) -> None:
        """Ends the line."""
        if self.stream is not None and self.stream.isatty():
            self.stream.write("\n")
