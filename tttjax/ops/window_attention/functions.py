"""The four functions of window attention, each in one pass over blocks of queries and keys.

What they compute is derived in the package's docstring, and `rules` makes derivatives of them. The
scores exist only for one block of queries against one block of keys at a time. The loops have
bounds that depend on the position, so nothing here can be differentiated in reverse.
"""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from tttjax.ops.attention.attend import MASKED_SCORE
from tttjax.ops.window_attention.tiles import ChunkGeometry, KVGroup, by_keys, by_queries, cut
from tttjax.types import Array

FLOOR = MASKED_SCORE / 2  # below every score, and so far above masked ones that exp gives 0


class QKV(NamedTuple):
    """What attention reads, or tangents or cotangents of it (None: there is none).

    q: [..., C, H, K], a chunk of queries. k_own, v_own: [..., C, G, K], their keys and values, of
    which each of the G heads serves H / G query heads in a row.
    k_past, v_past: [..., W, G, K], those of the W tokens before the chunk.
    """

    q: Any
    k_past: Any
    v_past: Any
    k_own: Any
    v_own: Any


class Statistics(NamedTuple):
    """Per query, [..., H, C], in float32 at least: enough to compute a block again.

    logsumexp: of the scores. mean_dot: mean of the scores' tangents under the probabilities.
    """

    logsumexp: Array
    mean_dot: Array


def forward(chunk: QKV, view: ChunkGeometry) -> tuple[Array, Array]:
    """o [..., C, H, K] in the dtype of v, and the scores' logsumexp [..., H, C]."""
    q_HCK, wide = _heads_first(chunk.q), _wide(chunk)

    def start(rows):
        q = cut(q_HCK, rows, -2)
        none = jnp.zeros(q.shape[:-1], wide)
        return q, (none + FLOOR, none, jnp.zeros(q.shape, wide))

    def step(q, carry, keys, seen):
        highest, total, sum_o = carry
        highest, fade, weight = _online(highest, _scores(q, keys, seen, wide))
        total = total * fade + jnp.sum(weight, axis=-1)
        sum_o = sum_o * fade[..., None] + _weigh(weight, keys.v)
        return highest, total, sum_o

    def finish(carry):
        highest, total, sum_o = carry
        return sum_o / total[..., None], highest + jnp.log(total)

    out = jnp.zeros(q_HCK.shape, chunk.v_own.dtype), jnp.zeros(q_HCK.shape[:-1], wide)
    o_HCK, logsumexp_HC = by_queries(view, _sides(chunk), start, step, finish, out)
    return _heads_first(o_HCK), logsumexp_HC


def backward(
    chunk: QKV, o: Array, logsumexp_HC: Array, o_bar: Array, view: ChunkGeometry, past: bool
) -> QKV:
    """Cotangents of the chunk from that of o; of past keys and values only if `past`."""
    wide, scale = _wide(chunk), _scale(chunk)
    q_HCK, bar_HCK = _heads_first(chunk.q), _heads_first(o_bar)
    level_HC = _dot(o_bar, o, wide)

    def step(rows, keys, seen, wanted):
        q, bar = cut(q_HCK, rows, -2), cut(bar_HCK, rows, -2)
        logsumexp, level = (cut(x, rows, -1)[..., None] for x in (logsumexp_HC, level_HC))
        weight = jnp.exp(_scores(q, keys, seen, wide) - logsumexp)
        score_bar = weight * (_product(bar, keys.v, wide) - level) * scale
        for_rows = (_weigh(score_bar, keys.k),)
        if not wanted:
            return for_rows, ()
        return for_rows, (_collect(score_bar, q, keys.k), _collect(weight, bar, keys.v))

    nothing = (jnp.zeros(q_HCK.shape, wide),)
    past_zeros = _zeros(chunk.k_past, chunk.v_past) if past else ()
    to_keys = past_zeros, _zeros(chunk.k_own, chunk.v_own)
    (q_bar,), (past_bar, own_bar) = by_keys(view, _sides(chunk), step, nothing, to_keys)
    q_bar = _heads_first(q_bar).astype(chunk.q.dtype)
    return QKV(q_bar, *(past_bar or (None, None)), *own_bar)


def pair_forward(chunk: QKV, dot: QKV, view: ChunkGeometry) -> tuple[Array, Array, Statistics]:
    """o, its tangent along `dot` (both [..., C, H, K]), and what the backward pass needs.

    The scores' tangents are counted from their mean so far, which moves as blocks are added: a
    constant added to all of them changes nothing, and so costs no precision.
    """
    q_HCK, q_dot_HCK, wide = _heads_first(chunk.q), _heads_first(dot.q), _wide(chunk)

    def start(rows):
        q, q_dot = cut(q_HCK, rows, -2), cut(q_dot_HCK, rows, -2)
        none, nothing = jnp.zeros(q.shape[:-1], wide), jnp.zeros(q.shape, wide)
        return (q, q_dot), (none + FLOOR, none, none, nothing, nothing)

    def step(queries, carry, keys, seen):
        highest, total, mean_dot, sum_o, sum_dot = carry
        highest, fade, weight = _online(highest, _scores(queries[0], keys, seen, wide))
        score_dot = _score_tangents(queries[0], queries[1], keys, wide)
        total = total * fade + jnp.sum(weight, axis=-1)
        moved = jnp.sum(weight * (score_dot - mean_dot[..., None]), axis=-1)
        moved = moved / jnp.where(total > 0, total, 1)
        mean_dot = mean_dot + moved
        sum_dot = (sum_dot - moved[..., None] * sum_o) * fade[..., None]
        sum_dot += _weigh(weight * (score_dot - mean_dot[..., None]), keys.v)
        if keys.v_dot is not None:
            sum_dot += _weigh(weight, keys.v_dot)
        sum_o = sum_o * fade[..., None] + _weigh(weight, keys.v)
        return highest, total, mean_dot, sum_o, sum_dot

    def finish(carry):
        highest, total, mean_dot, sum_o, sum_dot = carry
        o, o_dot = sum_o / total[..., None], sum_dot / total[..., None]
        return o, o_dot, highest + jnp.log(total), mean_dot

    o, per_query = jnp.zeros(q_HCK.shape, chunk.v_own.dtype), jnp.zeros(q_HCK.shape[:-1], wide)
    out = o, o, per_query, per_query
    o_HCK, o_dot_HCK, *rest = by_queries(view, _sides(chunk, dot), start, step, finish, out)
    return _heads_first(o_HCK), _heads_first(o_dot_HCK), Statistics(*rest)


def pair_backward(
    chunk: QKV,
    dot: QKV,
    outputs: tuple[Array, Array, Statistics],
    o_bar: Array,
    o_dot_bar: Array,
    view: ChunkGeometry,
) -> tuple[QKV, QKV]:
    """Cotangents of the chunk and of its tangents, from those of o and of o's tangent.

    outputs: what `pair_forward` gave. Where `dot` has no tangent there is no cotangent of it.
    """
    (o, o_dot, statistics), wide, scale = outputs, _wide(chunk), _scale(chunk)
    rows_HCK = [_heads_first(x) for x in (chunk.q, dot.q, o_bar, o_dot_bar)]
    level_HC = _dot(o_bar, o, wide) + _dot(o_dot_bar, o_dot, wide)
    rows_HC = (*statistics, level_HC, _dot(o_dot_bar, o, wide))

    def step(rows, keys, seen, wanted):
        del wanted  # all sides want theirs
        q, q_dot, bar, dot_bar = (cut(x, rows, -2) for x in rows_HCK)
        logsumexp, mean_dot, level, dot_level = (cut(x, rows, -1)[..., None] for x in rows_HC)
        weight = jnp.exp(_scores(q, keys, seen, wide) - logsumexp)
        score_dot = _score_tangents(q, q_dot, keys, wide) - mean_dot
        slope = _product(dot_bar, keys.v, wide) - dot_level
        weight_bar = _product(bar, keys.v, wide) - level + score_dot * slope
        if keys.v_dot is not None:
            weight_bar += _product(dot_bar, keys.v_dot, wide)
        score_bar, score_dot_bar = weight * weight_bar * scale, weight * slope * scale
        q_bar, q_dot_bar = _weigh(score_bar, keys.k), _weigh(score_dot_bar, keys.k)
        collect = partial(_collect, y=keys.k)
        k_bar = collect(score_bar, q) + collect(score_dot_bar, q_dot)
        v_bar = collect(weight, bar) + collect(weight * score_dot, dot_bar)
        if keys.k_dot is None:
            return (q_bar, q_dot_bar), (k_bar, v_bar)
        q_bar += _weigh(score_dot_bar, keys.k_dot)
        k_dot_bar, v_dot_bar = collect(score_dot_bar, q), collect(weight, dot_bar)
        return (q_bar, q_dot_bar), (k_bar, v_bar, k_dot_bar, v_dot_bar)

    sides = _sides(chunk, dot)
    nothing = jnp.zeros(rows_HCK[0].shape, wide)
    to_keys = [_zeros(*(x for x in side[1:] if x is not None)) for side in sides]
    to_rows, (past, own) = by_keys(view, sides, step, (nothing, nothing), to_keys)
    q_bar, q_dot_bar = (_heads_first(x).astype(chunk.q.dtype) for x in to_rows)
    past_dot = past[2:] or (None, None)
    return QKV(q_bar, *past[:2], *own[:2]), QKV(q_dot_bar, *past_dot, *own[2:])


def _wide(chunk: QKV) -> jnp.dtype:
    return jnp.promote_types(chunk.q.dtype, jnp.float32)


def _scale(chunk: QKV) -> float:
    return chunk.q.shape[-1] ** -0.5


def _heads_first(x: Array) -> Array:
    """[..., C, H, K] to [..., H, C, K], and back."""
    return jnp.swapaxes(x, -2, -3)


def _zeros(*arrays: Array) -> tuple[Array, ...]:
    return tuple(jnp.zeros_like(x) for x in arrays)


def _sides(chunk: QKV, dot: QKV | None = None) -> tuple[KVGroup, KVGroup]:
    """Past and own keys; a tangent of k without one of v, or the reverse, is not provided for."""
    dot = dot or QKV(None, None, None, None, None)
    return (
        KVGroup(-chunk.k_past.shape[-3], chunk.k_past, chunk.v_past, dot.k_past, dot.v_past),
        KVGroup(0, chunk.k_own, chunk.v_own, dot.k_own, dot.v_own),
    )


def _product(x: Array, y: Array, wide: jnp.dtype) -> Array:
    """[..., H, Q, S], of rows [..., H, Q, K] with keys or values [..., S, G, K]."""
    product = jnp.einsum("...gqk,...sgk->...gqs", _fold(x, y), y, preferred_element_type=wide)
    return product.reshape(*x.shape[:-1], y.shape[-3])


def _weigh(weight: Array, y: Array) -> Array:
    """[..., H, Q, K], values or keys summed with weights [..., H, Q, S] in the dtype of y."""
    folded = _fold(weight, y).astype(y.dtype)
    total = jnp.einsum("...gqs,...sgk->...gqk", folded, y, preferred_element_type=weight.dtype)
    return total.reshape(*weight.shape[:-1], y.shape[-1])


def _collect(weight: Array, x: Array, y: Array) -> Array:
    """[..., G, S, K], rows [..., H, Q, K] summed with weights [..., H, Q, S] in the dtype of x.

    y: the keys that it is for, [..., S, G, K].
    """
    weight_GQS, x_GQK = _fold(weight, y).astype(x.dtype), _fold(x, y)
    return jnp.einsum(
        "...gqs,...gqk->...gsk", weight_GQS, x_GQK, preferred_element_type=weight.dtype
    )


def _fold(x: Array, y: Array) -> Array:
    """[..., H, Q, N] as [..., G, H / G x Q, N], by the heads of y, [..., S, G, K]."""
    return x.reshape(*x.shape[:-3], y.shape[-2], -1, x.shape[-1])


def _dot(x: Array, y: Array, wide: jnp.dtype) -> Array:
    """[..., H, C], of two arrays [..., C, H, K]."""
    return jnp.einsum("...chk,...chk->...hc", x, y, preferred_element_type=wide)


def _scores(q: Array, keys: KVGroup, seen: Array, wide: jnp.dtype) -> Array:
    score = _product(q, keys.k, wide) * q.shape[-1] ** -0.5
    return jnp.where(seen, score, MASKED_SCORE)


def _score_tangents(q: Array, q_dot: Array, keys: KVGroup, wide: jnp.dtype) -> Array:
    score_dot = _product(q_dot, keys.k, wide)
    if keys.k_dot is not None:
        score_dot += _product(q, keys.k_dot, wide)
    return score_dot * q.shape[-1] ** -0.5


def _online(highest: Array, score: Array) -> tuple[Array, Array, Array]:
    """The highest score with a new block, what earlier sums are worth now, and its weights."""
    new = jnp.maximum(highest, jnp.max(score, axis=-1))
    return new, jnp.exp(highest - new), jnp.exp(score - new[..., None])
