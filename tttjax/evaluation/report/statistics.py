"""Standard errors over documents and over seeds, from the sums by document of `evaluate`. NumPy.

A system may have several runs that differ only in seed. Its loss is their mean, with two sources of
error:

    documents  the sample of held-out documents. Losses of a document are averaged over seeds, then
               the error is that of `evaluation.statistics`. For a difference of two systems the
               documents are paired, which cancels variation between documents.
    seeds      the sample of seeds: s / sqrt(R) for R seeds with standard deviation s of their
               losses. In a difference of two systems with equal numbers of runs these are paired in
               order, which cancels effects of a common seed, data or pretraining; otherwise the
               squares are added.

The total error is the root of the sum of squares. A single run or document has no error over seeds
or documents (NaN); then the other error is the total.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tttjax.evaluation.statistics import Estimate, Sums, ratio_of_sums


@dataclass(frozen=True)
class Value:
    """A mean, or an array of them, with its two standard errors (NaN: not known)."""

    mean: np.ndarray
    documents: np.ndarray
    seeds: np.ndarray

    @property
    def stderr(self) -> np.ndarray:
        """Total error; NaN where neither is known."""
        squares = np.square(np.stack([self.documents, self.seeds]))
        known = np.isfinite(squares)
        total = np.sqrt(np.where(known, squares, 0).sum(axis=0))
        return np.where(known.any(axis=0), total, np.nan)

    @property
    def estimate(self) -> Estimate:
        return Estimate(self.mean, self.stderr)

    def is_significant(self) -> bool:
        """Whether the mean is more than two standard errors from zero; False if unknown."""
        return self.estimate.is_significant()


def mean_of(seeds: Sequence[Sums]) -> Sums:
    """Losses of every document and position, averaged over seeds.

    Raises ValueError for different tokens.
    """
    first = seeds[0]
    if not all(np.array_equal(first.count_DL, other.count_DL) for other in seeds[1:]):
        raise ValueError("runs of one system were evaluated on different tokens")
    loss_DL = np.mean([sums.loss_DL for sums in seeds], axis=0)
    return Sums(loss_DL, first.count_DL, first.bytes_DL)


def by_position(seeds: Sequence[Sums], edges: Sequence[int] | np.ndarray) -> Value:
    """Nats per token in each bin of positions edges[i], ..., edges[i+1] - 1."""
    binned = [sums.binned(edges) for sums in seeds]
    mean, documents = mean_of(binned).loss_by_position()
    return Value(mean, documents, _over_seeds(binned))


def difference_by_position(
    a: Sequence[Sums], b: Sequence[Sums], edges: Sequence[int] | np.ndarray
) -> Value:
    """a - b in each bin, paired by document. Raises ValueError for different tokens."""
    a, b = ([sums.binned(edges) for sums in seeds] for seeds in (a, b))
    mean, documents = (mean_of(a) - mean_of(b)).loss_by_position()
    return Value(mean, documents, _over_seeds_of_difference(a, b))


def loss(seeds: Sequence[Sums]) -> Value:
    """Nats per token over all positions."""
    return _single(by_position(seeds, [0, seeds[0].loss_DL.shape[1]]))


def difference(a: Sequence[Sums], b: Sequence[Sums]) -> Value:
    """a - b over all positions, nats per token."""
    return _single(difference_by_position(a, b, [0, a[0].loss_DL.shape[1]]))


def change_with_position(
    seeds: Sequence[Sums], early: tuple[int, int], late: tuple[int, int]
) -> Value:
    """Loss at the late positions minus that at the early ones (first, stop) of the same documents.

    The error over documents is that of a difference of two ratios of sums: document d contributes
    r_d = (S_d - m W_d) / sum W of the late positions minus that of the early ones.
    """
    parts = [[sums.between(*region) for sums in seeds] for region in (late, early)]
    means, residuals = [], []
    for part in parts:
        sums = mean_of(part)
        loss_D, count_D = sums.loss_DL[:, 0], sums.count_DL[:, 0]
        mean = ratio_of_sums(loss_D, count_D).mean
        means.append(mean)
        residuals.append((loss_D - mean * count_D) / count_D.sum(dtype=np.float64))
    residual_D = residuals[0] - residuals[1]
    n = len(residual_D)
    documents = np.sqrt(n / (n - 1) * np.square(residual_D).sum()) if n > 1 else np.nan
    of_seeds = [_means(part)[:, 0] for part in parts]
    return Value(means[0] - means[1], np.asarray(documents), _stderr(of_seeds[0] - of_seeds[1]))


def change_with_context(
    long: tuple[Sequence[Sums], Sequence[Sums]], short: tuple[Sequence[Sums], Sequence[Sums]]
) -> Value | None:
    """(a - b) at a long context minus (a - b) at a short one, paired by document.

    None if the contexts cover different tokens. Equal numbers of runs are paired in order, as the
    same seeds.
    """
    (a, b), (c, d) = ([[s.total() for s in runs] for runs in pair] for pair in (long, short))
    try:
        change = (mean_of(a) - mean_of(b)) - (mean_of(c) - mean_of(d))
    except ValueError:
        return None
    mean, documents = change.loss()
    if len({len(runs) for runs in (a, b, c, d)}) == 1:
        seed_errors = _stderr(_means(a) - _means(b) - _means(c) + _means(d))
    else:
        seed_errors = _add_errors(*(_over_seeds_of_difference(*pair) for pair in ((a, c), (b, d))))
    return Value(mean, documents, seed_errors[0])


def _over_seeds_of_difference(a: Sequence[Sums], b: Sequence[Sums]) -> np.ndarray:
    if len(a) == len(b):
        return _stderr(_means(a) - _means(b))
    return _add_errors(_over_seeds(a), _over_seeds(b))


def _single(value: Value) -> Value:
    return Value(value.mean[0], value.documents[0], value.seeds[0])


def _means(seeds: Sequence[Sums]) -> np.ndarray:
    """Mean loss of every seed, [R, L]."""
    return np.stack([sums.loss_by_position().mean for sums in seeds])


def _over_seeds(seeds: Sequence[Sums]) -> np.ndarray:
    return _stderr(_means(seeds))


def _stderr(value_R: np.ndarray) -> np.ndarray:
    """Standard error of the mean over the first axis; NaN for fewer than two."""
    count = len(value_R)
    if count < 2:
        return np.full(value_R.shape[1:], np.nan)
    return value_R.std(axis=0, ddof=1) / np.sqrt(count)


def _add_errors(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Root of the sum of squares; an unknown error counts as 0, unless both are unknown."""
    return Value(np.zeros_like(a), np.asarray(a), np.asarray(b)).stderr
