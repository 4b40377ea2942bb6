"""One block of the Transformer: mixer, fast MLP (in the suffix), MLP, each with its residual."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from tttjax.models.attention import Attention, NoMixer, State
from tttjax.models.layers import FastWeight, Identity, RMSNorm, SwiGLU
from tttjax.ops.attention import Sight
from tttjax.types import Array


@dataclass(frozen=True)
class BlockShape:
    """Sizes and choices that all blocks of a model share."""

    embed_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    window_size: int
    local_size: int
    rope_theta: float
    norm_eps: float
    init_std: float
    qk_norm: bool
    pre_norm: bool
    post_norm: bool
    param_dtype: jnp.dtype
    query_block: int


def make_mixer(kind: str, shape: BlockShape, rngs: nnx.Rngs) -> Attention | NoMixer:
    """The mixer called `kind`; a new mixer joins here.

    Raises ValueError for a kind that there is not.
    """
    if kind == "none":
        return NoMixer()
    sights = {
        "full": Sight(),
        "window": Sight(window=shape.window_size),
        "local": Sight(window=shape.window_size, block=shape.local_size),
    }
    if kind not in sights:
        raise ValueError(f"unknown mixer {kind!r}; one of none, {', '.join(sights)}")
    return Attention(
        shape.embed_dim,
        shape.num_heads,
        shape.head_dim,
        rngs,
        sight=sights[kind],
        rope_theta=shape.rope_theta,
        qk_norm=shape.qk_norm,
        norm_eps=shape.norm_eps,
        std=shape.init_std,
        dtype=shape.param_dtype,
        query_block=shape.query_block,
    )


class Block(nnx.Module):
    """x += post(mixer(pre(x))); x += post(fast_mlp(pre(x))) if any; x += post(mlp(pre(x)))."""

    def __init__(self, kind: str, fast: bool, shape: BlockShape, rngs: nnx.Rngs):
        def norm(on: bool):
            if not on:
                return Identity()
            return RMSNorm(shape.embed_dim, "embed", eps=shape.norm_eps, dtype=shape.param_dtype)

        def mlp(weight_type):
            return SwiGLU(
                shape.embed_dim,
                shape.mlp_dim,
                rngs,
                std=shape.init_std,
                dtype=shape.param_dtype,
                kind=weight_type,
            )

        self.mixer = make_mixer(kind, shape, rngs)
        if kind != "none":
            self.mixer_norm = norm(shape.pre_norm)
            self.mixer_post_norm = norm(shape.post_norm)
        if fast:
            self.fast_mlp_norm = norm(shape.pre_norm)
            self.fast_mlp = mlp(FastWeight)
            self.fast_mlp_post_norm = norm(shape.post_norm)
        self.mlp_norm = norm(shape.pre_norm)
        self.mlp = mlp(nnx.Param)
        self.mlp_post_norm = norm(shape.post_norm)
        self.has_mixer = kind != "none"
        self.has_fast_mlp = fast

    def __call__(self, x_TD: Array, state: State, position: Array) -> tuple[Array, State]:
        if self.has_mixer:
            y_TD, state = self.mixer(self.mixer_norm(x_TD), state, position)
            x_TD = x_TD + self.mixer_post_norm(y_TD)
        if self.has_fast_mlp:
            x_TD = x_TD + self.fast_mlp_post_norm(self.fast_mlp(self.fast_mlp_norm(x_TD)))
        return x_TD + self.mlp_post_norm(self.mlp(self.mlp_norm(x_TD))), state
