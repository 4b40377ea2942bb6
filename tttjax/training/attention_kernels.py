"""Which kernel computes attention on a platform, and why.

`ops.library_attention` chooses it for whole sequences when a program is lowered, and
`ops.window_attention` for the chunks that are learned from. Here it is told in advance, and an
error is raised where the configuration insists on a library's kernel that cannot be had.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tttjax.config import Config
from tttjax.errors import UserError
from tttjax.models import SplitModel, build_model
from tttjax.models.block import attention_masks
from tttjax.ops.attention.library import KERNELS, unsupported_reason, unsupported_reason_here
from tttjax.ops.window_attention import window_attention_unsupported_reason
from tttjax.ttt.outer_loss import learns


@dataclass(frozen=True)
class KernelChoice:
    """The kernel of one kind of attention. why: it is XLA's form; empty if it is a kernel."""

    kernel: str
    fallback_reason: str = ""


def platform_of(mesh: Mesh) -> str:
    """The platform that programs on this mesh are lowered for: "cuda", "tpu", "cpu"."""
    device = mesh.devices.flat[0]
    return "cuda" if device.device_kind.startswith("NVIDIA") else device.platform


def choose_kernels(
    config: Config, platform: str, *, compile_locally: bool = True
) -> dict[str, KernelChoice]:
    """By kind of attention that the configuration has; of sequences of `train.seq_len` tokens.

    here: whether this machine makes the programs, so that it must have the library.
    Raises UserError where `model.attention_kernel` insists on the library and it does not apply.
    """
    model = config.model
    shape = build_model(model, config.inner).shape
    q_THK = jax.ShapeDtypeStruct(
        (config.train.seq_len, shape.num_heads, shape.head_dim), model.compute_dtype
    )
    found = {}
    for kind, attention_mask in attention_masks(shape).items():
        if kind not in model.mixer_kinds:
            continue
        fallback_reason = unsupported_reason(platform, q_THK, attention_mask)
        if not fallback_reason and compile_locally:
            fallback_reason = unsupported_reason_here(platform, q_THK, shape.kv_heads)
        if fallback_reason and model.attention_kernel == "library":
            raise UserError(
                f'model.attention_kernel = "library" does not support {kind} attention here '
                f'({fallback_reason}): use "auto" to fall back to XLA.'
            )
        if model.attention_kernel == "xla":
            fallback_reason = 'model.attention_kernel = "xla"'
        found[kind] = (
            KernelChoice("XLA", fallback_reason)
            if fallback_reason
            else KernelChoice(KERNELS[platform])
        )
    return found


def choose_chunk_kernels(config: Config, platform: str) -> dict[str, KernelChoice]:
    """By kind of attention that training reads with chunk by chunk, over a window of the past.

    Empty where nothing learns, and for the reference form, which has all scores in memory.
    """
    model = build_model(config.model, config.inner)
    if config.inner.form != "fast" or not learns(model, config.inner.meta_gradient):
        return {}
    kinds = SplitModel(model).sequential_mixers
    shape, chunk = model.shape, config.inner.chunk_size
    found = {}
    for kind, attention_mask in attention_masks(shape).items():
        reach = [size for size in attention_mask if size]
        if not reach or kind not in kinds:
            continue
        fallback_reason = window_attention_unsupported_reason(
            *(platform, (chunk, shape.num_heads, shape.head_dim), min(reach)),
            jnp.dtype(config.model.compute_dtype),
            kv_heads=shape.kv_heads,
            kernel="xla" if config.model.attention_kernel == "xla" else "auto",
        )
        found[kind] = (
            KernelChoice("XLA", fallback_reason) if fallback_reason else KernelChoice("Pallas")
        )
    return found


def describe_kernels(config: Config, platform: str, *, compile_locally: bool = True) -> str:
    """What both of the above say, in one line; empty where there is no attention."""
    parts = {
        "whole sequences": choose_kernels(config, platform, compile_locally=compile_locally),
        "chunks": choose_chunk_kernels(config, platform),
    }
    told = [f"over {what}: {_told(choices)}" for what, choices in parts.items() if choices]
    return f"attention {'; '.join(told)}" if told else ""


def _told(choices: dict[str, KernelChoice]) -> str:
    return ", ".join(
        f"{kind} by {choice.kernel}"
        + (f" ({choice.fallback_reason})" if choice.fallback_reason else "")
        for kind, choice in choices.items()
    )
