"""Weight declarations, norms, MLPs and the short convolution.

A weight is declared once: shape, initialiser, and `axes`, one logical name per dimension, which
`tttjax.parallel.mesh` maps to the device mesh. Its type says which loop updates it: `FastWeight`
the inner loop, `nnx.Param` only the outer optimizer.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tttjax.ops.norms import rms_norm
from tttjax.ops.short_conv import short_conv
from tttjax.types import Array


class FastWeight(nnx.Param):
    """A weight that the inner loop copies and updates for each sequence."""


def normal_weight(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    *,
    std: float,
    dtype: jnp.dtype,
    kind: type[nnx.Param] = nnx.Param,
    cast_to_compute: bool = False,
) -> nnx.Param:
    """A weight drawn from N(0, std^2), not truncated, not scaled with depth (as official).

    cast_to_compute: it is only used in products, in the dtype of the other factor.
    """
    value = std * jax.random.normal(rngs.params(), shape, dtype)
    return kind(value, axes=axes, cast_to_compute=cast_to_compute)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis; the weight starts at 1."""

    def __init__(self, dim: int, axis: str, *, eps: float, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones((dim,), dtype), axes=(axis,))
        self.eps = eps

    def __call__(self, x_TD: Array) -> Array:
        return rms_norm(x_TD, self.weight[...], self.eps)


class Identity(nnx.Module):
    """In place of a norm that is switched off."""

    def __call__(self, x_TD: Array) -> Array:
        return x_TD


class SwiGLU(nnx.Module):
    """(silu(x w1) * (x w3)) w2, no biases (arXiv 2002.05202). [T, D] -> [T, D].

    std: of w1 and w3; out_std: of w2.
    """

    def __init__(
        self,
        embed_dim: int,
        mlp_dim: int,
        rngs: nnx.Rngs,
        *,
        std: float,
        out_std: float,
        dtype: jnp.dtype,
        kind: type[nnx.Param] = nnx.Param,
    ):
        def weight(shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> nnx.Param:
            return normal_weight(
                rngs, shape, axes, std=std, dtype=dtype, kind=kind, cast_to_compute=True
            )

        self.w1 = weight((embed_dim, mlp_dim), ("embed", "mlp"), std)
        self.w3 = weight((embed_dim, mlp_dim), ("embed", "mlp"), std)
        self.w2 = weight((mlp_dim, embed_dim), ("mlp", "embed"), out_std)

    def __call__(self, x_TD: Array) -> Array:
        w1_DF, w3_DF, w2_FD = (w[...].astype(x_TD.dtype) for w in (self.w1, self.w3, self.w2))
        return _gated(x_TD @ w1_DF, x_TD @ w3_DF) @ w2_FD


# Rematerialised: the backward pass stores only the two products.
@partial(jax.checkpoint, prevent_cse=False)
def _gated(gate_TF: Array, value_TF: Array) -> Array:
    return jax.nn.silu(gate_TF) * value_TF


class MultiHeadMLP(nnx.Module):
    """gelu(x w1 + b1) w2 + b2 in each of H heads: K entries to 4 K and back. [T, D] -> [T, D].

    The inner model of TTT-MLP (arXiv 2407.04620) without its norm and projections: the fast MLP in
    the steps from TTT-KVB to TTT-E2E (arXiv 2512.23675, table 1). std: of w1; out_std: of
    w2; biases start at 0.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        rngs: nnx.Rngs,
        *,
        std: float,
        out_std: float,
        dtype: jnp.dtype,
        kind: type[nnx.Param] = nnx.Param,
    ):
        entries = embed_dim // num_heads

        def weight(shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> nnx.Param:
            return normal_weight(
                rngs, shape, axes, std=std, dtype=dtype, kind=kind, cast_to_compute=True
            )

        def bias(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
            return kind(jnp.zeros(shape, dtype), axes=axes)

        self.w1 = weight((num_heads, entries, 4 * entries), ("heads", "head_dim", "hidden"), std)
        self.b1 = bias((num_heads, 4 * entries), ("heads", "hidden"))
        into_entries = (num_heads, 4 * entries, entries), ("heads", "hidden", "head_dim")
        self.w2 = weight(*into_entries, out_std)
        self.b2 = bias((num_heads, entries), ("heads", "head_dim"))

    def __call__(self, x_TD: Array) -> Array:
        w1_HKF, b1_HF, w2_HFK, b2_HK = (
            w[...].astype(x_TD.dtype) for w in (self.w1, self.b1, self.w2, self.b2)
        )
        x_THK = x_TD.reshape(x_TD.shape[0], *b2_HK.shape)
        hidden_THF = jax.nn.gelu(jnp.einsum("thk,hkf->thf", x_THK, w1_HKF) + b1_HF)
        return (jnp.einsum("thf,hfk->thk", hidden_THF, w2_HFK) + b2_HK).reshape(x_TD.shape)


class NormedConv(nnx.Module):
    """A causal depthwise convolution of the normed input, with a bias. [T, D] -> [T, D]."""

    def __init__(self, embed_dim: int, taps: int, rngs: nnx.Rngs, *, eps: float, dtype: jnp.dtype):
        self.norm = RMSNorm(embed_dim, "embed", eps=eps, dtype=dtype)
        self.kernel = normal_weight(
            rngs, (taps, embed_dim), ("taps", "embed"), std=taps**-0.5, dtype=dtype
        )
        self.bias = nnx.Param(jnp.zeros((embed_dim,), dtype), axes=("embed",))

    def init_state(self, dtype: jnp.dtype) -> dict[str, Array]:
        """The inputs before the sequence: zeros, [J - 1, D]."""
        taps, embed_dim = self.kernel.shape
        return {"conv": jnp.zeros((taps - 1, embed_dim), dtype)}

    def __call__(
        self, x_TD: Array, state: dict[str, Array] | None
    ) -> tuple[Array, dict[str, Array] | None]:
        """(y [T, D], the new state; None if `state` is None)."""
        past_JD = None if state is None else state["conv"]
        y_TD, past_JD = short_conv(self.norm(x_TD), self.kernel[...], self.bias[...], past_JD)
        return y_TD, None if past_JD is None else {"conv": past_JD}
