"""The progress line of reading: in an evaluation, or into a session."""

import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TextIO

import jax

from tttjax import progress


@dataclass
class Progress:
    """How far the evaluation is: one line that rewrites itself, on a file one every 10 s."""

    total: int
    stream: TextIO | None = None
    what: str = ""
    title: str = "evaluate"
    _cost: int = 1
    _done: int = 0
    _tokens: int = 0
    _started: float = field(default_factory=time.perf_counter)
    _shown: float = -1e9

    def doing(self, what: str, cost: int) -> None:
        """What is read next, and what a token of it costs."""
        self.what, self._cost = what, cost
        progress.now(f"{self.title}: {what}, compiling or reading")

    def add(self, tokens: int) -> None:
        """So many tokens have been read."""
        self._tokens += tokens
        self._done += tokens * self._cost
        if self.stream is None or jax.process_index():
            return
        now = time.perf_counter()
        terminal = self.stream.isatty()
        if now - self._shown < (0.2 if terminal else 10) and self._done < self.total:
            return
        self._shown = now
        elapsed = now - self._started
        left = timedelta(seconds=round(elapsed * (self.total / self._done - 1)))
        line = (
            f"{self.title} {self._done / self.total:4.0%}  {self.what}  "
            f"{self._tokens / elapsed:,.0f} tok/s  eta {left}"
        )
        self.stream.write(f"\r\x1b[K{line}" if terminal else line + "\n")
        self.stream.flush()
        progress.shown()

    def close(self) -> None:
        """Ends the line."""
        if self.stream is not None and self.stream.isatty():
            self.stream.write("\n")
