"""Reporting which attention kernels a configuration uses on a platform, and why.

The choice is made when a program is lowered: by `ops.attention.library` for whole sequences, by
`ops.window_attention` for the chunks of the inner loop. This module predicts it, and raises an
error if the configuration requires a library kernel that is not supported.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tttjax.config import Config
from tttjax.errors import UserError
from tttjax.models.attention.config import AttentionConfig
from tttjax.models.attention.layer import attention_mask
from tttjax.models.split_model import SplitModel
from tttjax.models.transformer import build_model
from tttjax.ops.attention.library import KERNELS, unsupported_reason, unsupported_reason_on_backend
from tttjax.ops.window_attention import window_attention_unsupported_reason
from tttjax.ttt.outer_loss import learns


@dataclass(frozen=True)
class KernelChoice:
    """The kernel of one kind of attention. fallback_reason: why it is XLA; "" for a kernel."""

    kernel: str
    fallback_reason: str = ""


def platform_of(mesh: Mesh) -> str:
    """The platform that programs on this mesh are lowered for: "cuda", "tpu" or "cpu"."""
    device = mesh.devices.flat[0]
    return "cuda" if device.device_kind.startswith("NVIDIA") else device.platform


def choose_kernels(config: Config, platform: str) -> dict[str, KernelChoice]:
    """The kernel for whole sequences of `train.seq_len` tokens, by kind of attention.

    Programs are compiled on this machine, which must have the library.
    Raises UserError if `model.attention_kernel` is "library" and a kind is not supported.
    """
    model = config.model
    q_THK = jax.ShapeDtypeStruct(
        (config.train.seq_len, model.num_heads, model.head_size), model.compute_dtype
    )
    choices = {}
    for kind in (kind for kind in AttentionConfig.kinds if kind in model.mixer_kinds):
        reason = unsupported_reason(platform, q_THK, attention_mask(kind, model))
        if not reason:
            reason = unsupported_reason_on_backend(platform, q_THK, model.kv_heads)
        if reason and model.attention_kernel == "library":
            raise UserError(
                f'model.attention_kernel = "library" does not support {kind} attention here '
                f'({reason}): use "auto" to fall back to XLA.'
            )
        if model.attention_kernel == "xla":
            reason = 'model.attention_kernel = "xla"'
        choices[kind] = KernelChoice("XLA", reason) if reason else KernelChoice(KERNELS[platform])
    return choices


def choose_chunk_kernels(config: Config, platform: str) -> dict[str, KernelChoice]:
    """The kernel for chunks of the inner loop, by kind of window attention in the suffix.

    Empty without an inner loop, and for the reference form, which materializes all scores.
    """
    model, network = config.model, build_model(config.model, config.inner)
    if config.inner.form != "fast" or not learns(network, config.inner.meta_gradient):
        return {}
    if "window" not in SplitModel(network).sequential_mixers:
        return {}
    q_shape = config.inner.chunk_size, model.num_heads, model.head_size
    reason = window_attention_unsupported_reason(
        *(platform, q_shape, model.window_size),
        jnp.dtype(model.compute_dtype),
        kv_heads=model.kv_heads,
        kernel="xla" if model.attention_kernel == "xla" else "auto",
    )
    return {"window": KernelChoice("XLA", reason) if reason else KernelChoice("Pallas")}


def describe_kernels(config: Config, platform: str) -> str:
    """Both choices in one line; "" for a model without attention."""
    parts = {
        "whole sequences": choose_kernels(config, platform),
        "chunks": choose_chunk_kernels(config, platform),
    }
    phrases = [f"over {what}: {_join(choices)}" for what, choices in parts.items() if choices]
    return f"attention {'; '.join(phrases)}" if phrases else ""


def _join(choices: dict[str, KernelChoice]) -> str:
    return ", ".join(
        f"{kind} by {choice.kernel}"
        + (f" ({choice.fallback_reason})" if choice.fallback_reason else "")
        for kind, choice in choices.items()
    )
