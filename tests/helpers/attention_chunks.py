"""Random chunks for window attention, and dense attention as their reference."""

import jax
import jax.numpy as jnp
import numpy as np

from tttjax.ops.attention.attend import attend, mask_fn
from tttjax.ops.window_attention import QKV


def random_chunk(
    queries, num_buffered, seed=0, dtype=np.float64, *, heads=2, kv_heads=None, dim=3, batch=2
) -> QKV:
    """Queries, keys and values of a random chunk, with buffered keys and values."""
    rng = np.random.default_rng(seed)

    def normal(length, heads):
        return jnp.asarray(rng.normal(size=(batch, length, heads, dim)), dtype)

    keys = (normal(x, kv_heads or heads) for x in (num_buffered, num_buffered, queries, queries))
    return QKV(normal(queries, heads), *keys)


def dense(qkv, position, attention_mask):
    """Dense attention per sequence; buffer slots before the sequence have positions < 0."""
    num_buffered, queries = qkv.k_buffered.shape[-3], qkv.q.shape[-3]
    key_S = position - num_buffered + jnp.arange(num_buffered + queries)
    mask_TS = mask_fn(key_S[num_buffered:], key_S, attention_mask)

    def one(x):
        k, v = (
            jnp.concatenate((x.k_buffered, x.k_chunk)),
            jnp.concatenate((x.v_buffered, x.v_chunk)),
        )
        return attend(x.q, k, v, mask_TS)

    return jax.vmap(one)(qkv)
