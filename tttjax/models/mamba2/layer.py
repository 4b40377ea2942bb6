"""Mamba-2 (arXiv 2405.21060): a state-space model with one decay per head and token."""

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
from tttjax.ops.norms import rms_norm
from tttjax.ops.short_conv import short_conv
from tttjax.ops.ssd import ssd, ssd_recurrent
from tttjax.types import Array

A_RANGE = (1.0, 16.0)  # decay rates at the start of training, uniform


class Mamba2(nnx.Module):
    """The Mamba-2 mixer: projections, short convolutions, SSD, gated norm, projection.

    H heads of P = head_dim entries; b and c of N = state_size entries are shared by the H/G
    consecutive heads of a group.
    """

    def __init__(self, kind: str, model: ModelConfig, rngs: nnx.Rngs):
        del kind
        sizes, embed_dim = model.mamba2, model.embed_dim
        heads, head_dim = sizes.heads(model), sizes.head_dim
        dtype = jnp.dtype(model.param_dtype)

        def weight(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
            std = model.init_std
            return normal_weight(rngs, shape, axes, std=std, dtype=dtype, cast_to_compute=True)

        per_head = (heads, head_dim), ("heads", "head_dim")
        per_group = (sizes.groups, sizes.state_size), ("kv_groups", "state")

        def input_weight(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
            return weight((embed_dim, *shape), ("embed", *axes))

        def taps(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
            return uniform_taps(rngs, model.conv_size, shape, axes, dtype)

        def full(value: int, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
            return nnx.Param(jnp.full(shape, value, dtype), axes=axes)

        self.wz, self.wx = input_weight(*per_head), input_weight(*per_head)
        self.wb, self.wc = input_weight(*per_group), input_weight(*per_group)
        self.wdt = weight((embed_dim, heads), ("embed", "heads"))
        self.conv_x, self.conv_x_bias = taps(*per_head), full(0, *per_head)
        self.conv_b, self.conv_b_bias = taps(*per_group), full(0, *per_group)
        self.conv_c, self.conv_c_bias = taps(*per_group), full(0, *per_group)
        self.dt_bias = initial_dt_bias(rngs, heads, dtype)
        self.a_log = initial_a_log(rngs, heads, *A_RANGE, dtype)
        self.skip = full(1, (heads,), ("heads",))
        self.norm = full(1, *per_head)
        self.wo = weight((heads, head_dim, embed_dim), ("heads", "head_dim", "embed"))
        self.dt_limits = sizes.dt_limits
        self.norm_eps = model.mixer_norm_eps
        self.chunk = model.scan_chunk

    cache = RecurrentCache()

    def init_state(self, max_length: int, dtype: jnp.dtype) -> dict[str, Array]:
        """The state before the first token; its size does not depend on `max_length`."""
        del max_length
        wide = jnp.promote_types(dtype, jnp.float32)
        kernels = {"conv_x": self.conv_x, "conv_b": self.conv_b, "conv_c": self.conv_c}
        empty_HPN = jnp.zeros((*self.norm.shape[-2:], self.wb.shape[-1]), wide)
        return {"ssm": empty_HPN, **empty_conv_states(kernels, dtype)}

    def __call__(
        self, x_TD: Array, state: State, position: Array, form: AttentionForm = "dense"
    ) -> tuple[Array, State]:
        """x [T, D] -> y [T, D]; state None: a whole sequence (see `mixer`)."""
        del position, form
        cache = state or {}

        def convolved(weight: nnx.Param, name: str) -> tuple[Array, MixerState]:
            kernel, bias = getattr(self, name), getattr(self, f"{name}_bias")
            out, last = short_conv(project(x_TD, weight), kernel[...], bias[...], cache.get(name))
            return jax.nn.silu(out), {} if last is None else {name: last}

        x_THP, last_x = convolved(self.wx, "conv_x")
        b_TGN, last_b = convolved(self.wb, "conv_b")
        c_TGN, last_c = convolved(self.wc, "conv_c")
        dt_TH = self._step_sizes(x_TD)
        a_H = -jnp.exp(self.a_log[...].astype(dt_TH.dtype))
        operands = x_THP, dt_TH, a_H, b_TGN, c_TGN, self.skip[...]
        if state is None:
            empty_HPN = jnp.zeros((*self.norm.shape, b_TGN.shape[-1]), dt_TH.dtype)
            y_THP, _ = ssd(*operands, empty_HPN, self.chunk)
        elif x_TD.shape[0] == 1:
            y_THP, ssm = ssd_recurrent(*operands, state["ssm"])
        else:
            y_THP, ssm = ssd(*operands, state["ssm"], self.chunk)
        u_THP = self._gated_norm(y_THP, project(x_TD, self.wz))
        if state is not None:
            state = {"ssm": ssm, **last_x, **last_b, **last_c}
        return jnp.einsum("thp,hpd->td", u_THP, self.wo[...].astype(x_TD.dtype)), state

    def _step_sizes(self, x_TD: Array) -> Array:
        """dt = softplus(x wdt + dt_bias) within the limits, float32 at least: [T, H]."""
        wide = jnp.promote_types(x_TD.dtype, jnp.float32)
        wdt_DH = self.wdt[...].astype(x_TD.dtype)
        raw_TH = jnp.einsum("td,dh->th", x_TD, wdt_DH, preferred_element_type=wide)
        dt_TH = jax.nn.softplus(raw_TH + self.dt_bias[...].astype(wide))
        return jnp.clip(dt_TH, *self.dt_limits) if self.dt_limits else dt_TH

    def _gated_norm(self, y_THP: Array, z_THP: Array) -> Array:
        """RMS norm of y * silu(z) within each group of heads, in float32 at least."""
        wide = jnp.promote_types(y_THP.dtype, jnp.float32)
        groups = self.wb.shape[-2]
        gated_THP = y_THP.astype(wide) * jax.nn.silu(z_THP.astype(wide))
        gated_TGE = gated_THP.reshape(y_THP.shape[0], groups, -1)
        weight_GE = self.norm[...].reshape(groups, -1)
        normed_TGE = rms_norm(gated_TGE, weight_GE, self.norm_eps)
        return normed_TGE.reshape(y_THP.shape).astype(y_THP.dtype)
