"""Weights and the layers made of them.

A weight is declared once: shape, initialiser, and `axes`, one logical name per dimension, which
`tttjax.sharding` maps to the device mesh. Its type says which loop owns it: `FastWeight` is
rewritten by the inner loop while reading, `nnx.Param` only by the outer optimizer.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from tttjax.ops.norms import rms_norm
from tttjax.types import Array


class FastWeight(nnx.Param):
    """A weight that the inner loop copies for each sequence and rewrites while reading."""


def normal_weight(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    *,
    std: float,
    dtype: jnp.dtype,
    kind: type[nnx.Param] = nnx.Param,
) -> nnx.Param:
    """A weight drawn from N(0, std^2): neither truncated nor scaled with depth, as officially."""
    return kind(std * jax.random.normal(rngs.params(), shape, dtype), axes=axes)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis; the weight starts at 1."""

    def __init__(self, dim: int, axis: str, *, eps: float, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones((dim,), dtype), axes=(axis,))
        self.eps = eps

    def __call__(self, x_TD: Array) -> Array:
        return rms_norm(x_TD, self.weight[...], self.eps)


class Identity(nnx.Module):
    """Stands where a norm is switched off."""

    def __call__(self, x_TD: Array) -> Array:
        return x_TD


class SwiGLU(nnx.Module):
    """(silu(x w1) * (x w3)) w2, no biases (arXiv 2002.05202). [T, D] -> [T, D]."""

    def __init__(
        self,
        embed_dim: int,
        mlp_dim: int,
        rngs: nnx.Rngs,
        *,
        std: float,
        dtype: jnp.dtype,
        kind: type[nnx.Param] = nnx.Param,
    ):
        def weight(shape, axes):
            return normal_weight(rngs, shape, axes, std=std, dtype=dtype, kind=kind)

        self.w1 = weight((embed_dim, mlp_dim), ("embed", "mlp"))
        self.w3 = weight((embed_dim, mlp_dim), ("embed", "mlp"))
        self.w2 = weight((mlp_dim, embed_dim), ("mlp", "embed"))

    def __call__(self, x_TD: Array) -> Array:
        w1_DF, w3_DF, w2_FD = (w[...].astype(x_TD.dtype) for w in (self.w1, self.w3, self.w2))
        return (jax.nn.silu(x_TD @ w1_DF) * (x_TD @ w3_DF)) @ w2_FD
