"""Causal attention of one sequence: full, sliding-window, or within blocks.

The mask is a function of the two positions (`mask_fn`), so one definition covers a full sequence, a
chunk with buffered keys, and a decoded token. `attend` materializes all scores; `attend_blocked`
gives the same result in blocks of queries, with memory O(T x (window + block)) instead of O(T x T).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tttjax.types import Array

MASKED_SCORE = -1e30  # finite: a fully masked row must give no NaN in any derivative
MAX_SCORE_ENTRIES = 2**28  # over all heads; 1 GiB in float32
FULL_SEGMENTS = 4  # of full attention; each skips the keys after its end


class AttentionMask(NamedTuple):
    """A causal attention mask, optionally restricted to a window or a block.

    window: at most this many keys, the query's own included (0: no limit).
    block: only keys in the query's block of this many positions (0: no blocks).
    """

    window: int = 0
    block: int = 0


def mask_fn(query_T: Array, key_S: Array, attention_mask: AttentionMask) -> Array:
    """bool [T, S]: whether the query at position query_T[t] attends to the key at key_S[s].

    Negative key positions mark empty slots, which are masked.
    """
    query, key = query_T[:, None], key_S[None, :]
    mask = (key <= query) & (key >= 0)
    if attention_mask.window:
        mask &= key > query - attention_mask.window
    if attention_mask.block:
        mask &= key // attention_mask.block == query // attention_mask.block
    return mask


def attend(q_THK: Array, k_SGK: Array, v_SGK: Array, mask_TS: Array) -> Array:
    """softmax(q k^T / sqrt(K)) v over the unmasked keys, [T, H, K].

    Grouped-query attention (arXiv 2305.13245): G divides H, and each KV head serves H / G
    consecutive query heads. Softmax is at least float32; probabilities are cast to the dtype of v.
    """
    accum_dtype = jnp.promote_types(q_THK.dtype, jnp.float32)
    groups, (length, heads, head_dim) = k_SGK.shape[-2], q_THK.shape
    group_size = heads // groups  # query heads per KV head
    q_TGRK = q_THK.reshape(length, groups, group_size, head_dim)
    q_QGK = q_TGRK.swapaxes(1, 2).reshape(length * group_size, groups, head_dim)
    mask_QS = jnp.repeat(mask_TS, group_size, axis=0)
    score_GQS = jnp.einsum("qgk,sgk->gqs", q_QGK, k_SGK, preferred_element_type=accum_dtype)
    score_GQS = jnp.where(mask_QS, score_GQS * head_dim**-0.5, MASKED_SCORE)
    probability_GQS = jax.nn.softmax(score_GQS, axis=-1).astype(v_SGK.dtype)
    y_QGK = jnp.einsum("gqs,sgk->qgk", probability_GQS, v_SGK)
    return y_QGK.reshape(length, group_size, groups, head_dim).swapaxes(1, 2).reshape(q_THK.shape)


def attend_decode(
    q_HK: Array, k_GSK: Array, v_GSK: Array, k_GK: Array, v_GK: Array, mask_S: Array
) -> Array:
    """`attend` for decoding: one query, cached keys (heads first) and its own key; [H, K].

    Heads-first caches keep the keys of a head contiguous, so they are read without a copy.
    """
    accum_dtype = jnp.promote_types(q_HK.dtype, jnp.float32)
    groups, head_dim = k_GK.shape
    q_GRK = q_HK.reshape(groups, -1, head_dim)

    def product(subscripts: str, a: Array, b: Array) -> Array:
        return jnp.einsum(subscripts, a, b, preferred_element_type=accum_dtype)

    score_GRS = jnp.where(
        mask_S, product("grk,gsk->grs", q_GRK, k_GSK) * head_dim**-0.5, MASKED_SCORE
    )
    own_GR = product("grk,gk->gr", q_GRK, k_GK) * head_dim**-0.5
    max_GR = jnp.maximum(jnp.max(score_GRS, axis=-1), own_GR)
    weight_GRS, own_GR = jnp.exp(score_GRS - max_GR[..., None]), jnp.exp(own_GR - max_GR)
    sum_GR = jnp.sum(weight_GRS, axis=-1) + own_GR
    probability_GRS = (weight_GRS / sum_GR[..., None]).astype(v_GSK.dtype)
    y_GRK = product("grs,gsk->grk", probability_GRS, v_GSK)
    y_GRK += (own_GR / sum_GR)[..., None] * v_GK[:, None].astype(accum_dtype)
    return y_GRK.reshape(q_HK.shape).astype(v_GSK.dtype)


def attend_blocked(
    q_THK: Array, k_TGK: Array, v_TGK: Array, attention_mask: AttentionMask, query_block: int
) -> Array:
    """Causal self-attention of a sequence, [T, H, K], in XLA; positions are 0..T-1.

    Equal to `attend` with `mask_fn(arange(T), arange(T), attention_mask)`, in blocks of
    `query_block` queries (fewer if there are very many keys). The backward pass recomputes scores.
    """
    length, heads, _ = q_THK.shape
    max_keys = min(size for size in (*attention_mask, length) if size)
    query_block = min(query_block, max(128, MAX_SCORE_ENTRIES // (heads * max_keys)))
    if length <= 2 * query_block:
        position_T = jnp.arange(length)
        return attend(q_THK, k_TGK, v_TGK, mask_fn(position_T, position_T, attention_mask))
    if max_keys + query_block < length:
        return _attend_windowed(q_THK, k_TGK, v_TGK, attention_mask, max_keys, query_block)
    return _attend_segments(q_THK, k_TGK, v_TGK, attention_mask, query_block)


def _pad_tokens(x_THK: Array, pad_start: int, pad_end: int) -> Array:
    return jnp.pad(x_THK, ((pad_start, pad_end), (0, 0), (0, 0)))


def _map_blocks(block_fn: Callable[[Array], Array], starts: Array) -> Array:
    """Maps block_fn over `starts` sequentially, rematerialized; concatenates along tokens."""
    out = jax.lax.map(jax.checkpoint(block_fn, prevent_cse=False), starts)
    return out.reshape((-1, *out.shape[2:]))


def _attend_windowed(
    q_THK: Array,
    k_TGK: Array,
    v_TGK: Array,
    attention_mask: AttentionMask,
    max_keys: int,
    query_block: int,
) -> Array:
    """Each block of queries attends to itself and to the `max_keys` keys before it."""
    length = q_THK.shape[0]
    pad_end = -length % query_block
    q_THK = _pad_tokens(q_THK, 0, pad_end)
    k_SGK = _pad_tokens(k_TGK, max_keys, pad_end)
    v_SGK = _pad_tokens(v_TGK, max_keys, pad_end)

    def block(start: Array) -> Array:
        slice_of = partial(jax.lax.dynamic_slice_in_dim, start_index=start)
        query_T = start + jnp.arange(query_block)
        key_S = start - max_keys + jnp.arange(max_keys + query_block)
        return attend(
            slice_of(q_THK, slice_size=query_block),
            slice_of(k_SGK, slice_size=max_keys + query_block),
            slice_of(v_SGK, slice_size=max_keys + query_block),
            mask_fn(query_T, key_S, attention_mask),
        )

    return _map_blocks(block, jnp.arange(0, length + pad_end, query_block))[:length]


def _attend_segments(
    q_THK: Array, k_TGK: Array, v_TGK: Array, attention_mask: AttentionMask, query_block: int
) -> Array:
    """Each block of queries attends to all keys up to the end of its segment."""
    length = q_THK.shape[0]
    segment = -(-length // (FULL_SEGMENTS * query_block)) * query_block
    q_THK = _pad_tokens(q_THK, 0, -length % query_block)
    outputs = []
    for first in range(0, q_THK.shape[0], segment):
        last = min(first + segment, q_THK.shape[0])
        keys, values = k_TGK[:last], v_TGK[:last]
        key_S = jnp.arange(keys.shape[0])

        def block(
            start: Array, keys: Array = keys, values: Array = values, key_S: Array = key_S
        ) -> Array:
            q_block = jax.lax.dynamic_slice_in_dim(q_THK, start, query_block)
            query_T = start + jnp.arange(query_block)
            return attend(q_block, keys, values, mask_fn(query_T, key_S, attention_mask))

        outputs.append(_map_blocks(block, jnp.arange(first, last, query_block)))
    return jnp.concatenate(outputs)[:length]
