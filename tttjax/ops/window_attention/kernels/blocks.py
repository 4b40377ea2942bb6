"""What the four functions do with one block of queries and one of keys of one head.

Queries and what belongs to them are [K, Q], numbers per query [1, Q], keys and values [K, S], and
scores [S, Q]. The formulas are those of the package `window_attention`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from tttjax.ops.attention.attend import MASKED_SCORE
from tttjax.types import Array

FLOOR = MASKED_SCORE / 2  # below every score, and so far above masked ones that exp gives 0


class Keys(NamedTuple):
    """A block of keys and values, with their tangents (None: constants)."""

    k: Array
    v: Array
    k_dot: Array | None
    v_dot: Array | None


class Bars(NamedTuple):
    """Of one block, [S, Q]: probabilities, cotangents of scores and of their tangents, and the
    scores' tangents counted from their mean."""

    weight: Array
    score_bar: Array
    score_dot_bar: Array
    score_dot: Array


def wide(x: Array) -> jnp.dtype:
    """What sums are taken in."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _scale(q: Array) -> Array:
    """Of the scores; typed, since a Python number is a float64 where those are switched on."""
    return jnp.asarray(q.shape[0] ** -0.5, wide(q))


def _product(x: Array, y: Array, contracted: tuple[int, int]) -> Array:
    left, right = contracted
    numbers = (((left,), (right,)), ((), ()))
    return lax.dot_general(x, y, numbers, preferred_element_type=wide(x))


def across(x_KS: Array, y_KQ: Array) -> Array:
    """[S, Q], products of every key with every query."""
    return _product(x_KS, y_KQ, (0, 0))


def to_queries(y_KS: Array, weight_SQ: Array) -> Array:
    """[K, Q], sums over keys, in the dtype of y."""
    return _product(y_KS, weight_SQ.astype(y_KS.dtype), (1, 0))


def to_keys(x_KQ: Array, weight_SQ: Array) -> Array:
    """[K, S], sums over queries, in the dtype of x."""
    return _product(x_KQ, weight_SQ.astype(x_KQ.dtype), (1, 1))


def scores(q: Array, keys: Keys, seen: Array) -> Array:
    """[S, Q]; MASKED_SCORE where nothing is seen."""
    score = across(keys.k, q) * _scale(q)
    return jnp.where(seen, score, jnp.asarray(MASKED_SCORE, score.dtype))


def score_tangents(q: Array, q_dot: Array, keys: Keys) -> Array:
    """[S, Q], of the scores along the tangents of queries and keys."""
    score_dot = across(keys.k, q_dot)
    if keys.k_dot is not None:
        score_dot += across(keys.k_dot, q)
    return score_dot * _scale(q)


# --- forward ------------------------------------------------------------------------------------


Carry = tuple[Array, ...]
Rows = tuple[Array, ...]


def start_forward(rows: Rows) -> Carry:
    """(highest score, sum of weights, weighted values): nothing seen yet. rows: q, ..."""
    q, *_ = rows
    none = jnp.zeros((1, q.shape[1]), wide(q))
    return jnp.full_like(none, FLOOR), none, jnp.zeros(q.shape, wide(q))


def step_forward(carry: Carry, rows: Rows, keys: Keys, seen: Array) -> Carry:
    """With a block more."""
    highest, total, sum_o = carry
    highest, fade, weight = _online(highest, scores(rows[0], keys, seen))
    total = total * fade + jnp.sum(weight, axis=0, keepdims=True)
    return highest, total, sum_o * fade + to_queries(keys.v, weight)


def finish_forward(carry: Carry) -> Carry:
    """o and the scores' logsumexp."""
    highest, total, sum_o = carry
    return sum_o / total, highest + jnp.log(total)


def start_pair(rows: Rows) -> Carry:
    """The same with (mean of the scores' tangents, tangent of the weighted values)."""
    highest, total, sum_o = start_forward(rows)
    return highest, total, total, sum_o, sum_o


def step_pair(carry: Carry, rows: Rows, keys: Keys, seen: Array) -> Carry:
    """With a block more; rows: q and its tangent.

    The scores' tangents are counted from their mean so far, which moves.
    """
    (q, q_dot), (highest, total, mean_dot, sum_o, sum_dot) = rows, carry
    highest, fade, weight = _online(highest, scores(q, keys, seen))
    score_dot = score_tangents(q, q_dot, keys)
    total = total * fade + jnp.sum(weight, axis=0, keepdims=True)
    moved = jnp.sum(weight * (score_dot - mean_dot), axis=0, keepdims=True)
    moved = moved / jnp.where(total > 0, total, jnp.ones_like(total))
    mean_dot = mean_dot + moved
    sum_dot = (sum_dot - moved * sum_o) * fade
    sum_dot += to_queries(keys.v, weight * (score_dot - mean_dot))
    if keys.v_dot is not None:
        sum_dot += to_queries(keys.v_dot, weight)
    return highest, total, mean_dot, sum_o * fade + to_queries(keys.v, weight), sum_dot


def finish_pair(carry: Carry) -> Carry:
    """o, its tangent, the scores' logsumexp and the mean of their tangents."""
    highest, total, mean_dot, sum_o, sum_dot = carry
    return sum_o / total, sum_dot / total, highest + jnp.log(total), mean_dot


def _online(highest: Array, score: Array) -> tuple[Array, Array, Array]:
    """The highest score with a new block, what earlier sums are worth now, and its weights."""
    new = jnp.maximum(highest, jnp.max(score, axis=0, keepdims=True))
    return new, jnp.exp(highest - new), jnp.exp(score - new)


# --- backward -----------------------------------------------------------------------------------


def bars(rows: Rows, keys: Keys, seen: Array) -> tuple[Array, Array]:
    """(probabilities, cotangents of the scores); rows: q, o_bar, logsumexp, o_bar . o."""
    q, bar, logsumexp, level = rows
    weight = jnp.exp(scores(q, keys, seen) - logsumexp)
    return weight, weight * (across(keys.v, bar) - level) * _scale(q)


def pair_bars(rows: Rows, keys: Keys, seen: Array) -> Bars:
    """rows: q, its tangent, o_bar, o_dot_bar, logsumexp, mean_dot, o_bar . o + o_dot_bar . o_dot,
    o_dot_bar . o."""
    q, q_dot, bar, dot_bar, logsumexp, mean_dot, level, dot_level = rows
    scale = _scale(q)
    weight = jnp.exp(scores(q, keys, seen) - logsumexp)
    score_dot = score_tangents(q, q_dot, keys) - mean_dot
    slope = across(keys.v, dot_bar) - dot_level
    weight_bar = across(keys.v, bar) - level + score_dot * slope
    if keys.v_dot is not None:
        weight_bar += across(keys.v_dot, dot_bar)
    return Bars(weight, weight * weight_bar * scale, weight * slope * scale, score_dot)
