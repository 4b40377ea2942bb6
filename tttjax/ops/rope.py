"""Rotary position embedding, computed from the positions: no table, hence none to run out of."""

import jax.numpy as jnp

from tttjax.types import Array


def rotate(x_THK: Array, position_T: Array, theta: float) -> Array:
    """Rotates each pair of entries (2i, 2i+1) of a head by position * theta^(-2i/K).

    RoPE (arXiv 2104.09864) with interleaved pairs, as in the official TTT-E2E code.
    position_T: int [T]. Angles and products in float32 at least; the result has the dtype of x.
    """
    head_dim = x_THK.shape[-1]
    wide = jnp.promote_types(x_THK.dtype, jnp.float32)
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=wide) / head_dim)
    angle_T1P = position_T.astype(wide)[:, None, None] * frequency
    cos, sin = jnp.cos(angle_T1P), jnp.sin(angle_T1P)
    even, odd = x_THK[..., 0::2].astype(wide), x_THK[..., 1::2].astype(wide)
    rotated = jnp.stack((even * cos - odd * sin, even * sin + odd * cos), axis=-1)
    return rotated.reshape(x_THK.shape).astype(x_THK.dtype)
