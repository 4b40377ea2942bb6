"""Results of an evaluation: losses by document, for every run, mode and context length."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from tttjax.evaluation.statistics import (
    UNKNOWN,
    Estimate,
    Sums,
    contrast,
    difference,
    position_bins,
)


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
    table, sentence: the results as text, from `summary`.
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
        return difference([series.contexts[long]], [series.contexts[short]])

    def difference(self, a: Series, b: Series, region: tuple[int, int]) -> Estimate:
        """a - b at the longest context in positions (first, stop), token by token."""
        parts = (series.contexts[self.longest].between(*region) for series in (a, b))
        return difference(*([part] for part in parts))


# Tidy rows ---------------------------------------------------------------------------------------


def by_context(comparison: Comparison) -> pd.DataFrame:
    """The rows of by_context.csv, with the first and last token of each region."""
    return _of_series(comparison, partial(_regions, comparison))


def by_position(comparison: Comparison) -> pd.DataFrame:
    """The rows of by_position.csv: bins of positions."""
    return _of_series(
        comparison, lambda length, *terms: _rows(comparison.edges(length), *terms)
    ).drop(columns="targets")


def by_document(comparison: Comparison) -> pd.DataFrame:
    """The rows of by_document.csv: sums of every document, so that files of runs can be compared.

    Bins are those of `by_position`, cut at the end of the window and at the last quarter.
    """

    def rows(length: int, term: tuple[int, Sums]) -> pd.DataFrame:
        cuts = [edge for region in comparison.regions(length).values() for edge in region]
        edges = np.union1d(comparison.edges(length), [*cuts, length - length // 4])
        sums = term[1].binned(edges)
        documents, bins = sums.loss_DL.shape
        bytes_DL = np.full_like(sums.loss_DL, np.nan) if sums.bytes_DL is None else sums.bytes_DL
        return pd.DataFrame(
            {
                "document": np.repeat(np.arange(documents), bins),
                "first_token": np.tile(edges[:-1] + 1, documents),
                "last_token": np.tile(edges[1:], documents),
                "targets": sums.count_DL.ravel(),
                "nats": sums.loss_DL.ravel(),
                "bytes": bytes_DL.ravel(),
            }
        )

    return _of_series(comparison, rows)


def differences(
    comparison: Comparison, a: Series, b: Series, length: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(regions, bins) of a - b at a context length, as of `by_context` and `by_position`."""
    terms = (1, a.contexts[length]), (-1, b.contexts[length])
    return _regions(comparison, length, *terms), _rows(comparison.edges(length), *terms)


def _of_series(comparison: Comparison, rows: Callable[..., pd.DataFrame]) -> pd.DataFrame:
    parts = []
    for series in comparison.series:
        for length, sums in series.contexts.items():
            part = rows(length, (1, sums))
            names = {"run": series.run, "mode": series.mode, "label": series.label}
            head = pd.DataFrame({**names, "context": length}, index=part.index)
            parts.append(pd.concat([head, part], axis=1))
    return pd.concat(parts, ignore_index=True)


def _regions(comparison: Comparison, length: int, *terms: tuple[int, Sums]) -> pd.DataFrame:
    """One row per region of a context; `tokens` names it."""
    parts = [
        _rows(region, *terms).assign(tokens=name)
        for name, region in comparison.regions(length).items()
    ]
    return pd.concat(parts, ignore_index=True)


def _rows(edges: Sequence[int] | np.ndarray, *terms: tuple[int, Sums]) -> pd.DataFrame:
    """Loss and bits per byte of a signed sum of losses, one row per bin of positions."""
    binned = [(sign, sums.binned(edges)) for sign, sums in terms]
    nats = contrast(*((sign, [sums]) for sign, sums in binned))
    weighted = [(sign, [per_byte]) for sign, sums in binned if (per_byte := sums.per_byte())]
    bits = contrast(*weighted) if len(weighted) == len(terms) else Estimate(UNKNOWN, UNKNOWN)
    return pd.DataFrame(
        {
            "first_token": np.asarray(edges[:-1]) + 1,
            "last_token": np.asarray(edges[1:]),
            "targets": binned[0][1].count_DL.sum(axis=0).astype(int),
            "loss": nats.mean,
            "stderr": nats.stderr,
            "bits_per_byte": bits.mean,
            "bits_per_byte_stderr": bits.stderr,
        }
    )
