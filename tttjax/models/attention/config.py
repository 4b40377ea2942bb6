"""What attention's fields, which are those of the model itself, must satisfy."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tttjax.config.mixer import MixerConfig
from tttjax.errors import UserError

if TYPE_CHECKING:
    from tttjax.config.model import ModelConfig


@dataclass(frozen=True)
class AttentionConfig(MixerConfig):
    """Causal attention: full, or over a sliding window.

    `local:16` is attention inside blocks of 16 tokens. It reproduces the official code's full
    attention in meta mode, for verification; `model.mixers` of a run cannot choose it.
    """

    kinds: ClassVar[tuple[str, ...]] = ("full", "window", "local")
    layer: ClassVar[str] = "tttjax.models.attention.layer:Attention"

    def check(self, model: "ModelConfig") -> None:
        """See `MixerConfig.check`."""
        if model.head_dim == 0 and model.embed_dim % model.num_heads:
            raise UserError(
                f"model.embed_dim = {model.embed_dim} is not a multiple of model.num_heads = "
                f"{model.num_heads}; change one, or set model.head_dim."
            )
        if model.head_size % 2:
            raise UserError(
                f"A head has {model.head_size} entries (model.head_dim, or embed_dim / num_heads = "
                f"{model.embed_dim} / {model.num_heads}); rotary positions need an even number."
            )
        if model.num_heads % model.kv_heads:
            raise UserError(
                f"model.num_kv_heads = {model.num_kv_heads} does not divide model.num_heads = "
                f"{model.num_heads}; every head of keys and values serves as many query heads."
            )
        _check_rope_scaling(model.rope_scaling)

    def sharded_by_tensor(self, model: "ModelConfig") -> list[tuple[int, str]]:
        """Heads of queries, and of keys and values."""
        return [(model.num_heads, "model.num_heads"), (model.kv_heads, "model.num_kv_heads")]

    def parameter_count(self, kind: str, model: "ModelConfig") -> int:
        """Scalars of one layer."""
        K = model.head_size
        heads = 2 * model.num_heads + 2 * model.kv_heads  # of queries, output, keys and values
        return model.embed_dim * heads * K + 2 * K * model.qk_norm

    def recurrence_flops(self, kind: str, model: "ModelConfig") -> float:
        """None; its scores are counted by length (`planning.flops`)."""
        return 0.0


def _check_rope_scaling(scaling: tuple[float, ...]) -> None:
    if len(scaling) not in (0, 1, 4):
        raise UserError(
            f"model.rope_scaling = {scaling} has {len(scaling)} numbers; give none, one (a factor) "
            "or four: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings, "
            "such as (8, 1, 4, 8192)."
        )
    if scaling and scaling[0] < 1:
        raise UserError(
            f"model.rope_scaling = {scaling}: its factor, {scaling[0]:g}, must be at least 1."
        )
    if len(scaling) == 4 and scaling[1] >= scaling[2]:
        raise UserError(
            f"model.rope_scaling = {scaling}: low_freq_factor, {scaling[1]:g}, must be less than "
            f"high_freq_factor, {scaling[2]:g}."
        )
