"""The configuration of Gated DeltaNet layers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from tttjax.config.fields import declare
from tttjax.config.mixer import MixerConfig
from tttjax.errors import UserError

if TYPE_CHECKING:
    from tttjax.config.model import ModelConfig


class HeadSizes(NamedTuple):
    """Heads and their entries, with the defaults filled in."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class GatedDeltaNetConfig(MixerConfig):
    """Gated DeltaNet (arXiv 2412.06464)."""

    kinds: ClassVar[tuple[str, ...]] = ("gated_deltanet",)
    layer: ClassVar[str] = "tttjax.models.gated_deltanet.layer:GatedDeltaNet"

    key_heads: int = declare(
        0, "Key heads; 0: model.num_heads.", minimum=0, first_name="delta_heads"
    )
    value_heads: int = declare(
        0,
        "Value heads, a multiple of key_heads; 0: key_heads.",
        minimum=0,
        first_name="delta_value_heads",
    )
    key_dim: int = declare(
        0,
        "Entries of a key; 0: those of an attention head.",
        minimum=0,
        first_name="delta_key_dim",
    )
    value_dim: int = declare(
        0, "Entries of a value; 0: twice those of a key.", minimum=0, first_name="delta_value_dim"
    )
    negative_eigenvalues: bool = declare(
        False,
        "Whether beta is in (0, 2) instead of (0, 1), so that the state's transition may have "
        "negative eigenvalues (arXiv 2411.12537).",
        first_name="delta_negative",
    )

    def sizes(self, model: "ModelConfig") -> HeadSizes:
        """The sizes of a layer."""
        key_heads = self.key_heads or model.num_heads
        key_dim = self.key_dim or model.head_size
        value_heads, value_dim = self.value_heads or key_heads, self.value_dim or 2 * key_dim
        return HeadSizes(key_heads, value_heads, key_dim, value_dim)

    def check(self, model: "ModelConfig") -> None:
        """See `MixerConfig.check`."""
        key_heads, value_heads, key_dim, _ = self.sizes(model)
        if value_heads % key_heads:
            raise UserError(
                f"model.gated_deltanet.value_heads = {value_heads} is not a multiple of the "
                f"{key_heads} key heads (model.gated_deltanet.key_heads, or model.num_heads); each "
                "key head serves as many value heads."
            )
        if key_dim == 0:
            raise UserError(
                f"model.embed_dim / model.num_heads = {model.embed_dim} / {model.num_heads} leaves "
                "a key of gated_deltanet no entry; set model.gated_deltanet.key_dim."
            )

    def sharded_by_tensor(self, model: "ModelConfig") -> list[tuple[int, str]]:
        """Both kinds of heads."""
        sizes = self.sizes(model)
        return [
            (sizes.key_heads, "model.gated_deltanet.key_heads (or num_heads)"),
            (sizes.value_heads, "model.gated_deltanet.value_heads (or key_heads)"),
        ]

    def parameter_count(self, kind: str, model: "ModelConfig") -> int:
        """Scalars of one layer."""
        D, (key_heads, value_heads, key_dim, value_dim) = model.embed_dim, self.sizes(model)
        keys, values = key_heads * key_dim, value_heads * value_dim
        projections = D * (2 * keys + 2 * values + 2 * value_heads) + values * D
        convolutions = model.conv_size * (2 * keys + values)
        return projections + convolutions + 2 * value_heads + value_dim  # A, dt's bias; the norm

    def recurrence_flops(self, kind: str, model: "ModelConfig") -> float:
        """The state times k, the write, the state times q: 6 H K V."""
        _, value_heads, key_dim, value_dim = self.sizes(model)
        return 6.0 * value_heads * key_dim * value_dim
