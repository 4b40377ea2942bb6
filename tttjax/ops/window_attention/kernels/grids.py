"""The two Pallas grids: over blocks of queries, summing over keys, and the reverse.

There is one program per head and block, which loops over the overlapping blocks of the other kind
and skips blocks outside the window or before the sequence. Arrays are [N, rows, tokens], padded to
whole blocks: the chunk's at the end, buffered ones at the start, so that positions are relative to
the chunk's first query in both.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from tttjax.ops.window_attention.kernels.blocks import Keys, Rows, accum_dtype
from tttjax.ops.window_attention.kernels.platforms import ZERO, call_options, position_spec
from tttjax.ops.window_attention.tiles import (
    ChunkGeometry,
    attending_query_stop,
    first_attended_key,
)
from tttjax.types import Array, PyTree


class KernelGrid(NamedTuple):
    """Static parameters of both grids.

    geometry: its tiling's `query` divides the padded chunk. num_buffered: without padding.
    platform: the target. head_bytes: head size in bytes.
    """

    geometry: ChunkGeometry
    num_buffered: int
    platform: str
    head_bytes: int


class KVBlocks(NamedTuple):
    """Buffered or chunk keys, [N, K, S]. first: position of the first key. size: keys per block, a
    divisor of S."""

    first: int
    size: int
    keys: Keys


def call_query_grid(
    grid: KernelGrid,
    rows: Rows,
    kv_blocks: tuple[KVBlocks, ...],
    outs: tuple[jax.ShapeDtypeStruct, ...],
    start: Callable[[Rows], PyTree],
    step: Callable[[PyTree, Rows, Keys, Array], PyTree],
    finish: Callable[[PyTree], tuple[Array, ...]],
) -> list[Array]:
    """Results per query, of the shapes `outs`.

    carry = start(rows of a block); carry = step(carry, rows, keys, mask) for blocks of keys, with
    mask [S, Q]; finish(carry) is written to the block of each result.
    """
    count, _, length = rows[0].shape
    size = grid.geometry.tiling.query

    def kernel(
        position_ref: jax.Ref,
        rows_refs: tuple[jax.Ref, ...],
        keys_refs: tuple[Keys, ...],
        *out_refs: jax.Ref,
    ) -> None:
        geometry = grid.geometry._replace(position=position_ref[0])
        first = pl.program_id(1) * size
        queries = tuple(ref[...] for ref in rows_refs)
        low, carry = _first_attended_key(geometry, grid.num_buffered, first), start(queries)
        for kv_block, refs in zip(kv_blocks, keys_refs, strict=True):

            def visit_tile(
                n: Array, carry: PyTree, kv_block: KVBlocks = kv_block, refs: Keys = refs
            ) -> PyTree:
                cols = pl.ds(pl.multiple_of(n * kv_block.size, kv_block.size), kv_block.size)
                keys = jax.tree.map(lambda ref: ref[:, cols], refs)
                mask = _tile_mask(
                    geometry,
                    grid.num_buffered,
                    first,
                    size,
                    kv_block.first + n * kv_block.size,
                    kv_block.size,
                )
                return step(carry, queries, keys, mask)

            stop = jnp.minimum(first + size - kv_block.first, kv_block.keys.k.shape[-1])
            bounds = _block_range(low - kv_block.first, stop, kv_block.size)
            carry = lax.fori_loop(*bounds, visit_tile, carry)
        for ref, result in zip(out_refs, finish(carry), strict=True):
            ref[...] = result.astype(ref.dtype)

    block = partial(_token_block, size=size)
    arrays = rows, tuple(kv_block.keys for kv_block in kv_blocks)
    return pl.pallas_call(
        kernel,
        grid=(count, length // size),
        in_specs=(
            position_spec(grid.platform),
            jax.tree.map(block, rows),
            jax.tree.map(_all_tokens, arrays[1]),
        ),
        out_specs=tuple(map(block, outs)),
        out_shape=outs,
        **call_options(grid.platform, grid.head_bytes),
    )(_scalar(grid.geometry.position), *arrays)


def call_key_grid(
    grid: KernelGrid,
    rows: Rows,
    kv_block: KVBlocks,
    outs: int,
    step: Callable[[Rows, Keys, Array], tuple[Array, ...]],
) -> list[Array]:
    """`outs` sums over queries for each key, [N, K, S].

    step(rows of a block, keys of a block, mask) -> terms of the sums, each [K, S].
    """
    count, head_size, length = kv_block.keys.k.shape
    size, stride = kv_block.size, grid.geometry.tiling.query

    def kernel(
        position_ref: jax.Ref, rows_refs: tuple[jax.Ref, ...], keys_refs: Keys, *out_refs: jax.Ref
    ) -> None:
        geometry = grid.geometry._replace(position=position_ref[0])
        keys = jax.tree.map(lambda ref: ref[...], keys_refs)
        first = kv_block.first + pl.program_id(1) * size
        last = first + size - 1
        stop = jnp.minimum(attending_query_stop(geometry, last), geometry.length)
        stop = jnp.where(last < _first_attended_key(geometry, grid.num_buffered, 0), 0, stop)

        def visit_tile(n: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            cols = pl.ds(pl.multiple_of(n * stride, stride), stride)
            queries = tuple(ref[:, cols] for ref in rows_refs)
            mask = _tile_mask(geometry, grid.num_buffered, n * stride, stride, first, size)
            return tuple(x + part for x, part in zip(sums, step(queries, keys, mask), strict=True))

        zeros = jnp.zeros((head_size, size), accum_dtype(keys.k))
        sums = lax.fori_loop(*_block_range(first, stop, stride), visit_tile, (zeros,) * outs)
        for ref, result in zip(out_refs, sums, strict=True):
            ref[...] = result.astype(ref.dtype)

    block = partial(_token_block, size=size)
    out_shape = (jax.ShapeDtypeStruct(kv_block.keys.k.shape, kv_block.keys.k.dtype),) * outs
    return pl.pallas_call(
        kernel,
        grid=(count, length // size),
        in_specs=(
            position_spec(grid.platform),
            jax.tree.map(_all_tokens, rows),
            jax.tree.map(block, kv_block.keys),
        ),
        out_specs=tuple(map(block, out_shape)),
        out_shape=out_shape,
        **call_options(grid.platform, grid.head_bytes),
    )(_scalar(grid.geometry.position), rows, kv_block.keys)


def _token_block(x: Array | jax.ShapeDtypeStruct, size: int) -> pl.BlockSpec:
    """The program's block of tokens of its head."""
    return pl.BlockSpec((None, x.shape[1], size), lambda n, i: (n, ZERO, i))


def _all_tokens(x: Array) -> pl.BlockSpec:
    """All tokens of the program's head."""
    return pl.BlockSpec((None, *x.shape[1:]), lambda n, i: (n, ZERO, ZERO))


def _scalar(position: Array | int) -> Array:
    return jnp.asarray(position, jnp.int32).reshape(1)


def _block_range(low: Array, high: Array, size: int) -> tuple[Array, Array]:
    """Loop bounds over the blocks of `size` that overlap [low, high); empty if there are none."""
    low, high = (jnp.maximum(jnp.asarray(x, jnp.int32), 0) for x in (low, high))
    stop = lax.div(high + jnp.int32(size - 1), jnp.int32(size))
    return jnp.minimum(lax.div(low, jnp.int32(size)), stop), stop


def _first_attended_key(geometry: ChunkGeometry, num_buffered: int, query: Array | int) -> Array:
    """Position of the first existing key that `query` (or any after it) attends to."""
    return jnp.maximum(first_attended_key(geometry, query), jnp.int32(-num_buffered))


def _tile_mask(
    geometry: ChunkGeometry, num_buffered: int, query: Array, queries: int, key: Array, keys: int
) -> Array:
    """bool [S, Q]: attention mask of the blocks that start at `query` and `key`."""
    query_1Q = query + lax.broadcasted_iota(jnp.int32, (1, queries), 1)
    key_S1 = key + lax.broadcasted_iota(jnp.int32, (keys, 1), 0)
    return (key_S1 <= query_1Q) & (key_S1 >= _first_attended_key(geometry, num_buffered, query_1Q))
