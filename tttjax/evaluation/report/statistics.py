"""Standard errors over documents and over seeds, from the sums by document of `evaluate`. NumPy.

A system may have several runs that differ in their seed alone. Its loss is the mean over them; two
things would make it come out differently another time:

    documents  another draw of held-out documents. The seeds' losses of a document are averaged
               first, and the error is that of `evaluate.statistics`. For a difference of two
               systems the documents are paired, which cancels what makes documents differ.
    seeds      another draw of seeds: s / sqrt(R) for R seeds with standard deviation s of their
               losses. In a difference of two systems with equally many runs these are paired in
               their order, which cancels what the same seed, data or pretraining have in common;
               with other numbers of runs the squares are added.

The error of both together is the root of the sum of their squares. One run has no error over
seeds, one document none over documents: NaN, and the other one is all that is known.
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
        """Of both together; NaN where neither is known."""
        squares = np.square(np.stack([self.documents, self.seeds]))
        known = np.isfinite(squares)
        total = np.sqrt(np.where(known, squares, 0).sum(axis=0))
        return np.where(known.any(axis=0), total, np.nan)

    @property
    def estimate(self) -> Estimate:
        return Estimate(self.mean, self.stderr)

    def is_clear(self) -> bool:
        """Whether the mean is more than two standard errors from zero; False if none is known."""
        return self.estimate.is_clear()


def mean_of(seeds: Sequence[Sums]) -> Sums:
    """The seeds' losses of every document and position, averaged. ValueError: other tokens."""
    first = seeds[0]
    if not all(np.array_equal(first.count_DL, other.count_DL) for other in seeds[1:]):
        raise ValueError("runs of one system were read on different tokens")
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
    """Of a - b in each bin, documents paired. ValueError unless both are of the same tokens."""
    a, b = ([sums.binned(edges) for sums in side] for side in (a, b))
    mean, documents = (mean_of(a) - mean_of(b)).loss_by_position()
    return Value(mean, documents, _over_seeds_of_difference(a, b))


def loss(seeds: Sequence[Sums]) -> Value:
    """Nats per token over all positions."""
    return _only(by_position(seeds, [0, seeds[0].loss_DL.shape[1]]))


def difference(a: Sequence[Sums], b: Sequence[Sums]) -> Value:
    """Of a - b over all positions."""
    return _only(difference_by_position(a, b, [0, a[0].loss_DL.shape[1]]))


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
    """(a - b) at a long context minus (a - b) at a short one, documents paired throughout.

    None where the two contexts were not read on the same tokens. The same number of runs at both
    contexts are taken for the same seeds in the same order.
    """
    (a, b), (c, d) = ([[s.total() for s in side] for side in pair] for pair in (long, short))
    try:
        change = (mean_of(a) - mean_of(b)) - (mean_of(c) - mean_of(d))
    except ValueError:
        return None
    mean, documents = change.loss()
    if len({len(side) for side in (a, b, c, d)}) == 1:
        seeds = _stderr(_means(a) - _means(b) - _means(c) + _means(d))
    else:
        seeds = _add_errors(*(_over_seeds_of_difference(*pair) for pair in ((a, c), (b, d))))
    return Value(mean, documents, seeds[0])


def _over_seeds_of_difference(a: Sequence[Sums], b: Sequence[Sums]) -> np.ndarray:
    if len(a) == len(b):
        return _stderr(_means(a) - _means(b))
    return _add_errors(_over_seeds(a), _over_seeds(b))


def _only(value: Value) -> Value:
    return Value(value.mean[0], value.documents[0], value.seeds[0])


def _means(seeds: Sequence[Sums]) -> np.ndarray:
    """The mean loss of every seed, [R, L]."""
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
    """The root of the sum of squares; what is not known counts as nothing, unless neither is."""
    return Value(np.zeros_like(a), np.asarray(a), np.asarray(b)).stderr
