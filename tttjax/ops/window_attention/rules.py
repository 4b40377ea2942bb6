"""Window attention with derivatives of its own: the three forms in which it can be asked for."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from tttjax.ops.attention.attend import AttentionMask
from tttjax.ops.window_attention import select
from tttjax.ops.window_attention.functions import QKV
from tttjax.ops.window_attention.tiles import AUTO, Tiling
from tttjax.types import Array


def window_attention(
    q_CHK: Array,
    k_past_WHK: Array,
    v_past_WHK: Array,
    k_own_CHK: Array,
    v_own_CHK: Array,
    position: Array,
    attention_mask: AttentionMask,
    tiling: Tiling = AUTO,
    kernel: str = "auto",
) -> Array:
    """Attention of a chunk to itself and to the W keys before it, [..., C, H, K], for `jax.grad`.

    Any leading dimensions are sequences that stand at the same `position` (tokens before the
    chunk; int, may be traced). Keys are in the order of the sequence; of the past, only those count
    that exist (the last `position`) and that `attention_mask` lets a query see. The same numbers as
    `tttjax.ops.attention.attend.attend` over both groups of keys, in memory linear in C + W.

    Reverse mode, once. Past keys and values that are not differentiated cost nothing.
    kernel: "auto", "xla" or "pallas" (see `select`).
    """
    chunk = QKV(q_CHK, k_past_WHK, v_past_WHK, k_own_CHK, v_own_CHK)
    return _once(*chunk, position, attention_mask, tiling, kernel)


def window_attention_jvp(
    q_CHK: Array,
    k_past_WHK: Array,
    v_past_WHK: Array,
    k_own_CHK: Array,
    v_own_CHK: Array,
    position: Array,
    attention_mask: AttentionMask,
    tiling: Tiling = AUTO,
    kernel: str = "auto",
) -> Array:
    """The same as `window_attention`, for `jax.jvp`, and for `jax.grad` of a `jax.jvp` of it.

    Not for `jax.grad` of itself: only what its tangent rule calls, `window_attention_pair`, can be
    differentiated in reverse. Past keys and values without a tangent cost nothing for one.
    """
    chunk = QKV(q_CHK, k_past_WHK, v_past_WHK, k_own_CHK, v_own_CHK)
    return _twice(*chunk, position, attention_mask, tiling, kernel)


def window_attention_pair(
    chunk: QKV,
    dot: QKV,
    position: Array,
    attention_mask: AttentionMask,
    tiling: Tiling = AUTO,
    kernel: str = "auto",
) -> tuple[Array, Array]:
    """(o, o's tangent along `dot`), for `jax.grad`: reverse mode, once, in all that is in either.

    `dot` has None for past keys and values that have no tangent (both or neither).
    """
    return _pair(chunk, dot, position, attention_mask, tiling, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _once(q, k_past, v_past, k_own, v_own, position, attention_mask, tiling, kernel):
    chunk = QKV(q, k_past, v_past, k_own, v_own)
    return select.forward(chunk, position, attention_mask, tiling, kernel)[0]


def _once_forward(q, k_past, v_past, k_own, v_own, position, attention_mask, tiling, kernel):
    arguments = q, k_past, v_past, k_own, v_own
    chunk = QKV(*(x.value for x in arguments))
    o, logsumexp = select.forward(chunk, position.value, attention_mask, tiling, kernel)
    # Told by its structure, since a residual's value is unknown while the program is written.
    past = () if k_past.perturbed or v_past.perturbed else None
    return o, (chunk, position.value, o, logsumexp, past)


def _once_backward(attention_mask, tiling, kernel, residuals, o_bar):
    chunk, position, o, logsumexp, past = residuals
    _same_shape(chunk.q, o)
    where = position, attention_mask, tiling, kernel
    bars = select.backward(chunk, o, logsumexp, _solid(o_bar), *where, past is not None)
    return *bars, None


_once.defvjp(_once_forward, _once_backward, symbolic_zeros=True)


@partial(jax.custom_jvp, nondiff_argnums=(6, 7, 8))
def _twice(q, k_past, v_past, k_own, v_own, position, attention_mask, tiling, kernel):
    chunk = QKV(q, k_past, v_past, k_own, v_own)
    return select.forward(chunk, position, attention_mask, tiling, kernel)[0]


def _twice_tangent(attention_mask, tiling, kernel, primals, tangents):
    *chunk, position = primals
    dot = QKV(*tangents[:-1])
    if isinstance(dot.k_past, SymbolicZero) and isinstance(dot.v_past, SymbolicZero):
        dot = dot._replace(k_past=None, v_past=None)
    dot = jax.tree.map(_solid, dot, is_leaf=_is_zero)
    return _pair(QKV(*chunk), dot, position, attention_mask, tiling, kernel)


_twice.defjvp(_twice_tangent, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _pair(chunk, dot, position, attention_mask, tiling, kernel):
    return select.pair_forward(chunk, dot, position, attention_mask, tiling, kernel)[:2]


def _pair_forward(chunk, dot, position, attention_mask, tiling, kernel):
    outputs = select.pair_forward(chunk, dot, position, attention_mask, tiling, kernel)
    return outputs[:2], (chunk, dot, position, outputs)


def _pair_backward(attention_mask, tiling, kernel, residuals, bars):
    chunk, dot, position, outputs = residuals
    _same_shape(chunk.q, dot.q, *outputs[:2])
    o_bar, o_dot_bar = bars
    where = position, attention_mask, tiling, kernel
    return *select.pair_backward(chunk, dot, outputs, o_bar, o_dot_bar, *where), None


_pair.defvjp(_pair_forward, _pair_backward)


def _is_zero(x: Any) -> bool:
    return isinstance(x, SymbolicZero)


def _solid(x: Any) -> Array:
    """A tangent or cotangent as an array, also where it is known to be 0."""
    return jnp.zeros(x.shape, x.dtype) if _is_zero(x) else x


def _same_shape(*arrays: Array) -> None:
    """Residuals arrive in the order in which they were saved."""
    assert len({x.shape for x in arrays}) == 1, [x.shape for x in arrays]
