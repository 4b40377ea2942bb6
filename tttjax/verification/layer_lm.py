"""Language models of the `layers` family: our Transformer with the reference's parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from tttjax.config import InnerConfig, ModelConfig
from tttjax.models.transformer import Transformer, build_model
from tttjax.types import Array, Params, PyTree
from tttjax.verification import layer_weights as lw
from tttjax.verification.layer_format import CaseArrays, CaseFields


@dataclass(frozen=True)
class ParamNames:
    """Parameter names of a reference. zero_centred: norm weights are stored minus 1.

    transposed: matrices are stored (out, in). mlp: gate, up and down projection.
    """

    embedding: str
    block: str
    mixer: str
    mixer_norm: str
    final_norm: str
    head: str
    mlp_norm: str = ""
    mlp: tuple[str, str, str] = ("", "", "")
    transposed: bool = True
    zero_centred: bool = False


TTT_NAMES = ParamNames(
    embedding="model.wte.embedding",
    block="model.h.{}.",
    mixer="seq_modeling_block.",
    mixer_norm="seq_norm.kernel",
    final_norm="model.ln_f.kernel",
    head="lm_head.kernel",
    mlp_norm="ffn_norm.kernel",
    mlp=("feed_forward.w1.kernel", "feed_forward.w3.kernel", "feed_forward.w2.kernel"),
    transposed=False,
)
MAMBA2_NAMES = ParamNames(
    embedding="backbone.embeddings.weight",
    block="backbone.layers.{}.",
    mixer="mixer.",
    mixer_norm="norm.weight",
    final_norm="backbone.norm_f.weight",
    head="lm_head.weight",
)
DELTA_NAMES = {
    zero_centred: ParamNames(
        embedding="model.embed_tokens.weight",
        block="model.layers.{}.",
        mixer="linear_attn.",
        mixer_norm="input_layernorm.weight",
        final_norm="model.norm.weight",
        head="lm_head.weight",
        mlp_norm="post_attention_layernorm.weight",
        mlp=("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"),
        zero_centred=zero_centred,
    )
    for zero_centred in (False, True)
}


@dataclass(frozen=True)
class ReferenceLM:
    """A reference language model: our config of it, and the conversion of its parameters."""

    config: ModelConfig
    names: ParamNames
    mixer: Callable[[CaseArrays], lw.Weights]

    @property
    def transformer(self) -> Transformer:
        return build_model(self.config, InnerConfig())

    def params(self, take: CaseArrays) -> Params:
        """The reference's parameters as those of `transformer`."""
        c, names = self.config, self.names
        blocks = [self._block(take.scoped(names.block.format(i))) for i in range(c.num_layers)]
        slow: dict[str, Any] = {
            "embedding": take(names.embedding, c.vocab_size, c.embed_dim),
            "final_norm": self._norm(take, names.final_norm),
            "prefix": {"stage0": {"block0": _stack(blocks)}},
        }
        if not c.tie_embeddings:
            slow["head"] = self._matrix(take, names.head, c.embed_dim, c.vocab_size)
        return Params(slow=slow, fast={})

    def _block(self, take: CaseArrays) -> PyTree:
        c, names = self.config, self.names
        weights: dict[str, Any] = {
            "mixer_norm": self._norm(take, names.mixer_norm),
            "mixer": self.mixer(take.scoped(names.mixer)),
        }
        if c.pre_conv:
            kernel = take("conv.conv1.kernel", c.conv_size, 1, c.embed_dim)
            weights["pre_conv"] = {
                "norm": self._norm(take, "conv.conv_norm.kernel"),
                "kernel": kernel[:, 0],
                "bias": take("conv.conv1.bias", c.embed_dim),
            }
        if c.mlp_dim:
            gate, up, down = names.mlp
            weights["mlp_norm"] = self._norm(take, names.mlp_norm)
            weights["mlp"] = {
                "w1": self._matrix(take, gate, c.embed_dim, c.mlp_dim),
                "w3": self._matrix(take, up, c.embed_dim, c.mlp_dim),
                "w2": self._matrix(take, down, c.mlp_dim, c.embed_dim),
            }
        return weights

    def _norm(self, take: CaseArrays, name: str) -> PyTree:
        weight = take(name, self.config.embed_dim)
        return {"weight": weight + 1 if self.names.zero_centred else weight}

    def _matrix(self, take: CaseArrays, name: str, rows: int, columns: int) -> Array:
        if self.names.transposed:
            return take(name, columns, rows).T
        return take(name, rows, columns)


def _stack(trees: Sequence[PyTree]) -> PyTree:
    first = trees[0]
    if isinstance(first, dict):
        return {name: _stack([tree[name] for tree in trees]) for name in first}
    return jnp.stack(trees)


def _config(fields: CaseFields, mixer: str, dtype: str, **settings: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=fields.positive_int("vocab_size"),
        num_layers=fields.positive_int("num_layers"),
        tie_embeddings=fields.flag("tie", False),
        mixers=(mixer,),
        pre_norm=True,
        post_norm=False,
        qk_norm=False,
        param_dtype=dtype,
        compute_dtype=dtype,
        remat="none",
        **settings,
    )


def mamba2_model(fields: CaseFields, dtype: str) -> ReferenceLM:
    s = lw.Mamba2Sizes.from_fields(fields)
    settings = lw.mamba2_settings(s, fields)
    eps = settings["mixer_norm_eps"]
    config = _config(fields, "mamba2", dtype, mlp_dim=0, norm_eps=eps, **settings)
    return ReferenceLM(config, MAMBA2_NAMES, lambda take: lw.mamba2(s, take))


def delta_model(fields: CaseFields, dtype: str, fused: bool) -> ReferenceLM:
    """fused: Qwen3-Next's parameter layout, else that of flash-linear-attention."""
    s = lw.DeltaSizes.from_fields(fields)
    settings = lw.delta_settings(s, fields, fused)
    config = _config(
        fields,
        "gated_deltanet",
        dtype,
        mlp_dim=fields.positive_int("intermediate_size"),
        norm_eps=settings["mixer_norm_eps"] if fused else fields.number("lm_eps", 1e-6),
        **settings,
    )
    convert = lw.delta_fused if fused else lw.delta_separate
    return ReferenceLM(config, DELTA_NAMES[fused], lambda take: convert(s, take))


def ttt_model(fields: CaseFields, dtype: str, inner: str, plain: bool) -> ReferenceLM:
    s = lw.TTTSizes.from_fields(fields, inner, plain)
    config = _config(
        fields,
        f"ttt_{inner}",
        dtype,
        mlp_dim=fields.positive_int("intermediate_size"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        pre_conv=fields.flag("pre_conv", False),
        **lw.ttt_settings(s, fields, plain),
    )
    return ReferenceLM(config, TTT_NAMES, lambda take: lw.ttt(s, take))
