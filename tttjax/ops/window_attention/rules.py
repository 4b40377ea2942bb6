"""Window attention with custom derivatives: entry points for `jax.grad`, `jax.jvp` and the pair."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from tttjax.errors import UserError
from tttjax.ops.attention.attend import AttentionMask
from tttjax.ops.window_attention import select
from tttjax.ops.window_attention.functions import QKV, Statistics
from tttjax.ops.window_attention.tiles import AUTO, Tiling
from tttjax.types import Array


def window_attention(
    q_CHK: Array,
    k_buffered_WHK: Array,
    v_buffered_WHK: Array,
    k_chunk_CHK: Array,
    v_chunk_CHK: Array,
    position: Array,
    attention_mask: AttentionMask,
    tiling: Tiling = AUTO,
    kernel: str = "auto",
) -> Array:
    """Attention of a chunk to itself and to W buffered keys, [..., C, H, K], for `jax.grad`.

    Leading dimensions are batch dimensions; all sequences are at the same `position` (tokens before
    the chunk; int, may be traced). Keys are in sequence order. Only the last `position` buffered
    keys are valid; `attention_mask` applies to all. Equal to `tttjax.ops.attention.attend.attend`
    over the buffered and the chunk's keys, with memory linear in C + W.

    Differentiable once, in reverse mode. Gradients of the buffer are computed only if requested.
    kernel: "auto", "xla" or "pallas" (see `select`).
    """
    qkv = QKV(q_CHK, k_buffered_WHK, v_buffered_WHK, k_chunk_CHK, v_chunk_CHK)
    return _blocked(*qkv, position, attention_mask, tiling, kernel)


def window_attention_jvp(
    q_CHK: Array,
    k_buffered_WHK: Array,
    v_buffered_WHK: Array,
    k_chunk_CHK: Array,
    v_chunk_CHK: Array,
    position: Array,
    attention_mask: AttentionMask,
    tiling: Tiling = AUTO,
    kernel: str = "auto",
) -> Array:
    """`window_attention` for `jax.jvp`, and for `jax.grad` of its `jax.jvp`.

    `jax.grad` of the function itself is not supported: only its JVP rule, `window_attention_pair`,
    has a reverse mode. Buffered keys and values have no tangents.
    """
    qkv = QKV(q_CHK, k_buffered_WHK, v_buffered_WHK, k_chunk_CHK, v_chunk_CHK)
    return _jvp(*qkv, position, attention_mask, tiling, kernel)


def window_attention_pair(
    qkv: QKV,
    qkv_dot: QKV,
    position: Array,
    attention_mask: AttentionMask,
    tiling: Tiling = AUTO,
    kernel: str = "auto",
) -> tuple[Array, Array]:
    """(o, tangent of o along `qkv_dot`), differentiable once, in reverse mode, in both arguments.

    `qkv_dot` has None for buffered keys and values, which have no tangents.
    """
    return _pair(qkv, qkv_dot, position, attention_mask, tiling, kernel)


# qkv, position, o, logsumexp, whether gradients of the buffer are requested: () or None
_BlockedResiduals = tuple[QKV, Array, Array, Array, tuple[()] | None]
# qkv, qkv_dot, position, the results of `select.pair_forward`
_PairResiduals = tuple[QKV, QKV, Array, tuple[Array, Array, Statistics]]


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _blocked(
    q: Array,
    k_buffered: Array,
    v_buffered: Array,
    k_chunk: Array,
    v_chunk: Array,
    position: Array,
    attention_mask: AttentionMask,
    tiling: Tiling,
    kernel: str,
) -> Array:
    qkv = QKV(q, k_buffered, v_buffered, k_chunk, v_chunk)
    return select.forward(qkv, position, attention_mask, tiling, kernel)[0]


def _blocked_forward(
    q: CustomVJPPrimal,
    k_buffered: CustomVJPPrimal,
    v_buffered: CustomVJPPrimal,
    k_chunk: CustomVJPPrimal,
    v_chunk: CustomVJPPrimal,
    position: CustomVJPPrimal,
    attention_mask: AttentionMask,
    tiling: Tiling,
    kernel: str,
) -> tuple[Array, _BlockedResiduals]:
    arguments = q, k_buffered, v_buffered, k_chunk, v_chunk
    qkv = QKV(*(x.value for x in arguments))
    o, logsumexp = select.forward(qkv, position.value, attention_mask, tiling, kernel)
    # Residuals are traced, so the tree structure carries this static flag.
    buffer_grads = () if k_buffered.perturbed or v_buffered.perturbed else None
    return o, (qkv, position.value, o, logsumexp, buffer_grads)


def _blocked_backward(
    attention_mask: AttentionMask,
    tiling: Tiling,
    kernel: str,
    residuals: _BlockedResiduals,
    o_bar: Array | SymbolicZero,
) -> tuple[Array | None, ...]:
    qkv, position, o, logsumexp, buffer_grads = residuals
    _assert_same_shape(qkv.q, o)
    options = position, attention_mask, tiling, kernel
    bars = select.backward(
        qkv, o, logsumexp, _instantiate(o_bar), *options, buffer_grads is not None
    )
    return *bars, None


_blocked.defvjp(_blocked_forward, _blocked_backward, symbolic_zeros=True)


@partial(jax.custom_jvp, nondiff_argnums=(6, 7, 8))
def _jvp(
    q: Array,
    k_buffered: Array,
    v_buffered: Array,
    k_chunk: Array,
    v_chunk: Array,
    position: Array,
    attention_mask: AttentionMask,
    tiling: Tiling,
    kernel: str,
) -> Array:
    qkv = QKV(q, k_buffered, v_buffered, k_chunk, v_chunk)
    return select.forward(qkv, position, attention_mask, tiling, kernel)[0]


def _jvp_rule(
    attention_mask: AttentionMask,
    tiling: Tiling,
    kernel: str,
    primals: tuple[Array, ...],
    tangents: tuple[Array | SymbolicZero, ...],
) -> tuple[Array, Array]:
    *qkv, position = primals
    q_dot, k_buffered_dot, v_buffered_dot, k_chunk_dot, v_chunk_dot, _ = tangents
    if not (_is_zero(k_buffered_dot) and _is_zero(v_buffered_dot)):
        raise UserError("Window attention has no tangent along buffered keys; use `attend`.")
    q_dot, k_chunk_dot, v_chunk_dot = map(_instantiate, (q_dot, k_chunk_dot, v_chunk_dot))
    qkv_dot = QKV(q_dot, None, None, k_chunk_dot, v_chunk_dot)
    return _pair(QKV(*qkv), qkv_dot, position, attention_mask, tiling, kernel)


_jvp.defjvp(_jvp_rule, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _pair(
    qkv: QKV,
    qkv_dot: QKV,
    position: Array,
    attention_mask: AttentionMask,
    tiling: Tiling,
    kernel: str,
) -> tuple[Array, Array]:
    return select.pair_forward(qkv, qkv_dot, position, attention_mask, tiling, kernel)[:2]


def _pair_forward(
    qkv: QKV,
    qkv_dot: QKV,
    position: Array,
    attention_mask: AttentionMask,
    tiling: Tiling,
    kernel: str,
) -> tuple[tuple[Array, Array], _PairResiduals]:
    outputs = select.pair_forward(qkv, qkv_dot, position, attention_mask, tiling, kernel)
    return outputs[:2], (qkv, qkv_dot, position, outputs)


def _pair_backward(
    attention_mask: AttentionMask,
    tiling: Tiling,
    kernel: str,
    residuals: _PairResiduals,
    bars: tuple[Array, Array],
) -> tuple[QKV, QKV, None]:
    qkv, qkv_dot, position, outputs = residuals
    _assert_same_shape(qkv.q, qkv_dot.q, *outputs[:2])
    o_bar, o_dot_bar = bars
    options = position, attention_mask, tiling, kernel
    return *select.pair_backward(qkv, qkv_dot, outputs, o_bar, o_dot_bar, *options), None


_pair.defvjp(_pair_forward, _pair_backward)


def _is_zero(x: Array | SymbolicZero) -> bool:
    return isinstance(x, SymbolicZero)


def _instantiate(x: Array | SymbolicZero) -> Array:
    """`x` as an array, with symbolic zeros instantiated."""
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x


def _assert_same_shape(*arrays: Array) -> None:
    """Checks that residuals arrive in the order in which they were saved."""
    assert len({x.shape for x in arrays}) == 1, [x.shape for x in arrays]
