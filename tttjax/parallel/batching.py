"""From one sequence to a batch of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tttjax.types import Array, PyTree


def over_sequences(fn: Callable, in_axes: Any = 0, out_axes: Any = 0) -> Callable:
    """`jax.vmap(fn, in_axes, out_axes)`, but a batch of one sequence runs as fn itself.

    Axes are counted from the first; None: the same for all.
    On a CPU, XLA's sums over an inner axis are many times slower where an outer axis has length 1,
    and one sequence on each device at a time is what most training has.
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
    """`jnp.expand_dims`, of which the derivative is a sum, as a reshape in both directions."""
    return jnp.reshape(x, (*jnp.shape(x)[:axis], 1, *jnp.shape(x)[axis:]))


def _map_axes(axes: Any, tree: PyTree, fn: Callable[[Array, int], Any]) -> PyTree:
    """The tree with every array that has an axis changed; axes: a prefix of it, as for vmap."""

    def part(axis: int | None, arrays: PyTree) -> PyTree:
        return arrays if axis is None else jax.tree.map(lambda x: fn(x, axis), arrays)

    return jax.tree.map(part, axes, tree, is_leaf=lambda axis: axis is None)
