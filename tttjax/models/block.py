"""One block: mixers, fast MLP (in the suffix), MLP, each with its norms and residual."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from tttjax.config.model import ModelConfig, split_mixers
from tttjax.models.caches import Cache, RecurrentCache
from tttjax.models.layers import (
    FastWeight,
    Identity,
    MultiHeadMLP,
    NormedConv,
    RMSNorm,
    SwiGLU,
)
from tttjax.models.mixer import AttentionForm, Mixer, make_mixer
from tttjax.types import Array, PyTree

BlockState = dict[str, dict[str, Array]] | None  # by name of the branch


class Block(nnx.Module):
    """The branches of one block in order, each x += post(branch(pre(x))).

    A convolution if the model has pre_conv (its norm is its own); the mixers of `kind`, several
    joined by `+`; the fast MLP if `fast`; the MLP if it has a width.
    """

    def __init__(self, kind: str, fast: bool, model: ModelConfig, rngs: nnx.Rngs):
        mixers = split_mixers(kind)
        self.mixers = tuple("mixer" if i == 0 else f"mixer{i + 1}" for i in range(len(mixers)))
        self.mlps = ("fast_mlp",) * fast + ("mlp",) * (model.mlp_dim > 0)
        self.has_conv = model.pre_conv
        if model.pre_conv:
            sizes = model.embed_dim, model.conv_size
            self.pre_conv = NormedConv(*sizes, rngs, eps=model.norm_eps, dtype=_param_dtype(model))
        for name, mixer in zip(self.mixers, mixers, strict=True):
            self._add(name, make_mixer(mixer, model, rngs), model)
        for name in self.mlps:
            self._add(name, _make_mlp(name == "fast_mlp", model, rngs), model)

    def _add(self, name: str, branch: Mixer | nnx.Module, model: ModelConfig) -> None:
        def norm(on: bool) -> RMSNorm | Identity:
            if not on:
                return Identity()
            dtype = _param_dtype(model)
            return RMSNorm(model.embed_dim, "embed", eps=model.norm_eps, dtype=dtype)

        setattr(self, f"{name}_norm", norm(model.pre_norm))
        setattr(self, name, branch)
        setattr(self, f"{name}_post_norm", norm(model.post_norm))

    def init_state(self, max_length: int, dtype: jnp.dtype) -> dict[str, dict[str, Array]]:
        """The state of every branch before the first token."""
        state = {name: getattr(self, name).init_state(max_length, dtype) for name in self.mixers}
        if self.has_conv:
            state["pre_conv"] = self.pre_conv.init_state(dtype)
        return state

    def caches(self) -> dict[str, Cache]:
        """The cache of every branch that has a state."""
        caches: dict[str, Cache] = {name: getattr(self, name).cache for name in self.mixers}
        return caches | ({"pre_conv": RecurrentCache()} if self.has_conv else {})

    def __call__(
        self, x_TD: Array, state: BlockState, position: Array, form: AttentionForm = "dense"
    ) -> tuple[Array, BlockState]:
        """x [T, D] -> (x [T, D], the new state), as a mixer's (`mixer`)."""
        new_state: dict[str, PyTree] = {}
        if self.has_conv:
            conv_state = None if state is None else state["pre_conv"]
            y_TD, new_state["pre_conv"] = self.pre_conv(x_TD, conv_state)
            x_TD = x_TD + y_TD
        for name in self.mixers:
            pre, mixer, post = self._branch(name)
            y_TD, new_state[name] = mixer(pre(x_TD), state and state[name], position, form)
            x_TD = x_TD + post(y_TD)
        for name in self.mlps:
            pre, mlp, post = self._branch(name)
            x_TD = x_TD + post(mlp(pre(x_TD)))
        return x_TD, None if state is None else new_state

    def _branch(self, name: str) -> tuple[RMSNorm | Identity, Any, RMSNorm | Identity]:
        return (
            getattr(self, f"{name}_norm"),
            getattr(self, name),
            getattr(self, f"{name}_post_norm"),
        )


def _param_dtype(model: ModelConfig) -> jnp.dtype:
    return jnp.dtype(model.param_dtype)


def _make_mlp(fast: bool, model: ModelConfig, rngs: nnx.Rngs) -> SwiGLU | MultiHeadMLP:
    starts_at_zero = fast and model.fast_mlp_init == "zero"
    common: dict[str, Any] = {
        "std": model.init_std,
        "out_std": 0.0 if starts_at_zero else model.init_std,
        "dtype": _param_dtype(model),
        "kind": FastWeight if fast else nnx.Param,
    }
    if fast and model.fast_mlp_heads:
        return MultiHeadMLP(model.embed_dim, model.fast_mlp_heads, rngs, **common)
    return SwiGLU(model.embed_dim, model.mlp_dim, rngs, **common)
