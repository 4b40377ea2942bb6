"""One block: mixers, fast MLP (in the suffix), MLP, each with its norms and residual."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx

from tttjax.models.attention import Attention, AttentionForm
from tttjax.models.caches import Cache, RecurrentCache
from tttjax.models.gated_deltanet import GatedDeltaNet
from tttjax.models.layers import (
    FastWeight,
    Identity,
    MultiHeadMLP,
    NormedConv,
    RMSNorm,
    SwiGLU,
)
from tttjax.models.mamba2 import Mamba2
from tttjax.models.ttt_layer import TTTLayer
from tttjax.ops.attention.attend import AttentionMask
from tttjax.types import Array

BlockState = dict[str, dict[str, Array]] | None  # by name of the branch

Mixer = Attention | Mamba2 | GatedDeltaNet | TTTLayer


@dataclass(frozen=True)
class MambaShape:
    """Sizes of Mamba-2 layers: arguments of `Mamba2`."""

    expand: int
    head_dim: int
    state_size: int
    groups: int
    dt_limits: tuple[float, ...]
    conv_size: int


@dataclass(frozen=True)
class DeltaShape:
    """Sizes of Gated DeltaNet layers: arguments of `GatedDeltaNet`."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    negative: bool
    conv_size: int


@dataclass(frozen=True)
class TTTShape:
    """Sizes and settings of TTT layers."""

    num_heads: int
    chunk_size: int
    base_lr_linear: float
    base_lr_mlp: float
    rope_theta: float
    backbone: str
    output: str
    norm_eps: float


@dataclass(frozen=True)
class BlockShape:
    """Sizes and settings that all blocks of a model share."""

    embed_dim: int
    num_heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    fast_mlp_heads: int
    fast_mlp_init: str
    window_size: int
    local_size: int
    rope_theta: float
    rope_scaling: tuple[float, ...]
    norm_eps: float
    mixer_norm_eps: float
    init_std: float
    qk_norm: bool
    pre_norm: bool
    post_norm: bool
    pre_conv: bool
    conv_size: int
    scan_chunk: int
    param_dtype: jnp.dtype
    query_block: int
    attention_kernel: str
    mamba: MambaShape
    delta: DeltaShape
    ttt: TTTShape


def attention_masks(shape: BlockShape) -> dict[str, AttentionMask]:
    """Attention masks by kind of attention."""
    return {
        "full": AttentionMask(),
        "window": AttentionMask(window=shape.window_size),
        "local": AttentionMask(window=shape.window_size, block=shape.local_size),
    }


def make_mixer(kind: str, shape: BlockShape, rngs: nnx.Rngs) -> Mixer:
    """The mixer called `kind`. Add a new mixer here. Raises ValueError for an unknown kind."""
    common: dict[str, Any] = {"std": shape.init_std, "dtype": shape.param_dtype}
    scanned = {"norm_eps": shape.mixer_norm_eps, "chunk": shape.scan_chunk, **common}
    if kind == "mamba2":
        return Mamba2(shape.embed_dim, rngs, **vars(shape.mamba), **scanned)
    if kind == "gated_deltanet":
        return GatedDeltaNet(shape.embed_dim, rngs, **vars(shape.delta), **scanned)
    if kind in ("ttt_linear", "ttt_mlp"):
        is_linear = kind == "ttt_linear"
        return TTTLayer(
            shape.embed_dim,
            rngs,
            inner="linear" if is_linear else "mlp",
            num_heads=shape.ttt.num_heads,
            chunk_size=shape.ttt.chunk_size,
            base_lr=shape.ttt.base_lr_linear if is_linear else shape.ttt.base_lr_mlp,
            rope_theta=shape.ttt.rope_theta,
            backbone=shape.ttt.backbone,
            output=shape.ttt.output,
            conv_size=shape.conv_size,
            norm_eps=shape.ttt.norm_eps,
            **common,
        )
    masks = attention_masks(shape)
    if kind not in masks:
        raise ValueError(f"unknown mixer {kind!r}")
    return Attention(
        shape.embed_dim,
        shape.num_heads,
        shape.head_dim,
        rngs,
        kv_heads=shape.kv_heads,
        attention_mask=masks[kind],
        rope_theta=shape.rope_theta,
        rope_scaling=shape.rope_scaling,
        qk_norm=shape.qk_norm,
        norm_eps=shape.norm_eps,
        query_block=shape.query_block,
        kernel=shape.attention_kernel,
        **common,
    )


class Block(nnx.Module):
    """The branches of one block in order, each x += post(branch(pre(x))).

    A convolution if the model has pre_conv (its norm is its own); the mixers of `kind`, several
    joined by `+`; the fast MLP if `fast`; the MLP if it has a width.
    """

    def __init__(self, kind: str, fast: bool, shape: BlockShape, rngs: nnx.Rngs):
        mixers = [name for name in kind.split("+") if name != "none"]
        self.mixers = tuple("mixer" if i == 0 else f"mixer{i + 1}" for i in range(len(mixers)))
        self.mlps = ("fast_mlp",) * fast + ("mlp",) * (shape.mlp_dim > 0)
        self.has_conv = shape.pre_conv
        if shape.pre_conv:
            self.pre_conv = NormedConv(
                shape.embed_dim, shape.conv_size, rngs, eps=shape.norm_eps, dtype=shape.param_dtype
            )
        for name, mixer in zip(self.mixers, mixers, strict=True):
            self._add(name, make_mixer(mixer, shape, rngs), shape)
        for name in self.mlps:
            self._add(name, _make_mlp(name == "fast_mlp", shape, rngs), shape)

    def _add(self, name: str, branch: nnx.Module, shape: BlockShape) -> None:
        def norm(on: bool):
            if not on:
                return Identity()
            return RMSNorm(shape.embed_dim, "embed", eps=shape.norm_eps, dtype=shape.param_dtype)

        setattr(self, f"{name}_norm", norm(shape.pre_norm))
        setattr(self, name, branch)
        setattr(self, f"{name}_post_norm", norm(shape.post_norm))

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
        """x [T, D] -> (x [T, D], the new state), as a mixer's (`attention`)."""
        new_state: dict[str, Any] = {}
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

    def _branch(self, name: str) -> tuple[Any, Any, Any]:
        return (
            getattr(self, f"{name}_norm"),
            getattr(self, name),
            getattr(self, f"{name}_post_norm"),
        )


def _make_mlp(fast: bool, shape: BlockShape, rngs: nnx.Rngs) -> SwiGLU | MultiHeadMLP:
    starts_at_zero = fast and shape.fast_mlp_init == "zero"
    common: dict[str, Any] = {
        "std": shape.init_std,
        "out_std": 0.0 if starts_at_zero else shape.init_std,
        "dtype": shape.param_dtype,
        "kind": FastWeight if fast else nnx.Param,
    }
    if fast and shape.fast_mlp_heads:
        return MultiHeadMLP(shape.embed_dim, shape.fast_mlp_heads, rngs, **common)
    return SwiGLU(shape.embed_dim, shape.mlp_dim, rngs, **common)
