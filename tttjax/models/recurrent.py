"""Shared by recurrent mixers: projections, convolutions, initial decays, and `DeltaRuleMixer`."""

from collections.abc import Callable, Mapping
from math import log

import jax
import jax.numpy as jnp
from flax import nnx

from tttjax.models.caches import MixerState, RecurrentCache
from tttjax.models.mixer import AttentionForm, State
from tttjax.ops.delta_rule import gated_delta_rule_recurrent, l2_normalise
from tttjax.ops.short_conv import short_conv
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


class DeltaRuleMixer(nnx.Module):
    """A delta rule between projections, [T, D] -> [T, D]: what such mixers share.

    Short convolutions and silu before q, k and v; q and k of unit length. A subclass makes the
    weights `wq`, `wk`, `wv`, `conv_q`, `conv_k`, `conv_v` and `wo`, and has the chunk-parallel
    `rule` (in chunks of `chunk` tokens), the gates and the gated norm.
    """

    rule: Callable[..., tuple[Array, Array]]
    chunk: int
    wk: nnx.Param
    wv: nnx.Param
    wo: nnx.Param
    cache = RecurrentCache()

    def init_state(self, max_length: int, dtype: jnp.dtype) -> dict[str, Array]:
        """The state before the first token; its size does not depend on `max_length`."""
        del max_length
        kernels = {name: getattr(self, name) for name in ("conv_q", "conv_k", "conv_v")}
        return {"memory": self._empty_memory(dtype), **empty_conv_states(kernels, dtype)}

    def __call__(
        self, x_TD: Array, state: State, position: Array, form: AttentionForm = "dense"
    ) -> tuple[Array, State]:
        """x [T, D] -> y [T, D]; state None: a whole sequence (see `mixer`)."""
        del position, form
        cache = state or {}

        def convolved(name: str) -> tuple[Array, MixerState]:
            kernel_JHK, conv = getattr(self, f"conv_{name}")[...], f"conv_{name}"
            u_THK = project(x_TD, getattr(self, f"w{name}"))
            out_THK, last = short_conv(u_THK, kernel_JHK, None, cache.get(conv))
            return jax.nn.silu(out_THK), {} if last is None else {conv: last}

        (q_THK, last_q), (k_THK, last_k), (v_THV, last_v) = map(convolved, "qkv")
        inputs = l2_normalise(q_THK), l2_normalise(k_THK), v_THV, *self._gates(x_TD)
        memory_HKV = self._empty_memory(x_TD.dtype) if state is None else state["memory"]
        if state is not None and x_TD.shape[0] == 1:
            o_THV, memory_HKV = gated_delta_rule_recurrent(*inputs, memory_HKV)
        else:
            o_THV, memory_HKV = self.rule(*inputs, memory_HKV, self.chunk)
        if state is not None:
            state = {"memory": memory_HKV, **last_q, **last_k, **last_v}
        y_THV = self._gated_norm(o_THV, x_TD)
        return jnp.einsum("thv,hvd->td", y_THV, self.wo[...].astype(x_TD.dtype)), state

    def _gates(self, x_TD: Array) -> tuple[Array, Array]:
        """Log-decay g <= 0 [T, H] or [T, H, K] and beta [T, H] of each token, float32 at least."""
        raise NotImplementedError

    def _gated_norm(self, o_THV: Array, x_TD: Array) -> Array:
        """The norm of each head of the rule's output, and its gate."""
        raise NotImplementedError

    def _empty_memory(self, dtype: jnp.dtype) -> Array:
        value_heads, value_dim = self.wv.shape[-2:]
        shape = value_heads, self.wk.shape[-1], value_dim
        return jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32))
