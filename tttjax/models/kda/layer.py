"""Kimi Delta Attention (arXiv 2510.26692): a recurrent mixer with a decay per key channel."""

import jax
import jax.numpy as jnp
from flax import nnx

from tttjax.config.model import ModelConfig
from tttjax.models.caches import MixerState, RecurrentCache
from tttjax.models.kda.delta_rule import kda_chunked, kda_recurrent
from tttjax.models.layers import normal_weight
from tttjax.models.mixer import AttentionForm, State
from tttjax.models.recurrent import (
    empty_conv_states,
    initial_a_log,
    initial_dt_bias,
    project,
    uniform_taps,
)
from tttjax.ops.delta_rule import l2_normalise
from tttjax.ops.norms import rms_norm
from tttjax.ops.short_conv import short_conv
from tttjax.types import Array

A_RANGE = (1.0, 16.0)  # decay rates at the start of training, uniform


class KimiDeltaAttention(nnx.Module):
    """The delta rule with a decay per key channel between projections: [T, D] -> [T, D].

    Short convolutions and silu before q, k and v; q and k of unit length; per head an RMS norm
    after the rule, then the gate sigmoid(z). The projections to the decay and to the gate have
    rank V (`value_dim`).
    """

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

    cache = RecurrentCache()

    def init_state(self, max_length: int, dtype: jnp.dtype) -> dict[str, Array]:
        """The state before the first token; its size does not depend on `max_length`."""
        del max_length
        kernels = {"conv_q": self.conv_q, "conv_k": self.conv_k, "conv_v": self.conv_v}
        return {"memory": self._empty_memory(dtype), **empty_conv_states(kernels, dtype)}

    def __call__(
        self, x_TD: Array, state: State, position: Array, form: AttentionForm = "dense"
    ) -> tuple[Array, State]:
        """x [T, D] -> y [T, D]; state None: a whole sequence (see `mixer`)."""
        del position, form
        cache = state or {}

        def convolved(weight: nnx.Param, name: str) -> tuple[Array, MixerState]:
            kernel_JHK = getattr(self, name)[...]
            out_THK, last = short_conv(project(x_TD, weight), kernel_JHK, None, cache.get(name))
            return jax.nn.silu(out_THK), {} if last is None else {name: last}

        q_THK, last_q = convolved(self.wq, "conv_q")
        k_THK, last_k = convolved(self.wk, "conv_k")
        v_THV, last_v = convolved(self.wv, "conv_v")
        inputs = l2_normalise(q_THK), l2_normalise(k_THK), v_THV, *self._gates(x_TD)
        if state is None:
            o_THV, _ = kda_chunked(*inputs, self._empty_memory(x_TD.dtype), self.chunk)
        elif x_TD.shape[0] == 1:
            o_THV, memory = kda_recurrent(*inputs, state["memory"])
        else:
            o_THV, memory = kda_chunked(*inputs, state["memory"], self.chunk)
        if state is not None:
            state = {"memory": memory, **last_q, **last_k, **last_v}
        y_THV = self._gated_norm(o_THV, x_TD)
        return jnp.einsum("thv,hvd->td", y_THV, self.wo[...].astype(x_TD.dtype)), state

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

    def _empty_memory(self, dtype: jnp.dtype) -> Array:
        shape = *self.wk.shape[-2:], self.wv.shape[-1]
        return jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32))


def _project_wide(x_TD: Array, weight: nnx.Param) -> Array:
    """[T, D] times [D, ...] in the dtype of x, the result in float32 at least."""
    wide = jnp.promote_types(x_TD.dtype, jnp.float32)
    weight_D = weight[...].astype(x_TD.dtype)
    return jnp.tensordot(x_TD, weight_D, axes=1, preferred_element_type=wide)
