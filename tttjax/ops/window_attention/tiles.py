"""Tiling of window attention: loops over the tiles that the attention mask does not exclude.

Arrays per query are [..., H, C, K] and [..., H, C]; keys and values are [..., S, H, K].
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from tttjax.ops.attention.attend import AttentionMask, mask_fn
from tttjax.types import Array, PyTree

# Scores of one tile over all heads and sequences. On a CPU they should fit its caches (2 MiB in
# float32; larger and smaller tiles were slower), elsewhere they should occupy the whole device.
TILE_ENTRIES = {"cpu": 2**19}
TILE_ENTRIES_DEFAULT = 2**22
MIN_BLOCK = 128  # shorter blocks leave matrix units idle
TARGET_KEY_BLOCK = 512  # the query block is chosen for at most this many keys


Arrays = tuple[Array, ...]


class Tiling(NamedTuple):
    """Queries and keys of one tile; 0: chosen automatically."""

    query: int = 0
    key: int = 0


AUTO = Tiling()


class ChunkGeometry(NamedTuple):
    """Position of the chunk (tokens before it), its length, attention mask and tiling.

    tiling: both sizes nonzero (see `choose_tiling`).
    """

    position: Array
    length: int
    attention_mask: AttentionMask
    tiling: Tiling


class KVGroup(NamedTuple):
    """Buffered or chunk keys and values, [..., S, H, K]; only the chunk's can have tangents.

    first: position of the first key, relative to the chunk's first query (-W or 0).
    """

    first: int
    k: Array
    v: Array
    k_dot: Array | None = None
    v_dot: Array | None = None


class Tile(NamedTuple):
    """Entries [start, start + size) of an axis; entries below `valid` belong to the previous tile.

    They overlap if the length is not a multiple of the tile size: the last tile starts earlier.
    """

    start: Array | int
    valid: Array | int
    size: int


def choose_tiling(shape: tuple[int, ...], keys: int, tiling: Tiling, platform: str) -> Tiling:
    """Tile sizes for queries of `shape` [..., C, H, K] and at most `keys` keys per group.

    Sizes that are 0 in `tiling` become as large as TILE_ENTRIES allows on the platform.
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
    """`length` if it fits, or its largest divisor in (max_size / 2, max_size], or `max_size`."""
    if length <= max_size:
        return length
    return next(
        (size for size in range(max_size, max_size // 2, -1) if length % size == 0), max_size
    )


def take_tile(x: Array, tile: Tile, axis: int) -> Array:
    """The tile's entries of x."""
    if tile.size == x.shape[axis]:
        return x
    return lax.dynamic_slice_in_dim(x, tile.start, tile.size, axis)


def take_kv_tile(kv_group: KVGroup, cols: Tile) -> KVGroup:
    """The tile's keys and values, with their tangents."""
    arrays: Any = (x if x is None else take_tile(x, cols, -3) for x in kv_group[1:])
    return KVGroup(kv_group.first, *arrays)


def _write_tile(x: Array, update: Array, tile: Tile, axis: int) -> Array:
    """x with the tile's entries replaced."""
    update = update.astype(x.dtype)
    if tile.size == x.shape[axis]:
        return update
    return lax.dynamic_update_slice_in_dim(x, update, tile.start, axis)


def _add_to_tile(x: Array, update: Array, tile: Tile, axis: int) -> Array:
    """x with `update` added to the tile's entries."""
    return _write_tile(x, take_tile(x, tile, axis) + update.astype(x.dtype), tile, axis)


def _loop_over_tiles(
    low: Array | int,
    high: Array | int,
    length: int,
    size: int,
    body: Callable[[Tile, PyTree], PyTree],
    carry: PyTree,
) -> PyTree:
    """carry = body(tile, carry) over the tiles of [0, length) that overlap [low, high)."""
    if length == 0:
        return carry
    if size >= length:
        return body(Tile(0, 0, length), carry)
    low, high = jnp.maximum(low, 0), jnp.minimum(high, length)
    stop = -(-high // size)
    first = jnp.where(low < high, low // size, stop)

    def visit(n: Array, carry: PyTree) -> PyTree:
        return body(Tile(jnp.minimum(n * size, length - size), n * size, size), carry)

    return lax.fori_loop(first, stop, visit, carry)


def _tile_mask(geometry: ChunkGeometry, rows: Tile, first: int, cols: Tile) -> Array:
    """bool [Q, S]: attention mask of the tile, False for keys of the previous tile."""
    query = rows.start + jnp.arange(rows.size)
    key = cols.start + jnp.arange(cols.size)
    mask = mask_fn(
        geometry.position + query, geometry.position + first + key, geometry.attention_mask
    )
    return mask & (key >= cols.valid)


def first_attended_key(geometry: ChunkGeometry, query: Array | int) -> Array:
    """Position of the first key that `query` attends to, however many keys are buffered."""
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
    """The first query after `key` that does not attend to it (`length`: all do)."""
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
    start: Callable[[Tile], tuple[PyTree, Arrays]],
    step: Callable[[PyTree, Arrays, KVGroup, Array], Arrays],
    finish: Callable[[Arrays], Arrays],
    out: Arrays,
) -> Arrays:
    """Loops over query blocks, and inside over the key blocks that each attends to.

    queries, carry = start(rows); carry = step(queries, carry, keys, mask) for each block of keys, a
    KVGroup; finish(carry) is written to the rows of `out`, a tuple of arrays [..., H, C, K] and
    [..., H, C].
    """

    def block(rows: Tile, out: Arrays) -> Arrays:
        queries, carry = start(rows)
        for kv_group in kv_groups:

            def visit_tile(cols: Tile, carry: Arrays, kv_group: KVGroup = kv_group) -> Arrays:
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


# step(rows, keys, mask, need_kv_grads) -> (query_parts, key_parts)
KeyStep = Callable[[Tile, KVGroup, Array, bool], tuple[Arrays, Arrays]]


def scan_key_tiles(
    geometry: ChunkGeometry,
    kv_groups: Sequence[KVGroup],
    step: KeyStep,
    query_sums: Arrays,
    key_sums: Sequence[Arrays],
) -> tuple[Arrays, list[Arrays]]:
    """Sums over keys per query, and over queries per key, visiting each tile once.

    step(rows, keys, mask, need_kv_grads) -> (query_parts, key_parts), [..., H, Q, K] and
    [..., H, S, K]. They are added to `query_sums`, [..., H, C, K], and to the group's entry of
    `key_sums`, [..., S, H, K] (empty: need_kv_grads is False), in the dtype of `query_sums`.
    """
    results = []
    for kv_group, out in zip(kv_groups, key_sums, strict=True):
        query_sums, out = _scan_kv_group(kv_group, geometry, step, query_sums, out)
        results.append(out)
    return query_sums, results


def _scan_kv_group(
    kv_group: KVGroup, geometry: ChunkGeometry, step: KeyStep, query_sums: Arrays, out: Arrays
) -> tuple[Arrays, Arrays]:
    """`scan_key_tiles` for one group: loops over key blocks, and inside over query blocks."""
    length = kv_group.k.shape[-3]
    size = min(geometry.tiling.key, length)

    def block(cols: Tile, carry: tuple[Arrays, Arrays]) -> tuple[Arrays, Arrays]:
        query_sums, out = carry
        keys = take_kv_tile(kv_group, cols)

        def visit_tile(rows: Tile, carry: tuple[Arrays, Arrays]) -> tuple[Arrays, Arrays]:
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
        # The last tile may overlap entries that the previous one wrote.
        write = _add_to_tile if length % size else _write_tile
        parts = zip(out, sums, strict=True)
        return query_sums, tuple(write(x, jnp.swapaxes(y, -2, -3), cols, -3) for x, y in parts)

    low = first_attended_key(geometry, 0) - kv_group.first
    return _loop_over_tiles(low, length, length, size, block, (query_sums, out))
