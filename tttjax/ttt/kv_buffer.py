"""The sequential part's state in training, of B sequences: one buffer per sequence.

A window that is shifted at every chunk would have to be stored at every chunk for the backward
pass. Here each key is stored once, in a buffer as long as the sequence, and a chunk slices its
window from it. Recurrent states are stored per chunk. The caches of the mixers (`models.caches`)
define these operations.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tttjax.models.caches import Cache
from tttjax.models.split_model import SplitModel
from tttjax.types import Array, PyTree


class BufferState(NamedTuple):
    """The states of all mixers, split by `Cache.is_buffered`: {} in the other field."""

    buffered: PyTree
    recurrent: PyTree


class KVBuffer:
    """Layout of the sequential part's state in buffers, and its cotangents. Holds no arrays."""

    def __init__(self, split: SplitModel, chunks: int, chunk_size: int, batch: int):
        self.caches = split.sequential_caches
        empty = jax.eval_shape(lambda: split.init_sequential(chunks * chunk_size))["blocks"]
        self.shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((batch, *x.shape), x.dtype), empty
        )
        self.chunks, self.chunk_size, self.batch = chunks, chunk_size, batch

    def start(self) -> BufferState:
        """The buffers before the first chunk: zeros."""
        tokens = self.chunks * self.chunk_size

        def zeros(cache: Cache, like: jax.ShapeDtypeStruct) -> Array:
            return jnp.zeros(cache.buffer_shape(like.shape, tokens), like.dtype)

        return self._split(self._map(zeros, self.shapes))

    def state(self, buffers: BufferState, i: Array) -> PyTree:
        """The state before chunk i, as `SplitModel.run_sequential` takes it."""
        position = i * self.chunk_size

        def view(cache: Cache, buffer: Array, like: jax.ShapeDtypeStruct) -> Array:
            return cache.view(buffer, like.shape, position)

        blocks = self._map(view, self._join(buffers), self.shapes)
        return {"position": position.astype(jnp.int32), "blocks": blocks}

    def append(self, buffers: BufferState, state: PyTree, i: Array) -> BufferState:
        """`buffers` with the rows of chunk i. state: after the chunk."""
        position = i * self.chunk_size

        def write(cache: Cache, buffer: Array, new: Array) -> Array:
            return cache.write(buffer, new, position, self.chunk_size)

        return self._split(self._map(write, self._join(buffers), state["blocks"]))

    def recurrent(self, state: PyTree) -> PyTree:
        """The recurrent states after a chunk."""
        return self._split(state["blocks"]).recurrent

    # --- cotangents: of the state after a chunk, windows of their own length -------------------

    def zero_cotangent(self) -> PyTree:
        """The cotangent of the state after the last chunk: zeros, float32 at least."""
        return jax.tree.map(
            lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), self.shapes
        )

    def pairing(self, state: PyTree, cotangent: PyTree) -> Array:
        """<cotangent, state> over what the last chunk computed. state: after the chunk."""

        def one(cache: Cache, bar: Array, new: Array) -> Array:
            bar, new = (cache.last_rows(x, self.chunk_size) for x in (bar, new))
            return jnp.vdot(bar, new.astype(bar.dtype))

        products = self._map(one, cotangent, state["blocks"])
        return sum(jax.tree.leaves(products), jnp.zeros(()))

    def cotangent_before(self, cotangent: PyTree, blocks_bar: PyTree) -> PyTree:
        """The cotangent of the state before a chunk.

        cotangent: of the state after it. blocks_bar: the chunk's own gradient.
        """

        def one(cache: Cache, after: Array, bar: Array) -> Array:
            return cache.cotangent_before(after, bar.astype(after.dtype), self.chunk_size)

        return self._map(one, cotangent, blocks_bar)

    def _map(self, f: Callable[..., Array], *blocks: PyTree) -> PyTree:
        """f(cache, array, ...) for every array of the state."""

        def of_mixer(cache: Cache, *states: PyTree) -> PyTree:
            return jax.tree.map(lambda *arrays: f(cache, *arrays), *states)

        return jax.tree.map(of_mixer, self.caches, *blocks)

    def _split(self, blocks: PyTree) -> BufferState:
        def where(is_buffered: bool) -> PyTree:
            return jax.tree.map(
                lambda cache, state: state if cache.is_buffered == is_buffered else {},
                self.caches,
                blocks,
            )

        return BufferState(buffered=where(True), recurrent=where(False))

    def _join(self, buffers: BufferState) -> PyTree:
        return jax.tree.map(lambda _, a, b: {**a, **b}, self.caches, *buffers)
