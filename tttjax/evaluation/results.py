"""What an evaluation found: for every way of reading and context length, losses by document."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tttjax.evaluation.statistics import Estimate, Sums, position_bins


@dataclass(frozen=True)
class Series:
    """One way of reading: a run and a mode.

    label: its name in tables and plots. inner: rule, lr, clip and chunk size if it learned, else
    None. contexts: by context length, what every position had, summed by document.
    seconds: time spent on it, compilation included.
    """

    run: str
    mode: str
    label: str
    inner: dict[str, Any] | None
    contexts: dict[int, Sums]
    seconds: float

    @property
    def learns(self) -> bool:
        return self.inner is not None


@dataclass(frozen=True)
class Comparison:
    """Several ways of reading the same held-out tokens.

    window: tokens after which "beyond the window" begins. bins: about how many bins by position.
    runs: name, step, source and parameters of each run. text: where the tokens come from.
    table, sentence: the results in words, from `tables`.
    """

    series: tuple[Series, ...]
    lengths: tuple[int, ...]
    window: int
    bins: int
    runs: tuple[dict[str, Any], ...]
    text: dict[str, Any]
    table: str = ""
    sentence: str = ""

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def edges(self, length: int) -> np.ndarray:
        """Edges of the bins by position at a context length."""
        return position_bins(length, self.window, self.bins)

    def has_beyond(self) -> bool:
        """Whether any position lies beyond the window."""
        return self.longest > self.window

    def regions(self, length: int) -> dict[str, tuple[int, int]]:
        """Name -> (first position, stop) of the parts of a context that are reported."""
        regions = {"all": (0, length), "within_window": (0, min(length, self.window))}
        if length > self.window:
            regions["beyond_window"] = (self.window, length)
        return regions

    def pairs(self) -> Iterator[tuple[Series, Series]]:
        """(a, b) of every two series: a - b is to be reported, learning first."""
        for i, a in enumerate(self.series):
            for b in self.series[i + 1 :]:
                yield (b, a) if b.learns and not a.learns else (a, b)

    def main_pairs(self) -> list[tuple[Series, Series]]:
        """The pairs that answer a question.

        What learning changes in the same weights; and how each run at its first mode (learning,
        where it has fast weights) stands against the other runs.
        """
        first: dict[str, Series] = {}
        for series in self.series:
            first.setdefault(series.run, series)

        def matters(a: Series, b: Series) -> bool:
            return (a.learns and not b.learns) if a.run == b.run else a is first[a.run]

        return [(a, b) for a, b in self.pairs() if matters(a, b)]

    def context_change(self, series: Series) -> Estimate | None:
        """Loss at the longest context minus that at the shortest, of the same tokens.

        None if there is one length only, or the shortest does not divide the longest, so that they
        are not the same tokens.
        """
        short, long = min(self.lengths), self.longest
        if short == long or long % short:
            return None
        return (series.contexts[long].total() - series.contexts[short].total()).loss()
