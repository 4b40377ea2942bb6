"""Forward and backward of tiled window attention, and of the pair with its tangent, in XLA.

The package docstring derives the formulas; `rules` wraps them in custom derivatives. Scores exist
for one tile at a time. Loop bounds depend on the position, so these functions have no reverse mode.
"""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from tttjax.ops.attention.attend import MASKED_SCORE
from tttjax.ops.window_attention.tiles import (
    Arrays,
    ChunkGeometry,
    KVGroup,
    Tile,
    scan_key_tiles,
    scan_query_tiles,
    take_tile,
)
from tttjax.types import Array

INITIAL_MAX = MASKED_SCORE / 2  # below any score; exp(MASKED_SCORE - INITIAL_MAX) is 0


class QKV(NamedTuple):
    """Inputs of window attention, or their tangents or cotangents (None: absent).

    q: [..., C, H, K], the chunk's queries.
    k_buffered, v_buffered: [..., W, G, K], keys and values of the W tokens before the chunk.
    k_chunk, v_chunk: [..., C, G, K], the chunk's own. Each of the G heads serves H / G consecutive
    query heads.
    """

    q: Array
    k_buffered: Any
    v_buffered: Any
    k_chunk: Any
    v_chunk: Any


class Statistics(NamedTuple):
    """Softmax statistics per query, [..., H, C], at least float32, to recompute a tile.

    logsumexp: of the scores. mean_dot: mean of the scores' tangents under the probabilities.
    """

    logsumexp: Array
    mean_dot: Array


def forward(qkv: QKV, geometry: ChunkGeometry) -> tuple[Array, Array]:
    """o [..., C, H, K] in the dtype of v, and the scores' log-sum-exp [..., H, C]."""
    q_HCK, accum_dtype = _heads_first(qkv.q), _accum_dtype(qkv)

    def start(rows: Tile) -> tuple[Array, Arrays]:
        q = take_tile(q_HCK, rows, -2)
        zeros = jnp.zeros(q.shape[:-1], accum_dtype)
        return q, (zeros + INITIAL_MAX, zeros, jnp.zeros(q.shape, accum_dtype))

    def step(q: Array, carry: Arrays, keys: KVGroup, mask: Array) -> Arrays:
        row_max, row_sum, sum_o = carry
        row_max, rescale, weight = _online_softmax(row_max, _scores(q, keys, mask, accum_dtype))
        row_sum = row_sum * rescale + jnp.sum(weight, axis=-1)
        sum_o = sum_o * rescale[..., None] + _sum_over_keys(weight, keys.v)
        return row_max, row_sum, sum_o

    def finish(carry: Arrays) -> Arrays:
        row_max, row_sum, sum_o = carry
        return sum_o / row_sum[..., None], row_max + jnp.log(row_sum)

    out = jnp.zeros(q_HCK.shape, qkv.v_chunk.dtype), jnp.zeros(q_HCK.shape[:-1], accum_dtype)
    o_HCK, logsumexp_HC = scan_query_tiles(geometry, _kv_groups(qkv), start, step, finish, out)
    return _heads_first(o_HCK), logsumexp_HC


def backward(
    qkv: QKV,
    o: Array,
    logsumexp_HC: Array,
    o_bar: Array,
    geometry: ChunkGeometry,
    buffer_grads: bool,
) -> QKV:
    """Cotangents of `qkv` from that of o; None for the buffer unless `buffer_grads`."""
    accum_dtype, scale = _accum_dtype(qkv), _scale(qkv)
    q_HCK, o_bar_HCK = _heads_first(qkv.q), _heads_first(o_bar)
    delta_HC = _dot(o_bar, o, accum_dtype)

    def step(rows: Tile, keys: KVGroup, mask: Array, need_kv_grads: bool) -> tuple[Arrays, Arrays]:
        q, o_bar = take_tile(q_HCK, rows, -2), take_tile(o_bar_HCK, rows, -2)
        logsumexp, delta = (take_tile(x, rows, -1)[..., None] for x in (logsumexp_HC, delta_HC))
        prob = jnp.exp(_scores(q, keys, mask, accum_dtype) - logsumexp)
        score_bar = prob * (_query_key_dot(o_bar, keys.v, accum_dtype) - delta) * scale
        query_parts = (_sum_over_keys(score_bar, keys.k),)
        if not need_kv_grads:
            return query_parts, ()
        return query_parts, (
            _sum_over_queries(score_bar, q, keys.k),
            _sum_over_queries(prob, o_bar, keys.v),
        )

    zeros = (jnp.zeros(q_HCK.shape, accum_dtype),)
    buffer_zeros = _zeros(qkv.k_buffered, qkv.v_buffered) if buffer_grads else ()
    key_sums = buffer_zeros, _zeros(qkv.k_chunk, qkv.v_chunk)
    (q_bar,), (buffer_bar, chunk_bar) = scan_key_tiles(
        geometry, _kv_groups(qkv), step, zeros, key_sums
    )
    q_bar = _heads_first(q_bar).astype(qkv.q.dtype)
    return QKV(q_bar, *(buffer_bar or (None, None)), *chunk_bar)


def pair_forward(
    qkv: QKV, qkv_dot: QKV, geometry: ChunkGeometry
) -> tuple[Array, Array, Statistics]:
    """o, its tangent along `qkv_dot` (both [..., C, H, K]), and the softmax statistics.

    Score tangents are centred on their running mean, so that a constant added to all of them costs
    no precision.
    """
    q_HCK, q_dot_HCK, accum_dtype = _heads_first(qkv.q), _heads_first(qkv_dot.q), _accum_dtype(qkv)

    def start(rows: Tile) -> tuple[tuple[Array, Array], Arrays]:
        q, q_dot = take_tile(q_HCK, rows, -2), take_tile(q_dot_HCK, rows, -2)
        zeros, zeros_o = jnp.zeros(q.shape[:-1], accum_dtype), jnp.zeros(q.shape, accum_dtype)
        return (q, q_dot), (zeros + INITIAL_MAX, zeros, zeros, zeros_o, zeros_o)

    def step(queries: tuple[Array, Array], carry: Arrays, keys: KVGroup, mask: Array) -> Arrays:
        row_max, row_sum, mean_dot, sum_o, sum_dot = carry
        row_max, rescale, weight = _online_softmax(
            row_max, _scores(queries[0], keys, mask, accum_dtype)
        )
        score_dot = _score_tangents(queries[0], queries[1], keys, accum_dtype)
        row_sum = row_sum * rescale + jnp.sum(weight, axis=-1)
        shift = jnp.sum(weight * (score_dot - mean_dot[..., None]), axis=-1)
        shift = shift / jnp.where(row_sum > 0, row_sum, 1)
        mean_dot = mean_dot + shift
        sum_dot = (sum_dot - shift[..., None] * sum_o) * rescale[..., None]
        sum_dot += _sum_over_keys(weight * (score_dot - mean_dot[..., None]), keys.v)
        if keys.v_dot is not None:
            sum_dot += _sum_over_keys(weight, keys.v_dot)
        sum_o = sum_o * rescale[..., None] + _sum_over_keys(weight, keys.v)
        return row_max, row_sum, mean_dot, sum_o, sum_dot

    def finish(carry: Arrays) -> Arrays:
        row_max, row_sum, mean_dot, sum_o, sum_dot = carry
        o, o_dot = sum_o / row_sum[..., None], sum_dot / row_sum[..., None]
        return o, o_dot, row_max + jnp.log(row_sum), mean_dot

    o, per_query = (
        jnp.zeros(q_HCK.shape, qkv.v_chunk.dtype),
        jnp.zeros(q_HCK.shape[:-1], accum_dtype),
    )
    out = o, o, per_query, per_query
    o_HCK, o_dot_HCK, *statistics = scan_query_tiles(
        geometry, _kv_groups(qkv, qkv_dot), start, step, finish, out
    )
    return _heads_first(o_HCK), _heads_first(o_dot_HCK), Statistics(*statistics)


def pair_backward(
    qkv: QKV,
    qkv_dot: QKV,
    outputs: tuple[Array, Array, Statistics],
    o_bar: Array,
    o_dot_bar: Array,
    geometry: ChunkGeometry,
) -> tuple[QKV, QKV]:
    """Cotangents of `qkv` and `qkv_dot`, from those of o and of o's tangent.

    outputs: of `pair_forward`. Buffered keys have no tangents, so these have no cotangents.
    """
    (o, o_dot, statistics), accum_dtype, scale = outputs, _accum_dtype(qkv), _scale(qkv)
    arrays_HCK = [_heads_first(x) for x in (qkv.q, qkv_dot.q, o_bar, o_dot_bar)]
    delta_HC = _dot(o_bar, o, accum_dtype) + _dot(o_dot_bar, o_dot, accum_dtype)
    arrays_HC = (*statistics, delta_HC, _dot(o_dot_bar, o, accum_dtype))

    def step(rows: Tile, keys: KVGroup, mask: Array, need_kv_grads: bool) -> tuple[Arrays, Arrays]:
        del need_kv_grads  # always True
        q, q_dot, o_bar, o_dot_bar = (take_tile(x, rows, -2) for x in arrays_HCK)
        logsumexp, mean_dot, delta, delta_dot = (
            take_tile(x, rows, -1)[..., None] for x in arrays_HC
        )
        prob = jnp.exp(_scores(q, keys, mask, accum_dtype) - logsumexp)
        score_dot = _score_tangents(q, q_dot, keys, accum_dtype) - mean_dot
        # b as in the package docstring
        b = _query_key_dot(o_dot_bar, keys.v, accum_dtype) - delta_dot
        prob_bar = _query_key_dot(o_bar, keys.v, accum_dtype) - delta + score_dot * b
        if keys.v_dot is not None:
            prob_bar += _query_key_dot(o_dot_bar, keys.v_dot, accum_dtype)
        score_bar, score_dot_bar = prob * prob_bar * scale, prob * b * scale
        q_bar, q_dot_bar = _sum_over_keys(score_bar, keys.k), _sum_over_keys(score_dot_bar, keys.k)
        sum_queries = partial(_sum_over_queries, y=keys.k)
        k_bar = sum_queries(score_bar, q) + sum_queries(score_dot_bar, q_dot)
        v_bar = sum_queries(prob, o_bar) + sum_queries(prob * score_dot, o_dot_bar)
        if keys.k_dot is None:
            return (q_bar, q_dot_bar), (k_bar, v_bar)
        q_bar += _sum_over_keys(score_dot_bar, keys.k_dot)
        k_dot_bar, v_dot_bar = sum_queries(score_dot_bar, q), sum_queries(prob, o_dot_bar)
        return (q_bar, q_dot_bar), (k_bar, v_bar, k_dot_bar, v_dot_bar)

    kv_groups = _kv_groups(qkv, qkv_dot)
    zeros = jnp.zeros(arrays_HCK[0].shape, accum_dtype)
    key_sums = [_zeros(*(x for x in kv_group[1:] if x is not None)) for kv_group in kv_groups]
    q_bars, (buffered, chunk) = scan_key_tiles(geometry, kv_groups, step, (zeros, zeros), key_sums)
    q_bar, q_dot_bar = (_heads_first(x).astype(qkv.q.dtype) for x in q_bars)
    return QKV(q_bar, *buffered, *chunk[:2]), QKV(q_dot_bar, None, None, *chunk[2:])


def _accum_dtype(qkv: QKV) -> jnp.dtype:
    return jnp.promote_types(qkv.q.dtype, jnp.float32)


def _scale(qkv: QKV) -> float:
    return qkv.q.shape[-1] ** -0.5


def _heads_first(x: Array) -> Array:
    """[..., C, H, K] to [..., H, C, K], and back."""
    return jnp.swapaxes(x, -2, -3)


def _zeros(*arrays: Array) -> tuple[Array, ...]:
    return tuple(jnp.zeros_like(x) for x in arrays)


def _kv_groups(qkv: QKV, qkv_dot: QKV | None = None) -> tuple[KVGroup, KVGroup]:
    """Buffered and chunk keys, the latter with their tangents."""
    chunk_dot = qkv_dot[3:] if qkv_dot else ()
    return (
        KVGroup(-qkv.k_buffered.shape[-3], qkv.k_buffered, qkv.v_buffered),
        KVGroup(0, qkv.k_chunk, qkv.v_chunk, *chunk_dot),
    )


def _query_key_dot(x: Array, y: Array, accum_dtype: jnp.dtype) -> Array:
    """[..., H, Q, S]: rows [..., H, Q, K] times keys or values [..., S, G, K]."""
    product = jnp.einsum(
        "...gqk,...sgk->...gqs", _fold_heads(x, y), y, preferred_element_type=accum_dtype
    )
    return product.reshape(*x.shape[:-1], y.shape[-3])


def _sum_over_keys(weight: Array, y: Array) -> Array:
    """[..., H, Q, K]: sum of y [..., S, G, K] weighted by [..., H, Q, S], cast to y's dtype."""
    folded = _fold_heads(weight, y).astype(y.dtype)
    out = jnp.einsum("...gqs,...sgk->...gqk", folded, y, preferred_element_type=weight.dtype)
    return out.reshape(*weight.shape[:-1], y.shape[-1])


def _sum_over_queries(weight: Array, x: Array, y: Array) -> Array:
    """[..., G, S, K]: sum of x [..., H, Q, K] weighted by [..., H, Q, S], cast to x's dtype.

    y: the keys or values that it belongs to, [..., S, G, K].
    """
    weight_GQS, x_GQK = _fold_heads(weight, y).astype(x.dtype), _fold_heads(x, y)
    return jnp.einsum(
        "...gqs,...gqk->...gsk", weight_GQS, x_GQK, preferred_element_type=weight.dtype
    )


def _fold_heads(x: Array, y: Array) -> Array:
    """[..., H, Q, N] as [..., G, H / G x Q, N], for the G heads of y [..., S, G, K]."""
    return x.reshape(*x.shape[:-3], y.shape[-2], -1, x.shape[-1])


def _dot(x: Array, y: Array, accum_dtype: jnp.dtype) -> Array:
    """[..., H, C]: inner products of two arrays [..., C, H, K]."""
    return jnp.einsum("...chk,...chk->...hc", x, y, preferred_element_type=accum_dtype)


def _scores(q: Array, keys: KVGroup, mask: Array, accum_dtype: jnp.dtype) -> Array:
    score = _query_key_dot(q, keys.k, accum_dtype) * q.shape[-1] ** -0.5
    return jnp.where(mask, score, MASKED_SCORE)


def _score_tangents(q: Array, q_dot: Array, keys: KVGroup, accum_dtype: jnp.dtype) -> Array:
    score_dot = _query_key_dot(q_dot, keys.k, accum_dtype)
    if keys.k_dot is not None:
        score_dot += _query_key_dot(q, keys.k_dot, accum_dtype)
    return score_dot * q.shape[-1] ** -0.5


def _online_softmax(row_max: Array, score: Array) -> tuple[Array, Array, Array]:
    """New running maximum, rescale factor of earlier sums, and exp(score - maximum)."""
    new = jnp.maximum(row_max, jnp.max(score, axis=-1))
    return new, jnp.exp(row_max - new), jnp.exp(score - new[..., None])
