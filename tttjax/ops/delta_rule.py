"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464), recurrent and chunk-parallel.

Each value head has a state S [K, V], updated for every token by

    S <- exp(g) S                    decay, g <= 0
    d  = beta (v - S^T k)            delta: error of the state at this key
    S <- S + k d^T                   update
    o  = S^T q / sqrt(K)             output

`gated_delta_rule_recurrent` is that definition, token by token, and is used for decoding.
`gated_delta_rule` gives the same numbers from matrix products over chunks of tokens. Value head h
uses the query and key of head h // (Hv / Hk). Everything is computed in float32 at least.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tttjax.types import Array

MIN_LOG_DECAY = -1000.0  # its exp is 0 in float64 too
L2_EPS = 1e-6


def l2_normalise(x_K: Array) -> Array:
    """x / sqrt(sum(x^2) + 1e-6) over the last axis, [..., K], in float32 at least.

    Not cast back: with beta near 2, a key rounded to more than unit length would make the state
    grow instead of reflecting it.
    """
    x_K = x_K.astype(jnp.promote_types(x_K.dtype, jnp.float32))
    return x_K * jax.lax.rsqrt(jnp.sum(jnp.square(x_K), axis=-1, keepdims=True) + L2_EPS)


def gated_delta_rule_recurrent(
    q_THK: Array, k_THK: Array, v_THV: Array, g_TH: Array, beta_TH: Array, state_HKV: Array
) -> tuple[Array, Array]:
    """The definition, token by token.

    q, k: [T, Hk, K]; v: [T, Hv, V]; g (log of the decay, <= 0) and beta (in [0, 2]): [T, Hv];
    state: [Hv, K, V], before the first token. g may be [T, Hv, K], a decay for each key channel.
    Returns o [T, Hv, V] in the dtype of v, and the state after the last token.
    """
    groups = v_THV.shape[1] // k_THK.shape[1]
    q_THK, k_THK = (jnp.repeat(x, groups, axis=1) for x in (q_THK, k_THK))
    tokens = widen_operands(q_THK, k_THK, v_THV, g_TH, beta_TH)

    def step(s_HKV: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        q_HK, k_HK, v_HV, g_H, beta_H = token
        s_HKV = jnp.exp(g_H).reshape(len(g_H), -1, 1) * s_HKV
        d_HV = beta_H[:, None] * (v_HV - jnp.einsum("hkv,hk->hv", s_HKV, k_HK))
        s_HKV = s_HKV + k_HK[:, :, None] * d_HV[:, None, :]
        return s_HKV, jnp.einsum("hkv,hk->hv", s_HKV, q_HK)

    state_HKV, o_THV = jax.lax.scan(step, state_HKV.astype(tokens[0].dtype), tokens)
    return o_THV.astype(v_THV.dtype), state_HKV


def gated_delta_rule(
    q_THK: Array,
    k_THK: Array,
    v_THV: Array,
    g_TH: Array,
    beta_TH: Array,
    state_HKV: Array,
    chunk: int,
) -> tuple[Array, Array]:
    """`gated_delta_rule_recurrent` in chunks of `chunk` tokens; any T >= 0.

    In a chunk that starts from S, with G the running sum of g, the deltas d of its tokens satisfy
    (I + A) d = beta (v - exp(G) S^T k), A[i, j] = beta_i exp(G_i - G_j) k_i.k_j for j < i: linear
    in S. So with one inverse per chunk and head, computed in parallel, the scan over chunks needs
    only two products with S (section 3.3 of the paper).
    """
    length, value_heads, _ = v_THV.shape
    groups = value_heads // k_THK.shape[1]
    chunk = max(1, min(chunk, length))
    chunks = -(-length // chunk)

    def in_chunks(x_TH: Array) -> Array:
        """[T, H, ...] -> [N, H, C, ...]; padding tokens are zero: no decay, no update."""
        back = [(0, chunks * chunk - length)] + [(0, 0)] * (x_TH.ndim - 1)
        x_NCH = jnp.pad(x_TH, back).reshape(chunks, chunk, *x_TH.shape[1:])
        return jnp.moveaxis(x_NCH, 1, 2)

    def for_value_heads(x_NHC: Array) -> Array:
        return jnp.repeat(x_NHC, groups, axis=1)

    wide = widen_operands(q_THK, k_THK, v_THV, g_TH, beta_TH)
    q_NHCK, k_NHCK, v_NHCV, g_NHC, beta_NHC = map(in_chunks, wide)
    kk_NHCC = for_value_heads(k_NHCK @ k_NHCK.mT)
    qk_NHCC = for_value_heads(q_NHCK @ k_NHCK.mT)
    q_NHCK, k_NHCK = for_value_heads(q_NHCK), for_value_heads(k_NHCK)

    from_start_NHC, between_NHCC = _decays(g_NHC)
    strictly_causal_CC = np.tri(chunk, k=-1, dtype=bool)
    a_NHCC = jnp.where(strictly_causal_CC, beta_NHC[..., None] * between_NHCC * kk_NHCC, 0)
    solve_NHCC = unit_lower_inverse(a_NHCC) * beta_NHC[..., None, :]
    d_free_NHCV = solve_NHCC @ v_NHCV
    d_memory_NHCK = (solve_NHCC * from_start_NHC[..., None, :]) @ k_NHCK
    k_end_NHCK = between_NHCC[..., -1, :, None] * k_NHCK

    def step(s_HKV: Array, x: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        d_free_HCV, d_memory_HCK, k_end_HCK, decay_H = x
        d_HCV = d_free_HCV - d_memory_HCK @ s_HKV
        next_s_HKV = decay_H[:, None, None] * s_HKV + k_end_HCK.mT @ d_HCV
        return next_s_HKV, (s_HKV, d_HCV)

    parts = d_free_NHCV, d_memory_NHCK, k_end_NHCK, from_start_NHC[..., -1]
    state_HKV, (s_NHKV, d_NHCV) = jax.lax.scan(step, state_HKV.astype(v_NHCV.dtype), parts)
    o_NHCV = (from_start_NHC[..., None] * q_NHCK) @ s_NHKV + (between_NHCC * qk_NHCC) @ d_NHCV
    o_THV = jnp.moveaxis(o_NHCV, 2, 1).reshape(chunks * chunk, *v_THV.shape[1:])[:length]
    return o_THV.astype(v_THV.dtype), state_HKV


def widen_operands(q_THK: Array, *arrays: Array) -> tuple[Array, ...]:
    """All in their common dtype, float32 at least; q divided by sqrt(K)."""
    wide = jnp.result_type(jnp.float32, q_THK, *arrays)
    return q_THK.astype(wide) * q_THK.shape[-1] ** -0.5, *(x.astype(wide) for x in arrays)


def _decays(g_NHC: Array) -> tuple[Array, Array]:
    """Decay from the chunk's start to each token, and from token j to token i (0 for j > i).

    Integer and fractional parts are summed separately: the first sum is exact and the second stays
    small, so that a token with full decay (g = -10^4) costs the others no precision. Only sums
    <= 0 (up to rounding) are exponentiated, and the mask is applied before.
    """
    g_NHC = jnp.maximum(g_NHC, MIN_LOG_DECAY)
    integer_NHC = jnp.round(g_NHC)
    fraction_NHC = jnp.cumsum(g_NHC - integer_NHC, axis=-1)
    integer_NHC = jnp.cumsum(integer_NHC, axis=-1)

    def differences(x_NHC: Array) -> Array:
        return x_NHC[..., :, None] - x_NHC[..., None, :]

    causal_CC = np.tri(g_NHC.shape[-1], dtype=bool)
    between_NHCC = jnp.where(
        causal_CC, differences(integer_NHC) + differences(fraction_NHC), -jnp.inf
    )
    return jnp.exp(integer_NHC + fraction_NHC), jnp.exp(between_NHCC)


@jax.custom_jvp
def unit_lower_inverse(a_CC: Array) -> Array:
    """(I + A)^-1 for strictly lower triangular A [..., C, C], by block doubling.

    The inverse of [[X, 0], [L, Y]] is [[X', 0], [-Y' L X', Y']]: as stable as forward substitution,
    in log2(C) steps of batched matrix products instead of C. Its JVP is two products, not the
    derivative of the steps.
    """
    size = a_CC.shape[-1]
    full = 1 << max(size - 1, 0).bit_length()
    a_CC = jnp.pad(a_CC, [(0, 0)] * (a_CC.ndim - 2) + [(0, full - size)] * 2)
    inverse_BXX = jnp.ones((*a_CC.shape[:-1], 1, 1), a_CC.dtype)
    for block in (1 << i for i in range(full.bit_length() - 1)):
        low_BXX = _subdiagonal_blocks(a_CC, block)
        first_BXX, second_BXX = inverse_BXX[..., 0::2, :, :], inverse_BXX[..., 1::2, :, :]
        if block > 1:  # for blocks of one entry both inverses are 1
            low_BXX = _matmul_highest(_matmul_highest(second_BXX, low_BXX), first_BXX)
        top_rows = jnp.concatenate((first_BXX, jnp.zeros_like(first_BXX)), axis=-1)
        bottom_rows = jnp.concatenate((-low_BXX, second_BXX), axis=-1)
        inverse_BXX = jnp.concatenate((top_rows, bottom_rows), axis=-2)
    return inverse_BXX[..., 0, :size, :size]


@unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    inverse_CC = unit_lower_inverse(*primals)
    return inverse_CC, -_matmul_highest(_matmul_highest(inverse_CC, *tangents), inverse_CC)


def _subdiagonal_blocks(a_CC: Array, block: int) -> Array:
    """Lower left quarters of the diagonal blocks of size 2 block: [..., B, block, block]."""
    pairs = a_CC.shape[-1] // (2 * block)
    split = a_CC.reshape(*a_CC.shape[:-2], pairs, 2, block, pairs, 2, block)[..., 1, :, :, 0, :]
    return jnp.moveaxis(jnp.diagonal(split, axis1=-4, axis2=-2), -1, -3)


def _matmul_highest(x: Array, y: Array) -> Array:
    """x @ y at the highest precision: rounding of inputs on accelerators would compound."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
