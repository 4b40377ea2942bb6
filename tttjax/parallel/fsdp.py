"""Fully sharded parameters (FSDP): all-gathered where they are used, gradients reduce-scattered.

Inside shard_map a device holds its shard of a parameter. `all_gather_params` returns the full one,
and its VJP reduce-scatters the gradient. Called inside the scan over layers, it keeps the
parameters of only one layer gathered at a time.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from tttjax.types import Array, PyTree


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["shard"],
    meta_fields=["axis", "from_end", "dtype"],
)
@dataclass(frozen=True)
class ShardedParam:
    """This device's shard of a weight, or of a stack of weights.

    axis: mesh axis. from_end: the sharded dimension, negative, hence the same for one
    weight of a stack. dtype: that of the full weight; None: the shard's.
    """

    shard: Array
    axis: str
    from_end: int
    dtype: jnp.dtype | None = None


def is_sharded(leaf: PyTree) -> bool:
    return isinstance(leaf, ShardedParam)


def all_gather_params(tree: PyTree) -> PyTree:
    """All-gathers every `ShardedParam` over its axis. Other leaves are unchanged.

    The VJP reduce-scatters the gradient over the axis, in the shard's dtype.
    """

    def gather(leaf):
        if not is_sharded(leaf):
            return leaf
        dimension = leaf.shard.ndim + leaf.from_end
        return _gather(leaf.axis, dimension, leaf.dtype or leaf.shard.dtype, leaf.shard)

    return jax.tree.map(gather, tree, is_leaf=is_sharded)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gather(axis: str, dimension: int, dtype: jnp.dtype, shard: Array) -> Array:
    return jax.lax.all_gather(shard.astype(dtype), axis, axis=dimension, tiled=True)


def _gather_forward(axis: str, dimension: int, dtype: jnp.dtype, shard: Array):
    return _gather(axis, dimension, dtype, shard), jnp.zeros((), shard.dtype)


def _gather_backward(axis: str, dimension: int, dtype: jnp.dtype, like: Array, bar: Array):
    del dtype
    bar = bar.astype(like.dtype)
    return (jax.lax.psum_scatter(bar, axis, scatter_dimension=dimension, tiled=True),)


_gather.defvjp(_gather_forward, _gather_backward)
