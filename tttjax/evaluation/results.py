"""Results of an evaluation: losses by document, for every run, mode and context length."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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

IDS = ["run", "mode", "label", "context", "tokens"]  # first columns of tidy rows
LOSSES = ["loss", "stderr", "bits_per_byte", "bits_per_byte_stderr"]


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


Pairs = Sequence[tuple[Series, Series]]


def by_context(comparison: Comparison, pairs: Pairs | None = None) -> pd.DataFrame:
    """One row per series, context length and region of the context (`tokens`).

    pairs: differences a - b of these instead; then `label` is `A - B`, and run and mode are a's.
    """
    return _rows(comparison, pairs, comparison.regions)


def by_position(comparison: Comparison, pairs: Pairs | None = None) -> pd.DataFrame:
    """One row per series (or pair), context length and bin of positions."""
    return _rows(comparison, pairs, lambda length: {"bins": comparison.edges(length)})


def by_document(comparison: Comparison) -> pd.DataFrame:
    """Sums of every document, so that files of two runs can be compared token by token.

    Bins are those of `by_position`, cut at the end of the window and at the last quarter.
    """
    parts = []
    for series in comparison.series:
        for length, sums in series.contexts.items():
            cuts = [edge for region in comparison.regions(length).values() for edge in region]
            edges = np.union1d(comparison.edges(length), [*cuts, length - length // 4])
            binned = sums.binned(edges)
            documents, bins = binned.loss_DL.shape
            part = {
                "document": np.repeat(np.arange(documents), bins),
                "first_token": np.tile(edges[:-1] + 1, documents),
                "last_token": np.tile(edges[1:], documents),
                "targets": binned.count_DL.ravel(),
                "nats": binned.loss_DL.ravel(),
                "bytes": np.nan if binned.bytes_DL is None else binned.bytes_DL.ravel(),
            }
            ids = dict(zip(IDS, (series.run, series.mode, series.label, length), strict=False))
            parts.append(pd.DataFrame({**ids, **part}))
    return pd.concat(parts, ignore_index=True)


def pair_label(a: Series, b: Series) -> str:
    """The label of a - b."""
    return f"{a.label} - {b.label}"


def _rows(
    comparison: Comparison,
    pairs: Pairs | None,
    edges_at: Callable[[int], Mapping[str, Sequence[int] | np.ndarray]],
) -> pd.DataFrame:
    """Loss and bits per byte; edges_at: context length -> `tokens` -> edges of bins."""
    if pairs is None:
        named = [((s.run, s.mode, s.label), [(1, s)]) for s in comparison.series]
    else:
        named = [((a.run, a.mode, pair_label(a, b)), [(1, a), (-1, b)]) for a, b in pairs]
    parts = []
    for names, signed in named:
        for length in comparison.lengths:
            terms = [(sign, series.contexts[length]) for sign, series in signed]
            for tokens, edges in edges_at(length).items():
                ids = dict(zip(IDS, (*names, length, tokens), strict=True))
                parts.append(pd.DataFrame({**ids, **_bins(edges, terms)}))
    return pd.concat(parts, ignore_index=True)


def _bins(
    edges: Sequence[int] | np.ndarray, terms: Sequence[tuple[int, Sums]]
) -> dict[str, np.ndarray]:
    """Columns of a signed sum of losses, one value per bin."""
    binned = [(sign, sums.binned(edges)) for sign, sums in terms]
    nats = contrast(*((sign, [sums]) for sign, sums in binned))
    weighted = [(sign, [per_byte]) for sign, sums in binned if (per_byte := sums.per_byte())]
    bits = contrast(*weighted) if len(weighted) == len(terms) else Estimate(UNKNOWN, UNKNOWN)
    return {
        "first_token": np.asarray(edges[:-1]) + 1,
        "last_token": np.asarray(edges[1:]),
        "targets": binned[0][1].count_DL.sum(axis=0).astype(int),
        "loss": nats.mean,
        "stderr": nats.stderr,
        "bits_per_byte": bits.mean,
        "bits_per_byte_stderr": bits.stderr,
    }
