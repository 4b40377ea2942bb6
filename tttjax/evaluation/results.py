"""Results of an evaluation: losses by document, for every run, mode and context length."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tttjax.evaluation.statistics import Estimate, Sums, position_bins


@dataclass(frozen=True)
class Series:
    """Losses of one run in one mode.

    label: name in tables and plots. inner: rule, lr, clip and chunk size; None without TTT.
    contexts: context length -> sums by document and position. seconds: wall time, including
    compilation.
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
    """Losses of several series on the same held-out tokens.

    window: tokens after which "beyond the window" begins. bins: approximate number of position
    bins. runs: name, step, source and window of each run. text: source and size of the text.
    table, sentence: the results as text, from `tables`.
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
        """Edges of the position bins at a context length."""
        return position_bins(length, self.window, self.bins)

    def has_beyond(self) -> bool:
        """Whether any position is beyond the window."""
        return self.longest > self.window

    def regions(self, length: int) -> dict[str, tuple[int, int]]:
        """Name -> (first position, stop) of the reported parts of a context."""
        regions = {"all": (0, length), "within_window": (0, min(length, self.window))}
        if length > self.window:
            regions["beyond_window"] = (self.window, length)
        return regions

    def pairs(self) -> Iterator[tuple[Series, Series]]:
        """All pairs (a, b) to report as a - b; a series with TTT comes first."""
        for i, a in enumerate(self.series):
            for b in self.series[i + 1 :]:
                yield (b, a) if b.learns and not a.learns else (a, b)

    def main_pairs(self) -> list[tuple[Series, Series]]:
        """The pairs of the tables and plots.

        Within a run: TTT against no TTT. Between runs: the first mode of each run (TTT on, if it
        has fast weights) against the other runs.
        """
        first: dict[str, Series] = {}
        for series in self.series:
            first.setdefault(series.run, series)

        def matters(a: Series, b: Series) -> bool:
            return (a.learns and not b.learns) if a.run == b.run else a is first[a.run]

        return [(a, b) for a, b in self.pairs() if matters(a, b)]

    def context_change(self, series: Series) -> Estimate | None:
        """Loss at the longest context minus loss at the shortest, on the same tokens.

        None for a single length, or if the shortest does not divide the longest: then the tokens
        differ.
        """
        short, long = min(self.lengths), self.longest
        if short == long or long % short:
            return None
        return (series.contexts[long].total() - series.contexts[short].total()).loss()
