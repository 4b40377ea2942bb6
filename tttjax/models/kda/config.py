"""The configuration of Kimi Delta Attention."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tttjax.config.fields import declare
from tttjax.config.mixer import MixerConfig
from tttjax.errors import UserError

if TYPE_CHECKING:
    from tttjax.config.model import ModelConfig


@dataclass(frozen=True)
class KDAConfig(MixerConfig):
    """Kimi Delta Attention (arXiv 2510.26692)."""

    kinds: ClassVar[tuple[str, ...]] = ("kda",)
    layer: ClassVar[str] = "tttjax.models.kda.layer:KimiDeltaAttention"

    heads: int = declare(0, "Heads (H); 0: model.num_heads.", minimum=0, omit_default_in_hash=True)
    key_dim: int = declare(
        0,
        "Entries of a key (K); 0: those of an attention head.",
        minimum=0,
        omit_default_in_hash=True,
    )
    value_dim: int = declare(
        0,
        "Entries of a value (V), and the rank of the projections to decay and gate; 0: key_dim.",
        minimum=0,
        omit_default_in_hash=True,
    )

    def sizes(self, model: "ModelConfig") -> tuple[int, int, int]:
        """H, K, V."""
        key_dim = self.key_dim or model.head_size
        return self.heads or model.num_heads, key_dim, self.value_dim or key_dim

    def check(self, model: "ModelConfig") -> None:
        """See `MixerConfig.check`."""
        if 0 in self.sizes(model):
            raise UserError(
                f"model.embed_dim / model.num_heads = {model.embed_dim} / {model.num_heads} leaves "
                "a key of kda no entry; set model.kda.key_dim."
            )

    def sharded_by_tensor(self, model: "ModelConfig") -> list[tuple[int, str]]:
        """The heads."""
        return [(self.sizes(model)[0], "model.kda.heads (or num_heads)")]

    def parameter_count(self, kind: str, model: "ModelConfig") -> int:
        """Scalars of one layer."""
        D, (H, K, V) = model.embed_dim, self.sizes(model)
        projections = D * (2 * H * K + H * V + H) + H * V * D  # of q, k, v, beta; the output
        low_rank = 2 * D * V + V * (H * K + H * V)  # of decay and gate
        convolutions = model.conv_size * (2 * H * K + H * V)
        return projections + low_rank + convolutions + H + H * K + H * V + V

    def recurrence_flops(self, kind: str, model: "ModelConfig") -> float:
        """The state times k, the write, the state times q: 6 H K V."""
        heads, key_dim, value_dim = self.sizes(model)
        return 6.0 * heads * key_dim * value_dim
