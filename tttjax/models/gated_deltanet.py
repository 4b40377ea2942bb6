"""Gated DeltaNet (arXiv 2412.06464): a recurrent mixer that corrects what it remembers.

With `negative`, beta reaches 2 and the memory's transition may have negative eigenvalues
(arXiv 2411.12537).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from tttjax.models.layers import normal_weight
from tttjax.ops.delta_rule import gated_delta_rule, gated_delta_rule_recurrent, l2_normalise
from tttjax.ops.norms import rms_norm
from tttjax.ops.short_conv import short_conv
from tttjax.types import Array

State = dict[str, Array] | None

MAX_DECAY_RATE = 16.0
MIN_DECAY_RATE = 1e-4  # its logarithm is a weight
TIME_STEPS = (1e-3, 1e-1)
MIN_TIME_STEP = 1e-4


class GatedDeltaNet(nnx.Module):
    """The gated delta rule between projections: [T, D] -> [T, D].

    Short convolutions and silu before q, k and v; q and k of unit length; per value head an
    RMS norm after the rule, then the gate silu(z). No biases.
    """

    def __init__(
        self,
        embed_dim: int,
        rngs: nnx.Rngs,
        *,
        key_heads: int,
        value_heads: int,
        key_dim: int,
        value_dim: int,
        conv_size: int,
        negative: bool,
        norm_eps: float,
        chunk: int,
        std: float,
        dtype: jnp.dtype,
    ):
        def into(*heads):
            axes = ("embed", "heads", "head_dim")[: 1 + len(heads)]
            return normal_weight(rngs, (embed_dim, *heads), axes, std=std, dtype=dtype)

        def conv(*heads):
            bound = conv_size**-0.5
            value = jax.random.uniform(rngs.params(), (conv_size, *heads), dtype, -bound, bound)
            return nnx.Param(value, axes=("taps", "heads", "head_dim"))

        self.wq, self.wk = into(key_heads, key_dim), into(key_heads, key_dim)
        self.wv, self.wz = into(value_heads, value_dim), into(value_heads, value_dim)
        self.wb, self.wa = into(value_heads), into(value_heads)
        self.conv_q, self.conv_k = conv(key_heads, key_dim), conv(key_heads, key_dim)
        self.conv_v = conv(value_heads, value_dim)
        self.a_log = nnx.Param(_initial_a_log(rngs, value_heads, dtype), axes=("heads",))
        self.dt_bias = nnx.Param(_initial_dt_bias(rngs, value_heads, dtype), axes=("heads",))
        self.norm = nnx.Param(jnp.ones((value_dim,), dtype), axes=("head_dim",))
        out = (value_heads, value_dim, embed_dim), ("heads", "head_dim", "embed")
        self.wo = normal_weight(rngs, *out, std=std, dtype=dtype)
        self.negative = negative
        self.norm_eps = norm_eps
        self.chunk = chunk

    def init_state(self, max_length: int, dtype: jnp.dtype) -> dict[str, Array]:
        """An empty memory, float32 at least, and no inputs of the convolutions; of constant size."""
        del max_length
        past = {
            name: jnp.zeros((kernel.shape[-3] - 1, *kernel.shape[-2:]), dtype)
            for name, kernel in self._convolutions().items()
        }
        return {"memory": self._empty_memory(dtype), **past}

    def __call__(self, x_TD: Array, state: State, position: Array) -> tuple[Array, State]:
        del position  # the memory knows of no positions
        mixed, past = self._convolve(x_TD, state)
        wide = jnp.promote_types(x_TD.dtype, jnp.float32)
        beta_TH = jax.nn.sigmoid(_project(x_TD, self.wb).astype(wide)) * (2 if self.negative else 1)
        step_TH = jax.nn.softplus(_project(x_TD, self.wa).astype(wide) + self.dt_bias[...])
        g_TH = -jnp.exp(self.a_log[...].astype(wide)) * step_TH

        memory = self._empty_memory(x_TD.dtype) if state is None else state["memory"]
        q_THK, k_THK = l2_normalise(mixed["conv_q"]), l2_normalise(mixed["conv_k"])
        inputs = q_THK, k_THK, mixed["conv_v"], g_TH, beta_TH, memory
        if state is not None and x_TD.shape[0] == 1:
            o_THV, memory = gated_delta_rule_recurrent(*inputs)
        else:
            o_THV, memory = gated_delta_rule(*inputs, self.chunk)

        gate_THV = jax.nn.silu(_project(x_TD, self.wz))
        y_THV = rms_norm(o_THV, self.norm[...], self.norm_eps) * gate_THV
        y_TD = jnp.einsum("thv,hvd->td", y_THV, self.wo[...].astype(x_TD.dtype))
        return y_TD, None if state is None else {"memory": memory, **past}

    def _convolve(self, x_TD: Array, state: State) -> tuple[dict[str, Array], dict[str, Array]]:
        """silu(conv(x w)) for q, k and v, and the convolutions' new states, by kernel's name."""
        mixed, past = {}, {}
        weights = (self.wq, self.wk, self.wv)
        for weight, (name, kernel) in zip(weights, self._convolutions().items(), strict=True):
            before = None if state is None else state[name]
            y, past[name] = short_conv(_project(x_TD, weight), kernel[...], None, before)
            mixed[name] = jax.nn.silu(y)
        return mixed, past

    def _convolutions(self) -> dict[str, nnx.Param]:
        return {"conv_q": self.conv_q, "conv_k": self.conv_k, "conv_v": self.conv_v}

    def _empty_memory(self, dtype: jnp.dtype) -> Array:
        value_heads, value_dim = self.wv.shape[-2:]
        shape = value_heads, self.wk.shape[-1], value_dim
        return jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32))


def _project(x_TD: Array, weight: nnx.Param) -> Array:
    return jnp.tensordot(x_TD, weight[...].astype(x_TD.dtype), axes=1)


def _initial_a_log(rngs: nnx.Rngs, heads: int, dtype: jnp.dtype) -> Array:
    """log A, A uniform in (0, 16): how fast a head forgets per unit of its time step."""
    rate_H = jax.random.uniform(rngs.params(), (heads,), dtype, MIN_DECAY_RATE, MAX_DECAY_RATE)
    return jnp.log(rate_H)


def _initial_dt_bias(rngs: nnx.Rngs, heads: int, dtype: jnp.dtype) -> Array:
    """The inverse softplus of a time step, which is log-uniform in [0.001, 0.1]."""
    low, high = jnp.log(jnp.asarray(TIME_STEPS, dtype))
    step_H = jnp.exp(jax.random.uniform(rngs.params(), (heads,), dtype, low, high))
    step_H = jnp.maximum(step_H, MIN_TIME_STEP)
    return step_H + jnp.log(-jnp.expm1(-step_H))
