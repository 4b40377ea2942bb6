"""Means with standard errors: over documents, over seeds, and over rows of a DataFrame.

Tokens and sequences of one document are not independent, so the unit is the document: tokens are
summed per document, and a mean is the ratio of two sums over documents, sum_d S_d / sum_d W_d, with
the standard error of a ratio of cluster sums

    stderr = sqrt(n / (n - 1) * sum_d (S_d - mean W_d)^2) / sum_d W_d

With equal weights this is the usual standard error of n document means.

A system may have several runs that differ only in seed. Its loss is their mean, with two sources of
error:

    documents  the sample of held-out documents. Losses of a document are averaged over seeds. For a
               difference of two systems the documents are paired, which cancels variation between
               documents.
    seeds      the sample of seeds: s / sqrt(R) for R runs with standard deviation s of their
               losses. In a difference, systems with equal numbers of runs are paired in order,
               which cancels effects of a common seed, data or pretraining; otherwise the squares
               are added.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

LN2 = float(np.log(2))
UNKNOWN: Any = np.float64(np.nan)


@dataclass(frozen=True)
class Estimate:
    """A mean, or an array of means, with standard errors; NaN: unknown.

    documents: from the sample of documents, or of whatever the mean is over. seeds: from that of
    runs.
    """

    mean: np.ndarray
    documents: np.ndarray
    seeds: np.ndarray = UNKNOWN

    @property
    def stderr(self) -> np.ndarray:
        """Root of the sum of squares of the known errors; NaN if none is known."""
        return _root_of_squares(self.documents, self.seeds)

    def __getitem__(self, index: int) -> "Estimate":
        """One of an array of means."""
        parts = np.broadcast_arrays(self.mean, self.documents, self.seeds)
        return Estimate(*(part[index] for part in parts))

    def is_insignificant(self) -> bool:
        """Whether the mean is zero, or known to be within two standard errors of zero.

        False if the error is not known.
        """
        return bool(self.mean == 0 or abs(self.mean) <= 2 * self.stderr)


@dataclass(frozen=True)
class Sums:
    """Sums over the valid targets of D documents at each of L positions (tokens or bins).

    loss_DL: nats. count_DL: number of targets, or another weight. bytes_DL: UTF-8 bytes of the
    targets, None if the tokenizer does not know them.
    """

    loss_DL: np.ndarray
    count_DL: np.ndarray
    bytes_DL: np.ndarray | None = None

    def between(self, first: int, stop: int) -> "Sums":
        """Positions first, ..., stop - 1, summed into one."""
        return self.binned([first, stop])

    def binned(self, edges: Sequence[int] | np.ndarray) -> "Sums":
        """Bins: position i sums the positions edges[i], ..., edges[i+1] - 1."""

        def add(x_DL: np.ndarray) -> np.ndarray:
            covered_DL = x_DL[:, : edges[-1]]
            return np.add.reduceat(covered_DL, np.asarray(edges[:-1]), axis=1)

        bytes_DL = None if self.bytes_DL is None else add(self.bytes_DL)
        return Sums(add(self.loss_DL), add(self.count_DL), bytes_DL)

    def total(self) -> "Sums":
        """All positions, summed into one."""
        return self.between(0, self.loss_DL.shape[1])

    def per_byte(self) -> "Sums | None":
        """The same with bytes times ln 2 as weights, so that means are bits per byte."""
        return None if self.bytes_DL is None else Sums(self.loss_DL, self.bytes_DL * LN2)

    def loss(self) -> Estimate:
        """Nats per token over all positions."""
        return loss([self])

    def loss_by_position(self) -> Estimate:
        """Nats per token at every position, [L]."""
        return contrast((1, [self]))

    def bits_per_byte(self) -> Estimate | None:
        """Bits per byte over all positions; None if bytes are not known."""
        sums = self.per_byte()
        return None if sums is None else loss([sums])


# Losses of systems, one `Sums` for each seed ------------------------------------------------------


@dataclass(frozen=True)
class _Contrast:
    """A signed sum of means at L positions, before its errors are computed.

    residual_DL: contribution of every document to the error. of_runs: number of runs -> signed
    means [R, L] of the terms with that number, paired in order.
    """

    mean_L: np.ndarray
    residual_DL: np.ndarray
    documents_L: np.ndarray
    of_runs: dict[int, np.ndarray]

    def __sub__(self, other: "_Contrast") -> "_Contrast":
        return _Contrast(
            self.mean_L - other.mean_L,
            self.residual_DL - other.residual_DL,
            np.maximum(self.documents_L, other.documents_L),
            {runs: mean_RL - other.of_runs[runs] for runs, mean_RL in self.of_runs.items()},
        )

    def estimate(self) -> Estimate:
        n_L = self.documents_L
        with np.errstate(divide="ignore", invalid="ignore"):
            error_L = np.sqrt(n_L / (n_L - 1) * np.square(self.residual_DL).sum(axis=0))
        documents_L = np.where(n_L > 1, error_L, np.nan)
        return Estimate(
            self.mean_L, documents_L, _root_of_squares(*map(_error_of_mean, self.of_runs.values()))
        )


def _combine(*terms: tuple[int, Sequence[Sums]]) -> _Contrast:
    """Raises ValueError if two runs have different tokens."""
    weight_DL = terms[0][1][0].count_DL
    if not all(np.array_equal(weight_DL, sums.count_DL) for _, runs in terms for sums in runs):
        raise ValueError("a comparison needs the same tokens in all runs, but these are different")
    loss_DL = np.zeros(weight_DL.shape)
    of_runs: dict[int, np.ndarray] = {}
    total_L = weight_DL.sum(axis=0, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        for sign, runs in terms:
            loss_RDL = np.stack([sums.loss_DL for sums in runs])
            loss_DL = loss_DL + sign * loss_RDL.mean(axis=0)
            mean_RL = sign * loss_RDL.sum(axis=1, dtype=np.float64) / total_L
            of_runs[len(runs)] = of_runs.get(len(runs), 0) + mean_RL
        mean_L = loss_DL.sum(axis=0) / total_L
        residual_DL = (loss_DL - mean_L * weight_DL) / total_L
    return _Contrast(mean_L, residual_DL, (weight_DL > 0).sum(axis=0), of_runs)


def contrast(*terms: tuple[int, Sequence[Sums]]) -> Estimate:
    """The sum of sign times mean loss over (sign, runs) at every position, [L].

    Paired by document, and by seed among terms with equal numbers of runs. NaN where the weight is
    0. Raises ValueError for different tokens.
    """
    return _combine(*terms).estimate()


def by_position(runs: Sequence[Sums], edges: Sequence[int] | np.ndarray) -> Estimate:
    """Nats per token in each bin of positions edges[i], ..., edges[i+1] - 1."""
    return contrast((1, [sums.binned(edges) for sums in runs]))


def difference_by_position(
    a: Sequence[Sums], b: Sequence[Sums], edges: Sequence[int] | np.ndarray
) -> Estimate:
    """a - b in each bin, paired. Raises ValueError for different tokens."""
    binned = ([sums.binned(edges) for sums in runs] for runs in (a, b))
    return contrast(*zip((1, -1), binned, strict=True))


def loss(runs: Sequence[Sums]) -> Estimate:
    """Nats per token over all positions."""
    return contrast((1, [sums.total() for sums in runs]))[0]


def difference(a: Sequence[Sums], b: Sequence[Sums]) -> Estimate:
    """a - b over all positions, nats per token."""
    return contrast((1, [s.total() for s in a]), (-1, [s.total() for s in b]))[0]


def change_with_position(
    runs: Sequence[Sums], early: tuple[int, int], late: tuple[int, int]
) -> Estimate:
    """Loss at the late positions minus that at the early ones (first, stop) of the same documents.

    These are different tokens, so the error over documents is that of a difference of two ratios of
    sums.
    """
    parts = [_combine((1, [sums.between(*part) for sums in runs])) for part in (late, early)]
    return (parts[0] - parts[1]).estimate()[0]


def change_with_context(
    long: tuple[Sequence[Sums], Sequence[Sums]], short: tuple[Sequence[Sums], Sequence[Sums]]
) -> Estimate | None:
    """(a - b) at a long context minus (a - b) at a short one; None if the tokens differ."""
    totals = [[sums.total() for sums in runs] for runs in (*long, *short)]
    try:
        return contrast(*zip((1, -1, -1, 1), totals, strict=True))[0]
    except ValueError:
        return None


def _error_of_mean(value_RL: np.ndarray) -> np.ndarray:
    """Standard error of the mean over the first axis; NaN for fewer than two."""
    if len(value_RL) < 2:
        return np.full(value_RL.shape[1:], np.nan)
    return value_RL.std(axis=0, ddof=1) / np.sqrt(len(value_RL))


def _root_of_squares(*errors: np.ndarray) -> np.ndarray:
    """Of errors of one shape, or scalars; an unknown one counts as 0 unless all are unknown."""
    squares = np.square(np.stack(np.broadcast_arrays(*errors)))
    total = np.sqrt(np.nansum(squares, axis=0))
    return np.where(np.isnan(squares).all(axis=0), np.nan, total)


# Positions ---------------------------------------------------------------------------------------


def sum_by_document(x_NT: np.ndarray, document_N: np.ndarray, length: int) -> np.ndarray:
    """[N, T] -> float64 [D, length]: sums over a document's sequences and contexts.

    T is split into contexts of `length` tokens; position i of the result sums position i of each.
    """
    x_NPL = x_NT.reshape(len(x_NT), -1, length)
    x_NL = x_NPL.sum(axis=1, dtype=np.float64)
    order = np.argsort(document_N, kind="stable")
    _, starts = np.unique(document_N[order], return_index=True)
    return np.add.reduceat(x_NL[order], starts, axis=0)


def position_bins(length: int, window: int, bins: int) -> np.ndarray:
    """Edges of about `bins` bins over positions 0, ..., length: [0, ..., length], int.

    A quarter of the bins is inside the first window, where the loss falls fast, with geometrically
    growing widths. Beyond it bins have equal width and, if there are enough, end at window ends.
    """
    if bins == 1:
        return np.asarray([0, length])
    inside = min(window, length)
    head = bins if length <= window else max(1, bins // 4)
    edges = [0, *np.round(np.geomspace(1, inside, head))[:-1], inside]
    if length > window:
        per_window = (bins - head) // int(np.ceil((length - window) / window))
        if per_window:
            steps = np.arange(window, length, window / per_window)
        else:
            steps = np.linspace(window, length, bins - head + 1)
        edges += [*np.round(steps), length]
    return np.unique(np.asarray(edges, np.int64))


# Rows of a DataFrame -----------------------------------------------------------------------------


def average(frame: pd.DataFrame, by: Sequence[str], values: Sequence[str]) -> pd.DataFrame:
    """One row per group: its keys, `number` of rows, and for each value x its mean and x_stderr.

    Groups are sorted by key. The error is NaN for a single row.
    """
    groups = frame.groupby(list(by), observed=True)[list(values)]
    means, errors = groups.mean(), groups.sem().add_suffix("_stderr")
    pairs = [name for value in values for name in (value, f"{value}_stderr")]
    number = groups.size().rename("number")
    return pd.concat([number, pd.concat([means, errors], axis=1)[pairs]], axis=1).reset_index()


def subtract(
    a: pd.DataFrame, b: pd.DataFrame, on: Sequence[str], values: Sequence[str]
) -> pd.DataFrame:
    """a - b of the values, row by row, paired by the columns `on`; other columns are those of a.

    Raises ValueError if the rows of one have no counterpart in the other.
    """
    ours, theirs = (frame.set_index(list(on))[list(values)] for frame in (a, b))
    unique = ours.index.is_unique and theirs.index.is_unique
    if not unique or len(ours) != len(theirs) or not ours.index.isin(theirs.index).all():
        raise ValueError("a paired difference needs the same rows in both operands")
    change = ours - theirs.loc[ours.index]
    return a.assign(**{name: change[name].to_numpy() for name in values})


def wilson(correct, number):
    """The 95 % Wilson interval of proportions; wide for few samples, also at 0 and 1.

    Scalars or arrays; (low, high), NaN for no samples.
    """
    correct, number = np.asarray(correct, float), np.asarray(number, float)
    z = 1.959964
    with np.errstate(divide="ignore", invalid="ignore"):
        p, scale = correct / number, 1 + z * z / number
        middle = (p + z * z / (2 * number)) / scale
        half = z / scale * np.sqrt(p * (1 - p) / number + (z / (2 * number)) ** 2)
    return np.maximum(0.0, middle - half), np.minimum(1.0, middle + half)
