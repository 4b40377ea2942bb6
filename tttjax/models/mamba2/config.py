"""The configuration of Mamba-2 layers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tttjax.config.fields import declare
from tttjax.config.mixer import MixerConfig
from tttjax.errors import UserError

if TYPE_CHECKING:
    from tttjax.config.model import ModelConfig


@dataclass(frozen=True)
class Mamba2Config(MixerConfig):
    """Mamba-2 (arXiv 2405.21060)."""

    kinds: ClassVar[tuple[str, ...]] = ("mamba2",)
    layer: ClassVar[str] = "tttjax.models.mamba2.layer:Mamba2"

    expand: int = declare(
        2, "Total width of the heads / embed_dim.", minimum=1, first_name="mamba_expand"
    )
    head_dim: int = declare(64, "Entries of one head (P).", minimum=1, first_name="mamba_head_dim")
    state_size: int = declare(
        128, "State entries per head entry (N).", minimum=1, first_name="mamba_state"
    )
    groups: int = declare(
        1,
        "Groups of heads that share B, C and the norm (G).",
        minimum=1,
        first_name="mamba_groups",
    )
    dt_limits: tuple[float, ...] = declare(
        (),
        "Smallest and largest time step; empty: no limits.",
        minimum=0,
        first_name="mamba_dt_limits",
    )

    def heads(self, model: "ModelConfig") -> int:
        """Heads of a layer (H)."""
        return self.expand * model.embed_dim // self.head_dim

    def check(self, model: "ModelConfig") -> None:
        """See `MixerConfig.check`."""
        width = self.expand * model.embed_dim
        if width % self.head_dim:
            raise UserError(
                f"model.mamba2.expand x model.embed_dim = {self.expand} x {model.embed_dim} = "
                f"{width} is not a multiple of model.mamba2.head_dim = {self.head_dim}."
            )
        if self.heads(model) % self.groups:
            raise UserError(
                f"mamba2 has {self.heads(model)} heads (expand x embed_dim / head_dim), not a "
                f"multiple of model.mamba2.groups = {self.groups}."
            )
        limits = self.dt_limits
        if limits and (len(limits) != 2 or limits[0] > limits[1]):
            raise UserError(
                f"model.mamba2.dt_limits = {limits} must be the smallest and the largest time "
                "step, such as (0.001, 0.1), or empty."
            )

    def sharded_by_tensor(self, model: "ModelConfig") -> list[tuple[int, str]]:
        """The heads."""
        return [(self.heads(model), "The number of mamba2's heads")]

    def parameter_count(self, kind: str, model: "ModelConfig") -> int:
        """Scalars of one layer."""
        D, H = model.embed_dim, self.heads(model)
        inner = H * self.head_dim
        groups = self.groups * self.state_size  # of B, and of C
        projections = D * (2 * inner + 2 * groups + H) + inner * D
        convolutions = (model.conv_size + 1) * (inner + 2 * groups)
        return projections + convolutions + 3 * H + inner  # dt's bias, A and the skip; the norm

    def recurrence_flops(self, kind: str, model: "ModelConfig") -> float:
        """x B^T into the state, the state times C: 4 H P N."""
        return 4.0 * self.heads(model) * self.head_dim * self.state_size
