"""The chunk-parallel delta rule of Kimi Delta Attention (arXiv 2510.26692).

The gated delta rule of `tttjax.ops.delta_rule` with one decay per key channel instead of one per
head. Each head has a state S [K, V], updated for every token by

    S <- Diag(exp(g)) S              decay of every row, g [K] <= 0
    d  = beta (v - S^T k)            delta: error of the state at this key
    S <- S + k d^T                   update
    o  = S^T q / sqrt(K)             output

`gated_delta_rule_recurrent` is that definition, token by token. `kda_chunked` gives the same
numbers from matrix products over chunks of tokens. Everything is computed in float32 at least.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tttjax.ops.delta_rule import unit_lower_inverse, widen_operands
from tttjax.types import Array


def kda_chunked(
    q_THK: Array,
    k_THK: Array,
    v_THV: Array,
    g_THK: Array,
    beta_TH: Array,
    state_HKV: Array,
    chunk: int,
) -> tuple[Array, Array]:
    """`gated_delta_rule_recurrent` in chunks of `chunk` tokens; any T >= 0.

    `chunk` is rounded up to a power of two.

    In a chunk that starts from S, with G [C, K] the running sum of g, the deltas d of its tokens
    satisfy (I + A) d = beta (v - (exp(G) k)^T S), A[i, j] = beta_i sum_c k_ic k_jc exp(G_ic - G_jc)
    for j < i: linear in S. So with one inverse per chunk and head, computed in parallel, the scan
    over chunks needs only two products with S, as for one decay per head.
    """
    length = v_THV.shape[0]
    chunk = _power_of_two(min(chunk, length))
    chunks = -(-length // chunk)

    def in_chunks(x_TH: Array) -> Array:
        """[T, H, ...] -> [N, H, C, ...]; padding tokens are zero: no decay, no update."""
        back = [(0, chunks * chunk - length)] + [(0, 0)] * (x_TH.ndim - 1)
        x_NCH = jnp.pad(x_TH, back).reshape(chunks, chunk, *x_TH.shape[1:])
        return jnp.moveaxis(x_NCH, 1, 2)

    wide = widen_operands(q_THK, k_THK, v_THV, g_THK, beta_TH)
    q_NHCK, k_NHCK, v_NHCV, g_NHCK, beta_NHC = map(in_chunks, wide)
    q_start_NHCK, k_start_NHCK, k_end_NHCK, decay_NHK, qk_NHCC, kk_NHCC = _decayed_products(
        q_NHCK, k_NHCK, g_NHCK
    )
    solve_NHCC = unit_lower_inverse(beta_NHC[..., None] * kk_NHCC) * beta_NHC[..., None, :]
    d_free_NHCV = solve_NHCC @ v_NHCV
    d_memory_NHCK = solve_NHCC @ k_start_NHCK

    def step(s_HKV: Array, x: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        d_free_HCV, d_memory_HCK, k_end_HCK, decay_HK = x
        d_HCV = d_free_HCV - d_memory_HCK @ s_HKV
        next_s_HKV = decay_HK[:, :, None] * s_HKV + k_end_HCK.mT @ d_HCV
        return next_s_HKV, (s_HKV, d_HCV)

    parts = d_free_NHCV, d_memory_NHCK, k_end_NHCK, decay_NHK
    state_HKV, (s_NHKV, d_NHCV) = jax.lax.scan(step, state_HKV.astype(v_NHCV.dtype), parts)
    o_NHCV = q_start_NHCK @ s_NHKV + qk_NHCC @ d_NHCV
    o_THV = jnp.moveaxis(o_NHCV, 2, 1).reshape(chunks * chunk, *v_THV.shape[1:])[:length]
    return o_THV.astype(v_THV.dtype), state_HKV


def _power_of_two(size: int) -> int:
    """The smallest power of two >= size, and 1 at least."""
    return 1 << max(size - 1, 0).bit_length()


# Rematerialised: the backward pass would store several arrays like k for every block size.
@partial(jax.checkpoint, prevent_cse=False)
def _decayed_products(q_CK: Array, k_CK: Array, g_CK: Array) -> tuple[Array, ...]:
    """Products of queries and keys with the decay between them, for C a power of two.

    q, k, g: [..., C, K]. Returns, with G the running sum of g and G_end its last row,

        exp(G) q, exp(G) k, exp(G_end - G) k          [..., C, K]
        exp(G_end)                                    [..., K]
        sum_c q_ic k_jc exp(G_ic - G_jc), j <= i      [..., C, C], 0 elsewhere
        sum_c k_ic k_jc exp(G_ic - G_jc), j < i       [..., C, C], 0 elsewhere

    As one product of matrices, exp(G_i) and exp(-G_j) would be factors, and the second overflows.
    Instead blocks double in size. In a block with middle m, exp(G_i - G_m) exp(G_m - G_j) has no
    positive exponent for i after and j before the middle, and one product gives the lower left
    quarter; the quarters on the diagonal are the blocks of the step before. This is the secondary
    chunking of gated linear attention (arXiv 2312.06635) carried down to single tokens: no block
    needs an array [B, B, K], and all products together cost half of two full ones.

    Every exponent is a sum of some g and no difference of sums, so a token with full decay (g =
    -inf included) costs the others no precision.
    """

    def joined(first_MBK: Array, second_MBK: Array) -> Array:
        return jnp.stack((first_MBK, second_MBK), axis=-3).reshape(g_CK.shape)

    # Sums in the token's block: from the start up to the token, and after the token to the end.
    from_start_CK, to_end_CK = g_CK, jnp.zeros_like(g_CK)
    qk_MBB = jnp.sum(q_CK * k_CK, axis=-1)[..., None, None]
    kk_MBB = jnp.zeros_like(qk_MBB)
    for block in (1 << i for i in range(g_CK.shape[-2].bit_length() - 1)):
        _, q_MBK = _halves(q_CK, block)
        k_first_MBK, k_second_MBK = _halves(k_CK, block)
        start_first_MBK, start_second_MBK = _halves(from_start_CK, block)
        end_first_MBK, end_second_MBK = _halves(to_end_CK, block)
        rows_MBK, columns_MKB = jnp.exp(start_second_MBK), (jnp.exp(end_first_MBK) * k_first_MBK).mT
        qk_MBB = _with_lower(qk_MBB, (rows_MBK * q_MBK) @ columns_MKB)
        kk_MBB = _with_lower(kk_MBB, (rows_MBK * k_second_MBK) @ columns_MKB)
        from_start_CK = joined(start_first_MBK, start_first_MBK[..., -1:, :] + start_second_MBK)
        to_end_CK = joined(end_first_MBK + start_second_MBK[..., -1:, :], end_second_MBK)
    decay_CK = jnp.exp(from_start_CK)
    vectors = decay_CK * q_CK, decay_CK * k_CK, jnp.exp(to_end_CK) * k_CK
    return *vectors, decay_CK[..., -1, :], qk_MBB[..., 0, :, :], kk_MBB[..., 0, :, :]


def _halves(x_CK: Array, block: int) -> tuple[Array, Array]:
    """First and second halves of blocks of 2 `block` tokens: [..., M, B, K] each."""
    *batch, length, channels = x_CK.shape
    x_M2BK = x_CK.reshape(*batch, length // (2 * block), 2, block, channels)
    return x_M2BK[..., 0, :, :], x_M2BK[..., 1, :, :]


def _with_lower(diagonal_MBB: Array, lower_MBB: Array) -> Array:
    """Blocks of twice the size, from those on their diagonal [..., 2 M, B, B] and below it."""
    first_MBB, second_MBB = diagonal_MBB[..., ::2, :, :], diagonal_MBB[..., 1::2, :, :]
    top_rows = jnp.concatenate((first_MBB, jnp.zeros_like(first_MBB)), axis=-1)
    return jnp.concatenate((top_rows, jnp.concatenate((lower_MBB, second_MBB), axis=-1)), axis=-2)
