"""Next-token cross-entropy in float32, and its means."""

import jax
import jax.numpy as jnp

from tttjax.types import Array


def token_nll(h_TD: Array, head_DV: Array, target_T: Array) -> Array:
    """Negative log-likelihood of each target in nats, float32 at least, [T].

    Logits are accumulated and normalised in float32 even when h and head are bfloat16, so the
    result has no bfloat16 steps (0.03 nats at 6 nats) in it.
    """
    wide = jnp.promote_types(h_TD.dtype, jnp.float32)
    logit_TV = jnp.einsum("td,dv->tv", h_TD, head_DV, preferred_element_type=wide)
    target_logit_T = jnp.take_along_axis(logit_TV, target_T[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logit_TV, axis=-1) - target_logit_T


def token_nll_in_blocks(h_TD: Array, head_DV: Array, target_T: Array, block: int) -> Array:
    """`token_nll` of a long sequence with the logits of `block` tokens in memory at a time."""
    length = h_TD.shape[0]
    if length <= block:
        return token_nll(h_TD, head_DV, target_T)
    back = -length % block
    h_NCD = jnp.pad(h_TD, ((0, back), (0, 0))).reshape(-1, block, h_TD.shape[1])
    target_NC = jnp.pad(target_T, (0, back)).reshape(-1, block)
    rows = jax.checkpoint(lambda row: token_nll(row[0], head_DV, row[1]), prevent_cse=False)
    return jax.lax.map(rows, (h_NCD, target_NC)).reshape(-1)[:length]


def masked_mean(nll_C: Array, mask_C: Array) -> Array:
    """Mean over the tokens that count; 0 where none does (a chunk with all targets masked)."""
    count = jnp.sum(mask_C, axis=-1)
    total = jnp.sum(jnp.where(mask_C, nll_C, 0), axis=-1)
    return total / jnp.maximum(count, 1).astype(total.dtype)
