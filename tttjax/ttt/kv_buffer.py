"""Keys and values of the sequential part for B sequences, in one buffer per sequence.

A window that is shifted at every chunk would have to be stored at every chunk for the backward
pass. Here each key is stored once, in a buffer as long as the sequence, and a chunk slices its
window from it. Recurrent states are stored per chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tttjax.models import SplitModel
from tttjax.types import Array, PyTree

ROWS = 2  # the axis of tokens in a buffer: [B, blocks, rows, ...]


class BufferState(NamedTuple):
    """Leaves of the state in order: `buffered` (window and full attention) or `recurrent`.

    A leaf of the other kind is None.
    """

    buffered: tuple[Array | None, ...]
    recurrent: tuple[Array | None, ...]


class KVBuffer:
    """Layout of the sequential part's state in buffers, and its cotangents. Holds no arrays."""

    def __init__(self, split: SplitModel, chunks: int, chunk_size: int, batch: int):
        shapes = jax.eval_shape(lambda: split.init_sequential(chunks * chunk_size))["blocks"]
        self.leaves, self.tree = jax.tree.flatten(shapes)
        self.kinds = tuple(jax.tree.leaves(split.sequential_cache_kinds()))
        self.chunks, self.chunk_size, self.batch = chunks, chunk_size, batch

    def start(self) -> BufferState:
        """The buffers before the first chunk: zeros."""

        def zeros(leaf, kind):
            shape = [self.batch, *leaf.shape]
            if kind == "window":
                shape[ROWS] += self.chunks * self.chunk_size
            return jnp.zeros(shape, leaf.dtype)

        return self._by_kind(list(map(zeros, self.leaves, self.kinds)))

    def _by_kind(self, leaves) -> BufferState:
        is_recurrent = [kind == "recurrent" for kind in self.kinds]
        return BufferState(
            tuple(None if c else x for x, c in zip(leaves, is_recurrent, strict=True)),
            tuple(x if c else None for x, c in zip(leaves, is_recurrent, strict=True)),
        )

    def state(self, buffers: BufferState, i: Array) -> PyTree:
        """The state before chunk i, as `SplitModel.run_sequential` takes it."""
        first = i * self.chunk_size

        def view(kind, leaf, buffered, recurrent):
            if kind == "window":
                return jax.lax.dynamic_slice_in_dim(buffered, first, leaf.shape[ROWS - 1], ROWS)
            return buffered if kind == "full" else recurrent

        views = [view(*row) for row in zip(self.kinds, self.leaves, *buffers, strict=True)]
        blocks = jax.tree.unflatten(self.tree, views)
        return {"position": first.astype(jnp.int32), "blocks": blocks}

    def append(self, buffers: BufferState, state: PyTree, i: Array) -> BufferState:
        """`buffers` with the rows of chunk i. state: after the chunk."""

        def one(kind, leaf, buffered, new):
            if kind != "window":
                return new
            rows = self._own_rows(new)
            start = leaf.shape[ROWS - 1] + i * self.chunk_size
            return jax.lax.dynamic_update_slice_in_dim(buffered, rows, start, ROWS)

        new = jax.tree.leaves(state["blocks"])
        rows = zip(self.kinds, self.leaves, buffers.buffered, new, strict=True)
        return self._by_kind([one(*row) for row in rows])

    def recurrent(self, state: PyTree) -> tuple[Array | None, ...]:
        """The recurrent leaves of a state after a chunk."""
        return self._by_kind(jax.tree.leaves(state["blocks"])).recurrent

    def _own_rows(self, window: Array) -> Array:
        """The rows of the last chunk in a window."""
        return jax.lax.slice_in_dim(window, -self.chunk_size, None, axis=ROWS)

    # --- cotangents: of the state after a chunk, windows of their own length -------------------

    def zero_cotangent(self) -> list[Array]:
        """The cotangent of the state after the last chunk: zeros, float32 at least."""
        return [
            jnp.zeros((self.batch, *leaf.shape), jnp.promote_types(leaf.dtype, jnp.float32))
            for leaf in self.leaves
        ]

    def pairing(self, state: PyTree, cotangent: list[Array]) -> Array:
        """<cotangent, state> over what the last chunk computed. state: after the chunk."""

        def one(kind, bar, new):
            if kind == "window":
                bar, new = self._own_rows(bar), self._own_rows(new)
            return jnp.vdot(bar, new.astype(bar.dtype))

        new = jax.tree.leaves(state["blocks"])
        return sum(map(one, self.kinds, cotangent, new), jnp.zeros(()))

    def cotangent_before(self, cotangent: list[Array], blocks_bar: PyTree) -> list[Array]:
        """The cotangent of the state before a chunk.

        It is that of the state after it, shifted back by one chunk, plus `blocks_bar`, the chunk's
        own gradient.
        """

        def one(kind, after, bar):
            bar = bar.astype(after.dtype)
            if kind != "window":
                return bar
            rolled = jnp.roll(after, self.chunk_size, ROWS)  # the chunk's own rows come first
            is_older = jnp.arange(after.shape[ROWS]) >= self.chunk_size
            shape = (-1,) + (1,) * (after.ndim - ROWS - 1)
            return bar + jnp.where(is_older.reshape(shape), rolled, 0)

        return list(map(one, self.kinds, cotangent, jax.tree.leaves(blocks_bar)))
