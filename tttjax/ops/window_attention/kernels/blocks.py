"""Math of one tile of one head; the docstring of `window_attention` derives the formulas.

Shapes: queries [K, Q], numbers per query [1, Q], keys and values [K, S], scores [S, Q].
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from tttjax.ops.attention.attend import MASKED_SCORE
from tttjax.ops.window_attention.functions import INITIAL_MAX
from tttjax.types import Array


class Keys(NamedTuple):
    """A block of keys and values; only the chunk's can have tangents."""

    k: Array
    v: Array
    k_dot: Array | None = None
    v_dot: Array | None = None


class TileCotangents(NamedTuple):
    """Of one tile, [S, Q]: probabilities, cotangents of the scores and of their tangents, and the
    centred score tangents."""

    prob: Array
    score_bar: Array
    score_dot_bar: Array
    score_dot: Array


def accum_dtype(x: Array) -> jnp.dtype:
    """Accumulation dtype: at least float32."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _scale(q: Array) -> Array:
    """Scale of the scores; typed, since a Python number is a float64 under x64."""
    return jnp.asarray(q.shape[0] ** -0.5, accum_dtype(q))


def _matmul(x: Array, y: Array, contract_dims: tuple[int, int]) -> Array:
    left, right = contract_dims
    numbers = (((left,), (right,)), ((), ()))
    return lax.dot_general(x, y, numbers, preferred_element_type=accum_dtype(x))


def key_query_dot(x_KS: Array, y_KQ: Array) -> Array:
    """[S, Q]: inner products of keys or values with queries or their cotangents."""
    return _matmul(x_KS, y_KQ, (0, 0))


def sum_over_keys(y_KS: Array, weight_SQ: Array) -> Array:
    """[K, Q]: weighted sum over keys; weights are cast to the dtype of y."""
    return _matmul(y_KS, weight_SQ.astype(y_KS.dtype), (1, 0))


def sum_over_queries(x_KQ: Array, weight_SQ: Array) -> Array:
    """[K, S]: weighted sum over queries; weights are cast to the dtype of x."""
    return _matmul(x_KQ, weight_SQ.astype(x_KQ.dtype), (1, 1))


def scores(q: Array, keys: Keys, mask: Array) -> Array:
    """Scores [S, Q]; MASKED_SCORE where masked."""
    score = key_query_dot(keys.k, q) * _scale(q)
    return jnp.where(mask, score, jnp.asarray(MASKED_SCORE, score.dtype))


def score_tangents(q: Array, q_dot: Array, keys: Keys) -> Array:
    """Tangents of the scores [S, Q], along those of queries and keys."""
    score_dot = key_query_dot(keys.k, q_dot)
    if keys.k_dot is not None:
        score_dot += key_query_dot(keys.k_dot, q)
    return score_dot * _scale(q)


# --- forward ------------------------------------------------------------------------------------


Carry = tuple[Array, ...]
Rows = tuple[Array, ...]


def start_forward(rows: Rows) -> Carry:
    """Initial (running maximum, sum of weights, weighted sum of values). rows: q, ..."""
    q, *_ = rows
    zeros = jnp.zeros((1, q.shape[1]), accum_dtype(q))
    return jnp.full_like(zeros, INITIAL_MAX), zeros, jnp.zeros(q.shape, accum_dtype(q))


def step_forward(carry: Carry, rows: Rows, keys: Keys, mask: Array) -> Carry:
    """Online-softmax update with one block of keys."""
    row_max, row_sum, sum_o = carry
    row_max, rescale, weight = _online_softmax(row_max, scores(rows[0], keys, mask))
    row_sum = row_sum * rescale + jnp.sum(weight, axis=0, keepdims=True)
    return row_max, row_sum, sum_o * rescale + sum_over_keys(keys.v, weight)


def finish_forward(carry: Carry) -> Carry:
    """o and the scores' log-sum-exp."""
    row_max, row_sum, sum_o = carry
    return sum_o / row_sum, row_max + jnp.log(row_sum)


def start_pair(rows: Rows) -> Carry:
    """`start_forward` with running mean of score tangents and tangent of the weighted sum."""
    row_max, row_sum, sum_o = start_forward(rows)
    return row_max, row_sum, row_sum, sum_o, sum_o


def step_pair(carry: Carry, rows: Rows, keys: Keys, mask: Array) -> Carry:
    """Online-softmax update with one block of keys; rows: q and its tangent.

    Score tangents are centred on their running mean.
    """
    (q, q_dot), (row_max, row_sum, mean_dot, sum_o, sum_dot) = rows, carry
    row_max, rescale, weight = _online_softmax(row_max, scores(q, keys, mask))
    score_dot = score_tangents(q, q_dot, keys)
    row_sum = row_sum * rescale + jnp.sum(weight, axis=0, keepdims=True)
    shift = jnp.sum(weight * (score_dot - mean_dot), axis=0, keepdims=True)
    shift = shift / jnp.where(row_sum > 0, row_sum, jnp.ones_like(row_sum))
    mean_dot = mean_dot + shift
    sum_dot = (sum_dot - shift * sum_o) * rescale
    sum_dot += sum_over_keys(keys.v, weight * (score_dot - mean_dot))
    if keys.v_dot is not None:
        sum_dot += sum_over_keys(keys.v_dot, weight)
    return row_max, row_sum, mean_dot, sum_o * rescale + sum_over_keys(keys.v, weight), sum_dot


def finish_pair(carry: Carry) -> Carry:
    """o, its tangent, the scores' log-sum-exp and the mean of their tangents."""
    row_max, row_sum, mean_dot, sum_o, sum_dot = carry
    return sum_o / row_sum, sum_dot / row_sum, row_max + jnp.log(row_sum), mean_dot


def _online_softmax(row_max: Array, score: Array) -> tuple[Array, Array, Array]:
    """New running maximum, rescale factor of earlier sums, and exp(score - maximum)."""
    new = jnp.maximum(row_max, jnp.max(score, axis=0, keepdims=True))
    return new, jnp.exp(row_max - new), jnp.exp(score - new)


# --- backward -----------------------------------------------------------------------------------


def score_cotangents(rows: Rows, keys: Keys, mask: Array) -> tuple[Array, Array]:
    """(probabilities, cotangents of the scores); rows: q, o_bar, logsumexp, delta = o_bar . o."""
    q, o_bar, logsumexp, delta = rows
    prob = jnp.exp(scores(q, keys, mask) - logsumexp)
    return prob, prob * (key_query_dot(keys.v, o_bar) - delta) * _scale(q)


def pair_cotangents(rows: Rows, keys: Keys, mask: Array) -> TileCotangents:
    """The same for the pair; rows: q, q_dot, o_bar, o_dot_bar, logsumexp, mean_dot,
    delta = o_bar . o + o_dot_bar . o_dot, delta_dot = o_dot_bar . o."""
    q, q_dot, o_bar, o_dot_bar, logsumexp, mean_dot, delta, delta_dot = rows
    scale = _scale(q)
    prob = jnp.exp(scores(q, keys, mask) - logsumexp)
    score_dot = score_tangents(q, q_dot, keys) - mean_dot
    b = key_query_dot(keys.v, o_dot_bar) - delta_dot
    prob_bar = key_query_dot(keys.v, o_bar) - delta + score_dot * b
    if keys.v_dot is not None:
        prob_bar += key_query_dot(keys.v_dot, o_dot_bar)
    return TileCotangents(prob, prob * prob_bar * scale, prob * b * scale, score_dot)
