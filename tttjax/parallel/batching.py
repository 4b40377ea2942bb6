"""vmap over the sequences of a batch, with batch size 1 handled without a batch axis."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tttjax.types import Array, PyTree


def over_sequences(fn: Callable, in_axes: Any = 0, out_axes: Any = 0) -> Callable:
    """`jax.vmap(fn, in_axes, out_axes)`, but a batch of one sequence calls fn without a batch axis.

    Axes are nonnegative; None: not batched.
    On CPUs, XLA's reductions over an inner axis are many times slower with an outer axis of length
    1, and most training has one sequence per device at a time.
    """
    batched = jax.vmap(fn, in_axes, out_axes)

    def run(*arguments: Any) -> Any:
        sizes: set[int] = set()
        _map_axes(in_axes, arguments, lambda x, axis: sizes.add(x.shape[axis]))
        if sizes != {1}:
            return batched(*arguments)
        results = fn(*_map_axes(in_axes, arguments, jnp.squeeze))
        return _map_axes(out_axes, results, _with_axis)

    return run


def _with_axis(x: Array, axis: int) -> Array:
    """`jnp.expand_dims` as a reshape: the derivative is a reshape, not a sum."""
    return jnp.reshape(x, (*jnp.shape(x)[:axis], 1, *jnp.shape(x)[axis:]))


def _map_axes(axes: Any, tree: PyTree, fn: Callable[[Array, int], Any]) -> PyTree:
    """fn(array, axis) on every array with an axis; axes: a prefix of the tree, as for vmap."""

    def part(axis: int | None, arrays: PyTree) -> PyTree:
        return arrays if axis is None else jax.tree.map(lambda x: fn(x, axis), arrays)

    return jax.tree.map(part, axes, tree, is_leaf=lambda axis: axis is None)
