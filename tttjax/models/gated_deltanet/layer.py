"""Gated DeltaNet (arXiv 2412.06464): a recurrent mixer with the gated delta rule.

With `negative_eigenvalues`, beta reaches 2 and the transition of the state may have negative
eigenvalues (arXiv 2411.12537).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from tttjax.config.model import ModelConfig
from tttjax.models.layers import normal_weight
from tttjax.models.recurrent import (
    DeltaRuleMixer,
    initial_a_log,
    initial_dt_bias,
    project,
    uniform_taps,
)
from tttjax.ops.delta_rule import gated_delta_rule
from tttjax.ops.norms import rms_norm
from tttjax.types import Array

A_RANGE = (1e-4, 16.0)  # uniform(0, 16), but with a finite logarithm


class GatedDeltaNet(DeltaRuleMixer):
    """The gated delta rule between projections: [T, D] -> [T, D].

    Short convolutions and silu before q, k and v; q and k of unit length; per value head an
    RMS norm after the rule, then the gate silu(z). No biases.
    """

    rule = staticmethod(gated_delta_rule)

    def __init__(self, kind: str, model: ModelConfig, rngs: nnx.Rngs):
        del kind
        key_heads, value_heads, key_dim, value_dim = model.gated_deltanet.sizes(model)
        embed_dim, dtype = model.embed_dim, jnp.dtype(model.param_dtype)

        def matrix(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
            std = model.init_std
            return normal_weight(rngs, shape, axes, std=std, dtype=dtype, cast_to_compute=True)

        def into(*heads: int) -> nnx.Param:
            axes = ("embed", "heads", "head_dim")[: 1 + len(heads)]
            return matrix((embed_dim, *heads), axes)

        def conv(*heads: int) -> nnx.Param:
            return uniform_taps(rngs, model.conv_size, heads, ("heads", "head_dim"), dtype)

        self.wq, self.wk = into(key_heads, key_dim), into(key_heads, key_dim)
        self.wv, self.wz = into(value_heads, value_dim), into(value_heads, value_dim)
        self.wb, self.wa = into(value_heads), into(value_heads)
        self.conv_q, self.conv_k = conv(key_heads, key_dim), conv(key_heads, key_dim)
        self.conv_v = conv(value_heads, value_dim)
        self.a_log = initial_a_log(rngs, value_heads, *A_RANGE, dtype)
        self.dt_bias = initial_dt_bias(rngs, value_heads, dtype)
        self.norm = nnx.Param(jnp.ones((value_dim,), dtype), axes=("head_dim",))
        out = (value_heads, value_dim, embed_dim), ("heads", "head_dim", "embed")
        self.wo = matrix(*out)
        self.largest_beta = 2 if model.gated_deltanet.negative_eigenvalues else 1
        self.norm_eps = model.mixer_norm_eps
        self.chunk = model.scan_chunk

    def _gates(self, x_TD: Array) -> tuple[Array, Array]:
        """Log-decay g <= 0 and beta of each token, float32 at least: [T, H]."""
        wide = jnp.promote_types(x_TD.dtype, jnp.float32)
        wa_DH, wb_DH = (weight[...].astype(x_TD.dtype) for weight in (self.wa, self.wb))
        a_TH = jnp.matmul(x_TD, wa_DH, preferred_element_type=wide)
        b_TH = jnp.matmul(x_TD, wb_DH, preferred_element_type=wide)
        dt_TH = jax.nn.softplus(a_TH + self.dt_bias[...].astype(wide))
        g_TH = -jnp.exp(self.a_log[...].astype(wide)) * dt_TH
        return g_TH, jax.nn.sigmoid(b_TH) * self.largest_beta

    def _gated_norm(self, o_THV: Array, x_TD: Array) -> Array:
        """RMS norm of each head, then times silu(x wz), in float32 at least."""
        wide, z_THV = jnp.promote_types(o_THV.dtype, jnp.float32), project(x_TD, self.wz)
        normed_THV = rms_norm(o_THV.astype(wide), self.norm[...], self.norm_eps)
        return (normed_THV * jax.nn.silu(z_THV.astype(wide))).astype(o_THV.dtype)
