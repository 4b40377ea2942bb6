"""What the upper half of a model keeps of its past, for B sequences read chunk by chunk.

A window of keys and values, rolled on at every chunk, would have to be stored at every chunk for
the backward pass. Here each lies once, in a buffer as long as the sequence, from which a chunk
takes its window by place. What has no rows, a recurrent state, is carried and stored per chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tttjax.models import SplitModel
from tttjax.types import Array, PyTree

ROWS = 2  # the axis of a buffer along which tokens lie: [B, blocks, rows, ...]


class BufferState(NamedTuple):
    """Leaves of the state in order: `kept` by place (windows, whole pasts), `carried` otherwise.

    A leaf that belongs to the other list is None.
    """

    kept: tuple[Array | None, ...]
    carried: tuple[Array | None, ...]


class KVBuffer:
    """How the leaves of the upper half's state are kept, and views of them. Holds no arrays."""

    def __init__(self, cut: SplitModel, chunks: int, chunk_size: int, batch: int):
        shapes = jax.eval_shape(lambda: cut.init_state(chunks * chunk_size))["blocks"]
        self.leaves, self.tree = jax.tree.flatten(shapes)
        self.kinds = tuple(jax.tree.leaves(cut.keeps()))
        self.chunks, self.chunk_size, self.batch = chunks, chunk_size, batch

    def start(self) -> BufferState:
        """Nothing has been read: zeros."""

        def zeros(leaf, kind):
            shape = [self.batch, *leaf.shape]
            if kind == "window":
                shape[ROWS] += self.chunks * self.chunk_size
            return jnp.zeros(shape, leaf.dtype)

        return self._divide(list(map(zeros, self.leaves, self.kinds)))

    def _divide(self, leaves) -> BufferState:
        is_carried = [kind == "carried" for kind in self.kinds]
        return BufferState(
            tuple(None if c else x for x, c in zip(leaves, is_carried, strict=True)),
            tuple(x if c else None for x, c in zip(leaves, is_carried, strict=True)),
        )

    def state(self, past: BufferState, i: Array) -> PyTree:
        """The state before chunk i, as `SplitModel.run` takes it."""
        first = i * self.chunk_size

        def view(kind, leaf, kept, carried):
            if kind == "window":
                return jax.lax.dynamic_slice_in_dim(kept, first, leaf.shape[ROWS - 1], ROWS)
            return kept if kind == "whole" else carried

        views = [view(*row) for row in zip(self.kinds, self.leaves, *past, strict=True)]
        blocks = jax.tree.unflatten(self.tree, views)
        return {"position": first.astype(jnp.int32), "blocks": blocks}

    def write(self, past: BufferState, state: PyTree, i: Array) -> BufferState:
        """`past` with what chunk i added; state: that after the chunk."""

        def one(kind, leaf, kept, new):
            if kind != "window":
                return new
            rows = self._own_rows(new)
            start = leaf.shape[ROWS - 1] + i * self.chunk_size
            return jax.lax.dynamic_update_slice_in_dim(kept, rows, start, ROWS)

        new = jax.tree.leaves(state["blocks"])
        rows = zip(self.kinds, self.leaves, past.kept, new, strict=True)
        return self._divide([one(*row) for row in rows])

    def carried(self, state: PyTree) -> tuple[Array | None, ...]:
        """Of a state after a chunk, what has no rows."""
        return self._divide(jax.tree.leaves(state["blocks"])).carried

    def _own_rows(self, window: Array) -> Array:
        """The rows that the last chunk added to a window."""
        return jax.lax.slice_in_dim(window, -self.chunk_size, None, axis=ROWS)

    # --- cotangents: of the state after a chunk, a window's as long as that ---------------------

    def zero_cotangent(self) -> list[Array]:
        """Of the state after the last chunk, which nothing depends on; float32 at least."""
        return [
            jnp.zeros((self.batch, *leaf.shape), jnp.promote_types(leaf.dtype, jnp.float32))
            for leaf in self.leaves
        ]

    def pairing(self, state: PyTree, cotangent: list[Array]) -> Array:
        """<cotangent, state> of what the last chunk made. state: that after the chunk."""

        def one(kind, bar, new):
            if kind == "window":
                bar, new = self._own_rows(bar), self._own_rows(new)
            return jnp.vdot(bar, new.astype(bar.dtype))

        new = jax.tree.leaves(state["blocks"])
        return sum(map(one, self.kinds, cotangent, new), jnp.zeros(()))

    def before(self, cotangent: list[Array], blocks_bar: PyTree) -> list[Array]:
        """The cotangent before a chunk, from that after it and that of the state it read."""

        def one(kind, after, bar):
            bar = bar.astype(after.dtype)
            if kind != "window":
                return bar
            rolled = jnp.roll(after, self.chunk_size, ROWS)  # the chunk's own rows come first
            is_older = jnp.arange(after.shape[ROWS]) >= self.chunk_size
            shape = (-1,) + (1,) * (after.ndim - ROWS - 1)
            return bar + jnp.where(is_older.reshape(shape), rolled, 0)

        return list(map(one, self.kinds, cotangent, jax.tree.leaves(blocks_bar)))
