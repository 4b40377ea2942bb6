"""Builds a model from a configuration, whose classes this package does not import."""

from typing import Any

import jax.numpy as jnp

from tttjax.models.block import BlockShape, DeltaShape, MambaShape, TTTShape
from tttjax.models.transformer import Transformer


def build_model(model: Any, inner: Any) -> Transformer:
    """The model of a `ModelConfig`, with fast weights and chunk size of an `InnerConfig`."""
    return Transformer(
        shape=_block_shape(model, inner.chunk_size),
        vocab_size=model.vocab_size,
        mixers=tuple(model.mixers),
        num_layers=model.num_layers,
        suffix_layers=model.suffix_layers,
        fast_mlp=model.fast_mlp,
        tied=model.tie_embeddings,
        compute_dtype=jnp.dtype(model.compute_dtype),
        remat=model.remat == "block",
        fast_patterns=tuple(inner.fast_paths),
    )


def _block_shape(model: Any, chunk_size: int) -> BlockShape:
    key_heads, value_heads, key_dim, value_dim = model.delta_sizes
    return BlockShape(
        embed_dim=model.embed_dim,
        num_heads=model.num_heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_size,
        mlp_dim=model.mlp_dim,
        fast_mlp_heads=model.fast_mlp_heads,
        fast_mlp_init=model.fast_mlp_init,
        window_size=model.window_size,
        local_size=chunk_size,
        rope_theta=model.rope_theta,
        rope_scaling=model.rope_scaling,
        norm_eps=model.norm_eps,
        mixer_norm_eps=model.mixer_norm_eps,
        init_std=model.init_std,
        qk_norm=model.qk_norm,
        pre_norm=model.pre_norm,
        post_norm=model.post_norm,
        pre_conv=model.pre_conv,
        conv_size=model.conv_size,
        scan_chunk=model.scan_chunk,
        param_dtype=jnp.dtype(model.param_dtype),
        query_block=min(1024, max(128, model.window_size // 2)),
        attention_kernel=model.attention_kernel,
        mamba=MambaShape(
            expand=model.mamba_expand,
            head_dim=model.mamba_head_dim,
            state_size=model.mamba_state,
            groups=model.mamba_groups,
            dt_limits=model.mamba_dt_limits,
            conv_size=model.conv_size,
        ),
        delta=DeltaShape(
            key_heads=key_heads,
            value_heads=value_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            negative=model.delta_negative,
            conv_size=model.conv_size,
        ),
        ttt=TTTShape(
            num_heads=model.ttt_num_heads,
            chunk_size=model.ttt_chunk,
            base_lr_linear=model.ttt_base_lr("linear"),
            base_lr_mlp=model.ttt_base_lr("mlp"),
            rope_theta=model.ttt_rope_theta,
            backbone=model.ttt_backbone,
            output=model.ttt_output,
            norm_eps=model.norm_eps,
        ),
    )
