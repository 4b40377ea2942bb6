"""Walking over blocks: which blocks of keys a block of queries sees, and loops over them alone.

Arrays that belong to queries have their heads first inside, [..., H, C, K] and [..., H, C]; keys
are cut from [..., S, H, K] as they are.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from tttjax.ops.attention.attend import AttentionMask, mask_fn
from tttjax.types import Array

# Scores of one block over all heads and sequences. On a CPU they should stay in its caches
# (2 MiB in float32; larger and smaller ones were slower), elsewhere keep the whole device busy.
TILE_ENTRIES = {"cpu": 2**19}
TILE_ENTRIES_DEFAULT = 2**22
MIN_BLOCK = 128  # shorter blocks keep matrix units idle
TARGET_KEY_BLOCK = 512  # keys of a block before its queries are divided


class Tiling(NamedTuple):
    """Queries and keys of one block; 0: chosen by `choose_tiling`."""

    query: int = 0
    key: int = 0


AUTO = Tiling()


class ChunkGeometry(NamedTuple):
    """Where the chunk stands (tokens before it), how long it is, and what its queries see.

    tiling: with both sizes given (`choose_tiling`).
    """

    position: Array
    length: int
    attention_mask: AttentionMask
    tiling: Tiling


class KVGroup(NamedTuple):
    """One of the two groups of keys, [..., S, H, K], with their tangents (None: constants).

    first: where its first key stands, counted from the chunk's first query (-W or 0).
    """

    first: int
    k: Array
    v: Array
    k_dot: Array | None
    v_dot: Array | None


class Tile(NamedTuple):
    """Entries [start, start + size); those below `valid` were in the piece before.

    So it is where a length is no multiple of the block: the last piece begins earlier.
    """

    start: Array | int
    valid: Array | int
    size: int


def choose_tiling(shape: tuple[int, ...], keys: int, tiling: Tiling, platform: str) -> Tiling:
    """Block sizes for queries of this shape [..., C, H, K] and at most `keys` keys on a side.

    Those that `tiling` leaves open are as large as TILE_ENTRIES allows for the platform.
    """
    *lead, queries, heads, _ = shape
    entries = TILE_ENTRIES.get(platform, TILE_ENTRIES_DEFAULT)
    max_size = entries // (heads * math.prod(lead))
    query = tiling.query or _block_size(
        queries, max(MIN_BLOCK, max_size // min(keys, TARGET_KEY_BLOCK))
    )
    key = tiling.key or _block_size(keys, max(MIN_BLOCK, max_size // query))
    return Tiling(min(queries, query), key)


def _block_size(length: int, max_size: int) -> int:
    """The size of pieces of `length`: `max_size`, or a divisor if there is one not far below."""
    if length <= max_size:
        return length
    return next(
        (size for size in range(max_size, max_size // 2, -1) if length % size == 0), max_size
    )


def take_tile(x: Array, tile: Tile, axis: int) -> Array:
    """The piece's entries of x."""
    if tile.size == x.shape[axis]:
        return x
    return lax.dynamic_slice_in_dim(x, tile.start, tile.size, axis)


def take_kv_tile(kv_group: KVGroup, cols: Tile) -> KVGroup:
    """The piece's keys and values, and their tangents if there are any."""
    k_dot, v_dot = (
        None if x is None else take_tile(x, cols, -3) for x in (kv_group.k_dot, kv_group.v_dot)
    )
    return KVGroup(
        kv_group.first,
        take_tile(kv_group.k, cols, -3),
        take_tile(kv_group.v, cols, -3),
        k_dot,
        v_dot,
    )


def _write_tile(x: Array, update: Array, tile: Tile, axis: int) -> Array:
    """x with the piece's entries replaced."""
    update = update.astype(x.dtype)
    if tile.size == x.shape[axis]:
        return update
    return lax.dynamic_update_slice_in_dim(x, update, tile.start, axis)


def _add_to_tile(x: Array, update: Array, tile: Tile, axis: int) -> Array:
    """x with something added to the piece's entries."""
    return _write_tile(x, take_tile(x, tile, axis) + update.astype(x.dtype), tile, axis)


def _loop_over_tiles(low, high, length: int, size: int, body: Callable, carry: Any) -> Any:
    """carry = body(piece, carry) over the pieces of [0, length) that meet [low, high)."""
    if length == 0:
        return carry
    if size >= length:
        return body(Tile(0, 0, length), carry)
    low, high = jnp.maximum(low, 0), jnp.minimum(high, length)
    stop = -(-high // size)
    first = jnp.where(low < high, low // size, stop)

    def visit(n, carry):
        return body(Tile(jnp.minimum(n * size, length - size), n * size, size), carry)

    return lax.fori_loop(first, stop, visit, carry)


def _tile_mask(geometry: ChunkGeometry, rows: Tile, first: int, cols: Tile) -> Array:
    """bool [Q, S]: what queries `rows` see of keys `cols`, each key in one piece only."""
    query = rows.start + jnp.arange(rows.size)
    key = cols.start + jnp.arange(cols.size)
    mask = mask_fn(
        geometry.position + query, geometry.position + first + key, geometry.attention_mask
    )
    return mask & (key >= cols.valid)


def first_attended_key(geometry: ChunkGeometry, query: Array | int) -> Array:
    """Where the first key stands that this query sees, if there were keys everywhere."""
    position, _, attention_mask, _ = geometry
    first = -position
    if attention_mask.window:
        first = jnp.maximum(first, query - attention_mask.window + 1)
    if attention_mask.block:
        first = jnp.maximum(
            first, (position + query) // attention_mask.block * attention_mask.block - position
        )
    return first


def attending_query_stop(geometry: ChunkGeometry, key: Array | int) -> Array | int:
    """The first query after this key that no longer sees it (`length`: all do)."""
    position, length, attention_mask, _ = geometry
    stop: Array | int = length
    if attention_mask.window:
        stop = jnp.minimum(stop, key + attention_mask.window)
    if attention_mask.block:
        stop = jnp.minimum(
            stop, ((position + key) // attention_mask.block + 1) * attention_mask.block - position
        )
    return stop


def scan_query_tiles(
    geometry: ChunkGeometry,
    kv_groups: Sequence[KVGroup],
    start: Callable,
    step: Callable,
    finish: Callable,
    out: Any,
) -> Any:
    """Results per query, from one block of queries after the other.

    queries, carry = start(rows); carry = step(queries, carry, keys, seen) with the blocks of keys
    that they see, `keys` a cut Side; finish(carry) is written to the rows of `out`, a tuple of
    arrays [..., H, C, K] and [..., H, C].
    """

    def block(rows, out):
        queries, carry = start(rows)
        for kv_group in kv_groups:

            def visit_tile(cols, carry, kv_group=kv_group):
                mask = _tile_mask(geometry, rows, kv_group.first, cols)
                return step(queries, carry, take_kv_tile(kv_group, cols), mask)

            low = first_attended_key(geometry, rows.start) - kv_group.first
            high = rows.start + rows.size - kv_group.first
            carry = _loop_over_tiles(
                low, high, kv_group.k.shape[-3], geometry.tiling.key, visit_tile, carry
            )
        return tuple(
            _write_tile(x, update, rows, -2 if x.ndim == out[0].ndim else -1)
            for x, update in zip(out, finish(carry), strict=True)
        )

    return _loop_over_tiles(0, geometry.length, geometry.length, geometry.tiling.query, block, out)


def scan_key_tiles(
    geometry: ChunkGeometry,
    kv_groups: Sequence[KVGroup],
    step: Callable,
    query_sums: tuple,
    key_sums: Sequence[tuple],
) -> tuple[tuple, list[tuple]]:
    """Sums over keys for the queries, and over queries for the keys, each block visited once.

    step(rows, keys, seen, wanted) -> what is added to `query_sums`, arrays [..., H, C, K], and to the
    side's member of `key_sums`, arrays [..., S, H, K] (wanted False: it is empty); parts of both
    come as [..., H, Q, K] and [..., H, S, K] and are summed in the dtype of `query_sums`.
    """
    results = []
    for kv_group, out in zip(kv_groups, key_sums, strict=True):
        query_sums, out = _scan_kv_group(kv_group, geometry, step, query_sums, out)
        results.append(out)
    return query_sums, results


def _scan_kv_group(
    kv_group: KVGroup, geometry: ChunkGeometry, step: Callable, query_sums: tuple, out: tuple
) -> tuple[tuple, tuple]:
    """`scan_key_tiles` for one side: a block of keys stays while all queries that see it pass by."""
    length = kv_group.k.shape[-3]
    size = min(geometry.tiling.key, length)

    def block(cols, carry):
        query_sums, out = carry
        keys = take_kv_tile(kv_group, cols)

        def visit_tile(rows, carry):
            query_sums, sums = carry
            valid = rows.start + jnp.arange(rows.size) >= rows.valid
            mask = _tile_mask(geometry, rows, kv_group.first, cols) & valid[:, None]
            query_parts, key_parts = step(rows, keys, mask, bool(sums))
            added = zip(query_sums, query_parts, strict=True)
            query_sums = tuple(_add_to_tile(x, part, rows, -2) for x, part in added)
            return query_sums, tuple(x + part for x, part in zip(sums, key_parts, strict=True))

        accum_dtype = query_sums[0].dtype
        sums = tuple(
            jnp.swapaxes(jnp.zeros_like(take_tile(x, cols, -3), accum_dtype), -2, -3) for x in out
        )
        low = kv_group.first + cols.start
        high = attending_query_stop(geometry, low + size - 1)
        query_sums, sums = _loop_over_tiles(
            low, high, geometry.length, geometry.tiling.query, visit_tile, (query_sums, sums)
        )
        # Only a piece that was moved back meets entries that the one before has written.
        write = _add_to_tile if length % size else _write_tile
        parts = zip(out, sums, strict=True)
        return query_sums, tuple(write(x, jnp.swapaxes(y, -2, -3), cols, -3) for x, y in parts)

    low = first_attended_key(geometry, 0) - kv_group.first
    return _loop_over_tiles(low, length, length, size, block, (query_sums, out))
