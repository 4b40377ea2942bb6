"""RMSNorm and layer norm."""

from functools import partial

import jax
import jax.numpy as jnp

from tttjax.types import Array


# Rematerialised: otherwise the backward pass would store several float32 copies of x.
@partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def rms_norm(x_D: Array, weight_D: Array | None, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, [..., D] -> [..., D].

    Computed in float32 at least, including the product with the weight, then cast to the dtype of x
    (Zhang & Sennrich, arXiv 1910.07467). weight None: 1.
    """
    wide = jnp.promote_types(x_D.dtype, jnp.float32)
    x_wide = x_D.astype(wide)
    inverse_rms = jnp.reciprocal(jnp.sqrt(jnp.mean(jnp.square(x_wide), -1, keepdims=True) + eps))
    normed = x_wide * inverse_rms
    if weight_D is not None:
        normed = normed * weight_D.astype(wide)
    return normed.astype(x_D.dtype)


def layer_norm(x: Array, scale: Array, bias: Array, eps: float, axis: int | tuple = -1) -> Array:
    """(x - mean) / sqrt(var + eps) * scale + bias over `axis`, in float32 at least."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = x - x.mean(axis, keepdims=True)
    variance = jnp.square(centred).mean(axis, keepdims=True)
    return centred * jax.lax.rsqrt(variance + eps) * scale + bias
