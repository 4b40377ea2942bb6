"""Kimi Delta Attention (arXiv 2510.26692): a recurrent mixer with a decay per key channel."""

import jax
import jax.numpy as jnp
from flax import nnx

from tttjax.config.model import ModelConfig
from tttjax.models.kda.delta_rule import kda_chunked
from tttjax.models.layers import normal_weight
from tttjax.models.recurrent import (
    DeltaRuleMixer,
    initial_a_log,
    initial_dt_bias,
    project,
    uniform_taps,
)
from tttjax.ops.norms import rms_norm
from tttjax.types import Array

A_RANGE = (1.0, 16.0)  # decay rates at the start of training, uniform


class KimiDeltaAttention(DeltaRuleMixer):
    """The delta rule with a decay per key channel between projections: [T, D] -> [T, D].

    Short convolutions and silu before q, k and v; q and k of unit length; per head an RMS norm
    after the rule, then the gate sigmoid(z). The projections to the decay and to the gate have
    rank V (`value_dim`).
    """

    rule = staticmethod(kda_chunked)

    def __init__(self, kind: str, model: ModelConfig, rngs: nnx.Rngs):
        del kind
        heads, key_dim, value_dim = model.kda.sizes(model)
        embed_dim, dtype = model.embed_dim, jnp.dtype(model.param_dtype)
        per_head = ("heads", "head_dim")
        keys, values = (heads, key_dim), (heads, value_dim)

        def matrix(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
            std = model.init_std
            return normal_weight(rngs, shape, axes, std=std, dtype=dtype, cast_to_compute=True)

        def into(*shape: int) -> nnx.Param:
            return matrix((embed_dim, *shape), ("embed", *per_head[: len(shape)]))

        def low_rank(*shape: int) -> tuple[nnx.Param, nnx.Param]:
            down = matrix((embed_dim, value_dim), ("embed", "hidden"))
            return down, matrix((value_dim, *shape), ("hidden", *per_head))

        def conv(*shape: int) -> nnx.Param:
            return uniform_taps(rngs, model.conv_size, shape, per_head, dtype)

        self.wq, self.wk, self.wv = into(*keys), into(*keys), into(*values)
        self.wb = into(heads)
        self.wa_down, self.wa_up = low_rank(*keys)
        self.wz_down, self.wz_up = low_rank(*values)
        self.z_bias = nnx.Param(jnp.zeros(values, dtype), axes=per_head)
        self.conv_q, self.conv_k, self.conv_v = conv(*keys), conv(*keys), conv(*values)
        self.a_log = initial_a_log(rngs, heads, *A_RANGE, dtype)
        dt_bias_HK = initial_dt_bias(rngs, heads * key_dim, dtype)[...].reshape(keys)
        self.dt_bias = nnx.Param(dt_bias_HK, axes=per_head)
        self.norm = nnx.Param(jnp.ones((value_dim,), dtype), axes=("head_dim",))
        self.wo = matrix((*values, embed_dim), (*per_head, "embed"))
        self.norm_eps = model.mixer_norm_eps
        self.chunk = model.scan_chunk

    def _gates(self, x_TD: Array) -> tuple[Array, Array]:
        """Log-decay g <= 0 [T, H, K] and beta [T, H] of each token, float32 at least.

        g = -exp(a_log) softplus(x wa_down wa_up + dt_bias), beta = sigmoid(x wb).
        """
        wide = jnp.promote_types(x_TD.dtype, jnp.float32)
        a_THK = _project_wide(project(x_TD, self.wa_down), self.wa_up)
        dt_THK = jax.nn.softplus(a_THK + self.dt_bias[...].astype(wide))
        g_THK = -jnp.exp(self.a_log[...].astype(wide))[:, None] * dt_THK
        return g_THK, jax.nn.sigmoid(_project_wide(x_TD, self.wb))

    def _gated_norm(self, o_THV: Array, x_TD: Array) -> Array:
        """RMS norm of each head, times sigmoid(x wz_down wz_up + z_bias), in float32 at least."""
        wide = jnp.promote_types(o_THV.dtype, jnp.float32)
        z_THV = _project_wide(project(x_TD, self.wz_down), self.wz_up)
        gate_THV = jax.nn.sigmoid(z_THV + self.z_bias[...].astype(wide))
        normed_THV = rms_norm(o_THV.astype(wide), self.norm[...], self.norm_eps)
        return (normed_THV * gate_THV).astype(o_THV.dtype)


def _project_wide(x_TD: Array, weight: nnx.Param) -> Array:
    """[T, D] times [D, ...] in the dtype of x, the result in float32 at least."""
    wide = jnp.promote_types(x_TD.dtype, jnp.float32)
    weight_D = weight[...].astype(x_TD.dtype)
    return jnp.tensordot(x_TD, weight_D, axes=1, preferred_element_type=wide)
