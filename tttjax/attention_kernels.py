"""Which kernel computes attention over whole sequences on a platform, and why.

`ops.library_attention` chooses it when a program is lowered. Here it is told in advance, and an
error is raised where the configuration insists on a library's kernel that cannot be had.
"""

from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from tttjax.config import Config
from tttjax.errors import UserError
from tttjax.models import build_model
from tttjax.models.block import attention_sights
from tttjax.ops.library_attention import KERNELS, why_not, why_not_here


@dataclass(frozen=True)
class Choice:
    """The kernel of one kind of attention. why: it is not the library's; empty if it is."""

    kernel: str
    why: str = ""


def platform_of(mesh: Mesh) -> str:
    """The platform that programs on this mesh are lowered for: "cuda", "tpu", "cpu"."""
    device = mesh.devices.flat[0]
    return "cuda" if device.device_kind.startswith("NVIDIA") else device.platform


def choose_kernels(config: Config, platform: str, *, here: bool = True) -> dict[str, Choice]:
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
    for kind, sight in attention_sights(shape).items():
        if kind not in model.mixer_kinds:
            continue
        why = why_not(platform, q_THK, sight)
        if not why and here:
            why = why_not_here(platform, q_THK, shape.kv_heads)
        if why and model.attention_kernel == "library":
            raise UserError(
                f'model.attention_kernel = "library" cannot be had for {kind} attention: {why}; '
                'choose "auto" to have XLA there.'
            )
        if model.attention_kernel == "xla":
            why = 'model.attention_kernel = "xla"'
        found[kind] = Choice("XLA", why) if why else Choice(KERNELS[platform])
    return found


def describe_kernels(choices: dict[str, Choice]) -> str:
    """One line; empty where there is no attention."""
    told = [
        f"{kind} by {choice.kernel}" + (f" ({choice.why})" if choice.why else "")
        for kind, choice in choices.items()
    ]
    return f"attention over whole sequences: {', '.join(told)}" if told else ""
