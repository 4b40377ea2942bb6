"""Shared types, and the letters of array dimensions.

Array names carry their shape as a suffix of these letters (`x_BTD` is batch x tokens x embed):

    B  sequences of a batch        S  keys that a query may attend to
    T  tokens of a sequence        W  window of sliding-window attention (k in the papers)
    N  chunks (inner mini-batches) D  embedding (residual stream)
    C  tokens of one chunk (b)     H  attention heads
    L  layers of a stack           K  entries of one head
    F  hidden entries of an MLP    V  vocabulary
    G  heads of keys and values    R  query heads per key-value head, H / G

and in the recurrent mixers

    J  taps of a convolution       N  entries of Mamba-2's state
    G  groups of Mamba-2's heads   P  entries of one of its heads
"""

from typing import Any

import flax.struct
import jax

Array = jax.Array
PyTree = Any


@flax.struct.dataclass
class Params:
    """A model's weights, split into slow and fast: nested dicts of arrays with disjoint leaves.

    The outer optimizer updates both. `fast` (W0) holds the initial fast weights, which the inner
    loop copies for each sequence and updates; the inner loop does not change `slow` (theta).
    """

    slow: PyTree
    fast: PyTree


@flax.struct.dataclass
class Batch:
    """Sequences with their next-token targets.

    inputs: int [B, T]. targets: int [B, T], the token that follows each input.
    mask: bool [B, T], False where inner and outer loss ignore the target.
    weight: [B, T] or None, of the targets in the outer loss alone: bool as data have it, or float
    after `outer_loss.normalise_weights`; 0 where `mask` is False. None: the outer loss is the mean
    over chunks of their means.
    """

    inputs: Array
    targets: Array
    mask: Array
    weight: Array | None = None
