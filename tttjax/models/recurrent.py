"""Shared by recurrent mixers: projections, convolution kernels, and initial decay and step size."""

from collections.abc import Mapping
from math import log

import jax
import jax.numpy as jnp
from flax import nnx

from tttjax.types import Array

DT_RANGE = (1e-3, 1e-1)  # step sizes at the start of training, log-uniform


def project(x_TD: Array, weight: nnx.Param) -> Array:
    """[T, D] times [D, ...], in the dtype of x."""
    return jnp.tensordot(x_TD, weight[...].astype(x_TD.dtype), axes=1)


def uniform_taps(
    rngs: nnx.Rngs, taps: int, shape: tuple[int, ...], axes: tuple[str, ...], dtype: jnp.dtype
) -> nnx.Param:
    """The kernel of a convolution [J, ...], uniform within 1 / sqrt(J)."""
    bound = taps**-0.5
    value = jax.random.uniform(rngs.params(), (taps, *shape), dtype, -bound, bound)
    return nnx.Param(value, axes=("taps", *axes))


def empty_conv_states(kernels: Mapping[str, nnx.Param], dtype: jnp.dtype) -> dict[str, Array]:
    """The convolutions' states before a sequence: zeros, [J - 1, H, K] by name."""
    shapes = {name: kernel.shape[-3:] for name, kernel in kernels.items()}
    return {name: jnp.zeros((taps - 1, *hk), dtype) for name, (taps, *hk) in shapes.items()}


def initial_a_log(
    rngs: nnx.Rngs, heads: int, low: float, high: float, dtype: jnp.dtype
) -> nnx.Param:
    """log of decay rates uniform in [low, high], as a weight [H]."""
    rate_H = jax.random.uniform(rngs.params(), (heads,), jnp.float32, low, high)
    return nnx.Param(jnp.log(rate_H).astype(dtype), axes=("heads",))


def initial_dt_bias(rngs: nnx.Rngs, heads: int, dtype: jnp.dtype) -> nnx.Param:
    """softplus^-1 of step sizes log-uniform in DT_RANGE, as a weight [H]."""
    low, high = map(log, DT_RANGE)
    dt_H = jnp.exp(jax.random.uniform(rngs.params(), (heads,), jnp.float32, low, high))
    return nnx.Param((dt_H + jnp.log(-jnp.expm1(-dt_H))).astype(dtype), axes=("heads",))
