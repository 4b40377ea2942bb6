"""Gated DeltaNet (arXiv 2412.06464): a recurrent mixer with the gated delta rule.

With `negative_eigenvalues`, beta reaches 2 and the transition of the state may have negative
eigenvalues (arXiv 2411.12537).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from tttjax.config.model import ModelConfig
from tttjax.models.caches import MixerState, RecurrentCache
from tttjax.models.layers import normal_weight
from tttjax.models.mixer import AttentionForm, State
from tttjax.models.recurrent import (
    empty_conv_states,
    initial_a_log,
    initial_dt_bias,
    project,
    uniform_taps,
)
from tttjax.ops.delta_rule import gated_delta_rule, gated_delta_rule_recurrent, l2_normalise
from tttjax.ops.norms import rms_norm
from tttjax.ops.short_conv import short_conv
from tttjax.types import Array

A_RANGE = (1e-4, 16.0)  # uniform(0, 16), but with a finite logarithm


class GatedDeltaNet(nnx.Module):
    """The gated delta rule between projections: [T, D] -> [T, D].

    Short convolutions and silu before q, k and v; q and k of unit length; per value head an
    RMS norm after the rule, then the gate silu(z). No biases.
    """

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
            o_THV, _ = gated_delta_rule(*inputs, self._empty_memory(x_TD.dtype), self.chunk)
        elif x_TD.shape[0] == 1:
            o_THV, memory = gated_delta_rule_recurrent(*inputs, state["memory"])
        else:
            o_THV, memory = gated_delta_rule(*inputs, state["memory"], self.chunk)
        if state is not None:
            state = {"memory": memory, **last_q, **last_k, **last_v}
        y_THV = self._gated_norm(o_THV, project(x_TD, self.wz))
        return jnp.einsum("thv,hvd->td", y_THV, self.wo[...].astype(x_TD.dtype)), state

    def _gates(self, x_TD: Array) -> tuple[Array, Array]:
        """Log-decay g <= 0 and beta of each token, float32 at least: [T, H]."""
        wide = jnp.promote_types(x_TD.dtype, jnp.float32)
        wa_DH, wb_DH = (weight[...].astype(x_TD.dtype) for weight in (self.wa, self.wb))
        a_TH = jnp.matmul(x_TD, wa_DH, preferred_element_type=wide)
        b_TH = jnp.matmul(x_TD, wb_DH, preferred_element_type=wide)
        dt_TH = jax.nn.softplus(a_TH + self.dt_bias[...].astype(wide))
        g_TH = -jnp.exp(self.a_log[...].astype(wide)) * dt_TH
        return g_TH, jax.nn.sigmoid(b_TH) * self.largest_beta

    def _gated_norm(self, o_THV: Array, z_THV: Array) -> Array:
        """RMS norm of each head, then times silu(z), in float32 at least."""
        wide = jnp.promote_types(o_THV.dtype, jnp.float32)
        normed_THV = rms_norm(o_THV.astype(wide), self.norm[...], self.norm_eps)
        return (normed_THV * jax.nn.silu(z_THV.astype(wide))).astype(o_THV.dtype)

    def _empty_memory(self, dtype: jnp.dtype) -> Array:
        value_heads, value_dim = self.wv.shape[-2:]
        shape = value_heads, self.wk.shape[-1], value_dim
        return jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32))
