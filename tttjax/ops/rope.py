"""Rotary position embedding (RoPE), computed from positions without a table, so without limit."""

import math

import jax.numpy as jnp
from jax.typing import DTypeLike

from tttjax.types import Array


def frequencies(
    head_dim: int, theta: float, scaling: tuple[float, ...] = (), dtype: DTypeLike = jnp.float32
) -> Array:
    """Radians per token of each pair of entries of a head, [K / 2]: theta^(-2i/K), then scaled.

    scaling: empty: none. (factor,): all are divided by it. (factor, low, high, length): as in
    Llama 3.1. A pair that turns n times in `length` tokens, the context length of pre-training,
    keeps its frequency if n >= high; it is divided by factor if n <= low, and in between
    multiplied by (1 - s) / factor + s, with s = (n - low) / (high - low).
    """
    frequency_P = theta ** (-jnp.arange(0, head_dim, 2, dtype=dtype) / head_dim)
    if not scaling:
        return frequency_P
    factor, *bands = scaling
    if not bands:
        return frequency_P / factor
    low, high, length = bands
    turns_P = length * frequency_P / (2 * math.pi)
    weight_P = jnp.clip((turns_P - low) / (high - low), 0, 1)
    return frequency_P * ((1 - weight_P) / factor + weight_P)


def apply_rope(
    x_THK: Array, position_T: Array, theta: float, scaling: tuple[float, ...] = ()
) -> Array:
    """Rotates each pair of entries (2i, 2i+1) of a head by position * `frequencies`[i].

    RoPE (arXiv 2104.09864) with interleaved pairs, as in the official TTT-E2E code.
    position_T: int [T]. Angles and products in float32 at least; the result has the dtype of x.
    """
    wide = jnp.promote_types(x_THK.dtype, jnp.float32)
    frequency = frequencies(x_THK.shape[-1], theta, scaling, wide)
    angle_T1P = position_T.astype(wide)[:, None, None] * frequency
    cos, sin = jnp.cos(angle_T1P), jnp.sin(angle_T1P)
    even, odd = x_THK[..., 0::2].astype(wide), x_THK[..., 1::2].astype(wide)
    rotated = jnp.stack((even * cos - odd * sin, even * sin + odd * cos), axis=-1)
    return rotated.reshape(x_THK.shape).astype(x_THK.dtype)
