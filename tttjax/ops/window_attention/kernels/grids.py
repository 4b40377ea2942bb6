"""The two Pallas programs: sums over keys for each block of queries, and the other way round.

Each is one program per head and block, with a loop over the blocks of the other kind that may meet
it; blocks outside the window, or before the start of the sequence, are not visited. Queries, keys
and all that belongs to them come as [N, rows, tokens], tokens padded to whole blocks: those of the
chunk behind, those of the past in front, so that places count from the chunk's first query in both.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from tttjax.ops.window_attention.kernels.blocks import Keys, wide
from tttjax.ops.window_attention.kernels.platforms import ZERO, call_options, position_spec
from tttjax.ops.window_attention.tiles import ChunkGeometry, first_seen, seen_until
from tttjax.types import Array


class Walk(NamedTuple):
    """What both programs know beside their arrays.

    view: where the chunk stands; its tiling's `query` divides the padded chunk. past: keys there
    are before the chunk, without padding. platform: that the program is made for.
    width: bytes of a head's part of a token.
    """

    view: ChunkGeometry
    past: int
    platform: str
    width: int


class KeyBlocks(NamedTuple):
    """Keys of the past or of the chunk, [N, K, S]. first: the place of the first. size: of a block
    of them, a divisor of S."""

    first: int
    size: int
    keys: Keys


def by_queries(
    walk: Walk,
    rows: tuple[Array, ...],
    groups: tuple[KeyBlocks, ...],
    outs: tuple[jax.ShapeDtypeStruct, ...],
    start: Callable,
    step: Callable,
    finish: Callable,
) -> list[Array]:
    """Results per query.

    carry = start(rows of a block); carry = step(carry, rows, keys, seen) for blocks of keys, with
    seen [S, Q]; finish(carry) is written to the block's place in `outs`.
    """
    count, _, length = rows[0].shape
    size = walk.view.tiling.query

    def kernel(position_ref, rows_refs, keys_refs, *out_refs):
        view = walk.view._replace(position=position_ref[0])
        first = pl.program_id(1) * size
        queries = tuple(ref[...] for ref in rows_refs)
        low, carry = _lowest(view, walk.past, first), start(queries)
        for group, refs in zip(groups, keys_refs, strict=True):

            def meet(n, carry, group=group, refs=refs):
                cols = pl.ds(pl.multiple_of(n * group.size, group.size), group.size)
                keys = jax.tree.map(lambda ref: ref[:, cols], refs)
                seen = _seen(view, walk.past, first, size, group.first + n * group.size, group.size)
                return step(carry, queries, keys, seen)

            stop = jnp.minimum(first + size - group.first, group.keys.k.shape[-1])
            bounds = _blocks(low - group.first, stop, group.size)
            carry = lax.fori_loop(*bounds, meet, carry)
        for ref, result in zip(out_refs, finish(carry), strict=True):
            ref[...] = result.astype(ref.dtype)

    block = partial(_block, size=size)
    arrays = rows, tuple(group.keys for group in groups)
    return pl.pallas_call(
        kernel,
        grid=(count, length // size),
        in_specs=(
            position_spec(walk.platform),
            jax.tree.map(block, rows),
            jax.tree.map(_whole, arrays[1]),
        ),
        out_specs=tuple(map(block, outs)),
        out_shape=outs,
        **call_options(walk.platform, walk.width),
    )(_scalar(walk.view.position), *arrays)


def by_keys(
    walk: Walk, rows: tuple[Array, ...], group: KeyBlocks, outs: int, step: Callable
) -> list[Array]:
    """`outs` sums over queries for each key, [N, K, S].

    step(rows of a block, keys of a block, seen) -> what is added, each [K, S].
    """
    count, head_size, length = group.keys.k.shape
    size, stride = group.size, walk.view.tiling.query

    def kernel(position_ref, rows_refs, keys_refs, *out_refs):
        view = walk.view._replace(position=position_ref[0])
        keys = jax.tree.map(lambda ref: ref[...], keys_refs)
        first = group.first + pl.program_id(1) * size
        last = first + size - 1
        stop = jnp.minimum(seen_until(view, last), view.length)
        stop = jnp.where(last < _lowest(view, walk.past, 0), 0, stop)

        def meet(n, sums):
            cols = pl.ds(pl.multiple_of(n * stride, stride), stride)
            queries = tuple(ref[:, cols] for ref in rows_refs)
            seen = _seen(view, walk.past, n * stride, stride, first, size)
            return tuple(x + part for x, part in zip(sums, step(queries, keys, seen), strict=True))

        nothing = jnp.zeros((head_size, size), wide(keys.k))
        sums = lax.fori_loop(*_blocks(first, stop, stride), meet, (nothing,) * outs)
        for ref, result in zip(out_refs, sums, strict=True):
            ref[...] = result.astype(ref.dtype)

    block = partial(_block, size=size)
    out_shape = (jax.ShapeDtypeStruct(group.keys.k.shape, group.keys.k.dtype),) * outs
    return pl.pallas_call(
        kernel,
        grid=(count, length // size),
        in_specs=(
            position_spec(walk.platform),
            jax.tree.map(_whole, rows),
            jax.tree.map(block, group.keys),
        ),
        out_specs=tuple(map(block, out_shape)),
        out_shape=out_shape,
        **call_options(walk.platform, walk.width),
    )(_scalar(walk.view.position), rows, group.keys)


def _block(x: Array | jax.ShapeDtypeStruct, size: int) -> pl.BlockSpec:
    """A block of tokens of the program's own head."""
    return pl.BlockSpec((None, x.shape[1], size), lambda n, i: (n, ZERO, i))


def _whole(x: Array) -> pl.BlockSpec:
    """All tokens of it."""
    return pl.BlockSpec((None, *x.shape[1:]), lambda n, i: (n, ZERO, ZERO))


def _scalar(position: Array | int) -> Array:
    return jnp.asarray(position, jnp.int32).reshape(1)


def _blocks(low: Array, high: Array, size: int) -> tuple[Array, Array]:
    """The blocks of `size` that meet [low, high), as bounds of a loop; none if it is empty."""
    low, high = (jnp.maximum(jnp.asarray(x, jnp.int32), 0) for x in (low, high))
    stop = lax.div(high + jnp.int32(size - 1), jnp.int32(size))
    return jnp.minimum(lax.div(low, jnp.int32(size)), stop), stop


def _lowest(view: ChunkGeometry, past: int, query: Array | int) -> Array:
    """The place of the first key that this query (or any after it) sees."""
    return jnp.maximum(first_seen(view, query), jnp.int32(-past))


def _seen(
    view: ChunkGeometry, past: int, query: Array, queries: int, key: Array, keys: int
) -> Array:
    """bool [S, Q], for blocks that begin at these places."""
    query_1Q = query + lax.broadcasted_iota(jnp.int32, (1, queries), 1)
    key_S1 = key + lax.broadcasted_iota(jnp.int32, (keys, 1), 0)
    return (key_S1 <= query_1Q) & (key_S1 >= _lowest(view, past, query_1Q))
