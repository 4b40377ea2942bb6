"""Means with standard errors over documents, from token losses. NumPy only.

Tokens and sequences of one document are not independent, so the unit is the document: tokens are
summed per document, and a mean is the ratio of two sums over documents, sum_d S_d / sum_d W_d, with
the standard error of a ratio of cluster sums

    stderr = sqrt(n / (n - 1) * sum_d (S_d - mean W_d)^2) / sum_d W_d

With equal weights this is the usual standard error of n document means.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LN2 = float(np.log(2))


class Estimate(NamedTuple):
    """A mean over documents, or an array of means; stderr is NaN for fewer than two documents."""

    mean: np.ndarray
    stderr: np.ndarray

    def is_significant(self) -> bool:
        """Whether the mean is more than two standard errors from zero."""
        return bool(abs(self.mean) > 2 * self.stderr)


def ratio_of_sums(sum_D: np.ndarray, weight_D: np.ndarray) -> Estimate:
    """The ratio of the sums over the first axis (documents); NaN where the weight is 0."""
    total = weight_D.sum(axis=0, dtype=np.float64)
    documents = (weight_D > 0).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = sum_D.sum(axis=0, dtype=np.float64) / total
        square = np.square(sum_D - mean * weight_D).sum(axis=0)
        stderr = np.sqrt(documents / (documents - 1) * square) / total
    return Estimate(mean, np.where(documents > 1, stderr, np.nan))


@dataclass(frozen=True)
class Sums:
    """Sums over the valid targets of D documents at each of L positions (tokens or bins).

    loss_DL: nats. count_DL: number of targets. bytes_DL: UTF-8 bytes of the targets, None if the
    tokenizer does not know them.
    """

    loss_DL: np.ndarray
    count_DL: np.ndarray
    bytes_DL: np.ndarray | None

    def __sub__(self, other: "Sums") -> "Sums":
        """The paired difference, token by token. Raises ValueError for different tokens."""
        if not np.array_equal(self.count_DL, other.count_DL):
            raise ValueError("a paired difference needs the same tokens in both operands")
        return Sums(self.loss_DL - other.loss_DL, self.count_DL, self.bytes_DL)

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

    def loss_by_position(self) -> Estimate:
        """Nats per token at every position, [L]."""
        return ratio_of_sums(self.loss_DL, self.count_DL)

    def bits_by_position(self) -> Estimate | None:
        """Bits per byte at every position, [L]; None if bytes are not known."""
        if self.bytes_DL is None:
            return None
        return ratio_of_sums(self.loss_DL, self.bytes_DL * LN2)

    def loss(self) -> Estimate:
        """Nats per token over all positions."""
        mean, stderr = self.total().loss_by_position()
        return Estimate(mean[0], stderr[0])

    def bits_per_byte(self) -> Estimate | None:
        """Bits per byte over all positions; None if bytes are not known."""
        bits = self.total().bits_by_position()
        return None if bits is None else Estimate(bits.mean[0], bits.stderr[0])


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


def doubling_windows(length: int, window: int) -> list[int]:
    """Edges 0, k, 2k, 4k, ..., length: few columns that resolve what is beyond the window."""
    edges = [0]
    edge = window
    while edge < length:
        edges.append(edge)
        edge *= 2
    return [*edges, length]
