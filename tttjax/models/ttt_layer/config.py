"""The configuration of TTT layers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tttjax.config.fields import declare
from tttjax.config.mixer import MixerConfig
from tttjax.errors import UserError

if TYPE_CHECKING:
    from tttjax.config.model import ModelConfig

MLP_WIDTH = 4  # hidden entries of the inner MLP for each entry of a head
LR = {"ttt_linear": 1.0, "ttt_mlp": 0.1}  # of the paper


@dataclass(frozen=True)
class TTTLayerConfig(MixerConfig):
    """TTT-Linear and TTT-MLP (arXiv 2407.04620)."""

    kinds: ClassVar[tuple[str, ...]] = ("ttt_linear", "ttt_mlp")
    layer: ClassVar[str] = "tttjax.models.ttt_layer.layer:TTTLayer"

    heads: int = declare(
        0,
        "Heads, embed_dim / heads entries each; 0: model.num_heads.",
        minimum=0,
        first_name="ttt_heads",
    )
    chunk_size: int = declare(
        16, "Tokens of one inner mini-batch (C).", minimum=1, first_name="ttt_chunk"
    )
    lr: float = declare(
        0.0,
        "Base inner learning rate; 0: the paper's, 1 for ttt_linear, 0.1 for ttt_mlp.",
        minimum=0,
        first_name="ttt_lr",
    )
    rope_theta: float = declare(
        10000.0,
        "Base of the rotary embedding inside each mini-batch.",
        minimum=1,
        first_name="ttt_rope_theta",
    )
    backbone: str = declare(
        "mamba",
        "Projections around the inner model. mamba: one projection and two convolutions for "
        "queries and keys, and an output gate. plain: three projections.",
        choices=("mamba", "plain"),
        first_name="ttt_backbone",
    )
    output: str = declare(
        "query",
        "Output for a token. query: the inner model applied to its query, with the weights after "
        "its own update. key: applied to its key, with the weights before the mini-batch (the "
        "simplified rule of the TTT-E2E paper; there are no queries then).",
        choices=("query", "key"),
        first_name="ttt_output",
    )
    norm_eps: float = declare(
        0.0,
        "Epsilon of the norms inside the layer; 0: model.norm_eps.",
        minimum=0,
        omit_default_in_hash=True,
    )

    def num_heads(self, model: "ModelConfig") -> int:
        """Heads of a layer (H)."""
        return self.heads or model.num_heads

    def base_lr(self, kind: str) -> float:
        """The inner learning rate before division by the head dimension."""
        return self.lr or LR[kind]

    def inner_entries(self, kind: str, model: "ModelConfig") -> int:
        """Entries of the inner model's first matrix, over all heads."""
        width = MLP_WIDTH if kind == "ttt_mlp" else 1
        return width * model.embed_dim * (model.embed_dim // self.num_heads(model))

    def check(self, model: "ModelConfig") -> None:
        """See `MixerConfig.check`."""
        heads = self.num_heads(model)
        if model.embed_dim % heads or model.embed_dim // heads % 2:
            raise UserError(
                f"A TTT layer of {heads} heads (model.ttt_layer.heads, or model.num_heads) divides "
                f"model.embed_dim = {model.embed_dim} into {model.embed_dim / heads:g} entries "
                "each; rotary positions need an even whole number."
            )

    def sharded_by_tensor(self, model: "ModelConfig") -> list[tuple[int, str]]:
        """The heads."""
        return [(self.num_heads(model), "model.ttt_layer.heads (or num_heads)")]

    def parameter_count(self, kind: str, model: "ModelConfig") -> int:
        """Scalars of one layer, with the inner model before the first token."""
        D, heads = model.embed_dim, self.num_heads(model)
        reads_queries = self.output == "query"
        if self.backbone == "mamba":  # one projection and its convolutions; values, gate, output
            outer = 4 * D * D + (1 + reads_queries) * (model.conv_size + 1) * D
        else:
            outer = (3 + reads_queries) * D * D
        rates = D * heads + heads + self.chunk_size
        inner = self.inner_entries(kind, model) + D
        if kind == "ttt_mlp":
            inner = 2 * self.inner_entries(kind, model) + (MLP_WIDTH + 1) * D
        return outer + rates + inner + 4 * D  # the inner norm and the one of the output

    def recurrence_flops(self, kind: str, model: "ModelConfig") -> float:
        """The inner model on the key and its gradients, and on the query if there is one.

        2 E for each, E the entries of its matrices, and 2 x entries of w2 back through w2.
        """
        first = self.inner_entries(kind, model)
        entries, back = (2 * first, 2.0 * first) if kind == "ttt_mlp" else (first, 0.0)
        return 2.0 * entries * (2 + (self.output == "query")) + back
