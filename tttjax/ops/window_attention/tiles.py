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
TILE_ENTRIES_ELSEWHERE = 2**22
LEAST = 128  # shorter blocks keep matrix units idle
KEYS_FIRST = 512  # keys of a block before its queries are divided


class Tiling(NamedTuple):
    """Queries and keys of one block; 0: chosen by `tiling_of`."""

    query: int = 0
    key: int = 0


AUTO = Tiling()


class ChunkGeometry(NamedTuple):
    """Where the chunk stands (tokens before it), how long it is, and what its queries see.

    tiling: with both sizes given (`tiling_of`).
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
    """Entries [start, start + size); those below `fresh` were in the piece before.

    So it is where a length is no multiple of the block: the last piece begins earlier.
    """

    start: Array | int
    fresh: Array | int
    size: int


def tiling_of(shape: tuple[int, ...], keys: int, tiling: Tiling, platform: str) -> Tiling:
    """Block sizes for queries of this shape [..., C, H, K] and at most `keys` keys on a side.

    Those that `tiling` leaves open are as large as TILE_ENTRIES allows for the platform.
    """
    *lead, queries, heads, _ = shape
    entries = TILE_ENTRIES.get(platform, TILE_ENTRIES_ELSEWHERE)
    most = entries // (heads * math.prod(lead))
    query = tiling.query or _fit(queries, max(LEAST, most // min(keys, KEYS_FIRST)))
    key = tiling.key or _fit(keys, max(LEAST, most // query))
    return Tiling(min(queries, query), key)


def _fit(length: int, most: int) -> int:
    """The size of pieces of `length`: `most`, or a divisor if there is one not far below."""
    if length <= most:
        return length
    return next((size for size in range(most, most // 2, -1) if length % size == 0), most)


def cut(x: Array, piece: Tile, axis: int) -> Array:
    """The piece's entries of x."""
    if piece.size == x.shape[axis]:
        return x
    return lax.dynamic_slice_in_dim(x, piece.start, piece.size, axis)


def cut_side(side: KVGroup, cols: Tile) -> KVGroup:
    """The piece's keys and values, and their tangents if there are any."""
    k_dot, v_dot = (None if x is None else cut(x, cols, -3) for x in (side.k_dot, side.v_dot))
    return KVGroup(side.first, cut(side.k, cols, -3), cut(side.v, cols, -3), k_dot, v_dot)


def _put(x: Array, update: Array, piece: Tile, axis: int) -> Array:
    """x with the piece's entries replaced."""
    update = update.astype(x.dtype)
    if piece.size == x.shape[axis]:
        return update
    return lax.dynamic_update_slice_in_dim(x, update, piece.start, axis)


def _add(x: Array, update: Array, piece: Tile, axis: int) -> Array:
    """x with something added to the piece's entries."""
    return _put(x, cut(x, piece, axis) + update.astype(x.dtype), piece, axis)


def _pieces(low, high, length: int, size: int, body: Callable, carry: Any) -> Any:
    """carry = body(piece, carry) over the pieces of [0, length) that meet [low, high)."""
    if length == 0:
        return carry
    if size >= length:
        return body(Tile(0, 0, length), carry)
    low, high = jnp.maximum(low, 0), jnp.minimum(high, length)
    stop = -(-high // size)
    first = jnp.where(low < high, low // size, stop)

    def numbered(n, carry):
        return body(Tile(jnp.minimum(n * size, length - size), n * size, size), carry)

    return lax.fori_loop(first, stop, numbered, carry)


def _seen(view: ChunkGeometry, rows: Tile, first: int, cols: Tile) -> Array:
    """bool [Q, S]: what queries `rows` see of keys `cols`, each key in one piece only."""
    query = rows.start + jnp.arange(rows.size)
    key = cols.start + jnp.arange(cols.size)
    seen = mask_fn(view.position + query, view.position + first + key, view.attention_mask)
    return seen & (key >= cols.fresh)


def first_seen(view: ChunkGeometry, query: Array | int) -> Array:
    """Where the first key stands that this query sees, if there were keys everywhere."""
    position, _, attention_mask, _ = view
    place = -position
    if attention_mask.window:
        place = jnp.maximum(place, query - attention_mask.window + 1)
    if attention_mask.block:
        place = jnp.maximum(
            place, (position + query) // attention_mask.block * attention_mask.block - position
        )
    return place


def seen_until(view: ChunkGeometry, key: Array | int) -> Array | int:
    """The first query after this key that no longer sees it (`length`: all do)."""
    position, length, attention_mask, _ = view
    stop: Array | int = length
    if attention_mask.window:
        stop = jnp.minimum(stop, key + attention_mask.window)
    if attention_mask.block:
        stop = jnp.minimum(
            stop, ((position + key) // attention_mask.block + 1) * attention_mask.block - position
        )
    return stop


def by_queries(
    view: ChunkGeometry,
    sides: Sequence[KVGroup],
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
        for side in sides:

            def meet(cols, carry, side=side):
                seen = _seen(view, rows, side.first, cols)
                return step(queries, carry, cut_side(side, cols), seen)

            low = first_seen(view, rows.start) - side.first
            high = rows.start + rows.size - side.first
            carry = _pieces(low, high, side.k.shape[-3], view.tiling.key, meet, carry)
        return tuple(
            _put(x, update, rows, -2 if x.ndim == out[0].ndim else -1)
            for x, update in zip(out, finish(carry), strict=True)
        )

    return _pieces(0, view.length, view.length, view.tiling.query, block, out)


def by_keys(
    view: ChunkGeometry,
    sides: Sequence[KVGroup],
    step: Callable,
    to_rows: tuple,
    to_keys: Sequence[tuple],
) -> tuple[tuple, list[tuple]]:
    """Sums over keys for the queries, and over queries for the keys, each block visited once.

    step(rows, keys, seen, wanted) -> what is added to `to_rows`, arrays [..., H, C, K], and to the
    side's member of `to_keys`, arrays [..., S, H, K] (wanted False: it is empty); parts of both
    come as [..., H, Q, K] and [..., H, S, K] and are summed in the dtype of `to_rows`.
    """
    results = []
    for side, out in zip(sides, to_keys, strict=True):
        to_rows, out = _by_keys_of(side, view, step, to_rows, out)
        results.append(out)
    return to_rows, results


def _by_keys_of(
    side: KVGroup, view: ChunkGeometry, step: Callable, to_rows: tuple, out: tuple
) -> tuple[tuple, tuple]:
    """`by_keys` for one side: a block of keys stays while all queries that see it pass by."""
    length = side.k.shape[-3]
    size = min(view.tiling.key, length)

    def block(cols, carry):
        to_rows, out = carry
        keys = cut_side(side, cols)

        def meet(rows, carry):
            to_rows, sums = carry
            fresh = rows.start + jnp.arange(rows.size) >= rows.fresh
            seen = _seen(view, rows, side.first, cols) & fresh[:, None]
            for_rows, for_keys = step(rows, keys, seen, bool(sums))
            added = zip(to_rows, for_rows, strict=True)
            to_rows = tuple(_add(x, part, rows, -2) for x, part in added)
            return to_rows, tuple(x + part for x, part in zip(sums, for_keys, strict=True))

        wide = to_rows[0].dtype
        sums = tuple(jnp.swapaxes(jnp.zeros_like(cut(x, cols, -3), wide), -2, -3) for x in out)
        low = side.first + cols.start
        high = seen_until(view, low + size - 1)
        to_rows, sums = _pieces(low, high, view.length, view.tiling.query, meet, (to_rows, sums))
        # Only a piece that was moved back meets entries that the one before has written.
        write = _add if length % size else _put
        parts = zip(out, sums, strict=True)
        return to_rows, tuple(write(x, jnp.swapaxes(y, -2, -3), cols, -3) for x, y in parts)

    low = first_seen(view, 0) - side.first
    return _pieces(low, length, length, size, block, (to_rows, out))
