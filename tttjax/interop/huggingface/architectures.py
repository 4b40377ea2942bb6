"""Which architecture of transformers one of our models is exactly, and its `config.json`.

Where there is none, and for whatever learns while it reads, the export carries code of its own
(`exported_code`), the family "tttjax".
"""

from collections.abc import Mapping
from typing import Any

from tttjax.config import InnerConfig, ModelConfig
from tttjax.errors import UserError
from tttjax.interop.huggingface import configs
from tttjax.interop.huggingface.configs import OWN
from tttjax.interop.huggingface.names import tensor_places
from tttjax.models import Transformer

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    OWN: "TTTJaxForCausalLM",
}
LAYER_TYPES = {ours: theirs for theirs, ours in configs.LAYER_TYPES.items()}
RULES = ("sgd", "normalized_sgd")
EXPORTED = (
    "Exported are models whose blocks each have one attention, full or window, and SwiGLU MLPs, "
    "with fast weights that learn by sgd or normalized_sgd, or without any"
)


def choose_family(
    model: ModelConfig, inner: InnerConfig, *, learns: bool, own_code: bool = False
) -> str:
    """The family to export a model as.

    learns: whether it has fast weights. own_code: not one of transformers' own architectures.
    Raises UserError for a model that none can express.
    """
    _check_exportable(model, inner, learns)
    if own_code or learns or model.fast_mlp or not model.pre_norm:
        return OWN
    if model.qk_norm and not model.post_norm:
        return "qwen3"
    divides = model.embed_dim % model.num_heads == 0  # the other classes refuse other sizes
    if model.post_norm:
        return "gemma3_text" if model.qk_norm and divides else OWN
    if model.mixer_kinds == {"full"}:
        return "llama" if divides else "mistral"
    return "mistral" if model.mixer_kinds == {"window"} else "ministral"


def _check_exportable(model: ModelConfig, inner: InnerConfig, learns: bool) -> None:
    others = sorted(model.mixer_kinds - LAYER_TYPES.keys())
    joined = [mixer for mixer in model.mixers if "+" in mixer]
    if others or joined:
        problem = f"model.mixers has {joined[0] if joined else others[0]!r}"
    elif model.pre_conv:
        problem = "model.pre_conv = True puts convolutions into its blocks"
    elif not model.mlp_dim:
        problem = "model.mlp_dim = 0 leaves its blocks without MLPs"
    elif model.fast_mlp and model.fast_mlp_heads:
        problem = f"model.fast_mlp_heads = {model.fast_mlp_heads} makes its fast MLPs no SwiGLU"
    elif learns and inner.rule not in RULES:
        problem = f"its fast weights learn by inner.rule = {inner.rule!r}"
    else:
        return
    raise UserError(f"this model cannot be exported: {problem}. {EXPORTED}.")


def config_json(
    model: ModelConfig, family: str, *, dtype: str, max_length: int, tokens: Mapping[str, Any]
) -> dict[str, Any]:
    """The `config.json` of a model without fast weights, for transformers 4 and 5.

    max_length: tokens that the model was trained with. tokens: bos_token_id and the like.
    """
    kinds = [model.mixers[i % len(model.mixers)] for i in range(model.num_layers)]
    theta, scaling = {"rope_theta": model.rope_theta}, rope_scaling(model.rope_scaling)
    rope: dict[str, Any] = {**(scaling or {"rope_type": "default"}), **theta}
    values = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "vocab_size": model.vocab_size,
        "hidden_size": model.embed_dim,
        "intermediate_size": model.mlp_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "max_position_embeddings": max_length,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        # The second and third are the older form of the first.
        "rope_parameters": rope,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
        **tokens,
    }
    if "window" in kinds:
        values |= {"sliding_window": model.window_size, "use_sliding_window": True}
    elif family in ("mistral", "ministral", OWN):
        values["sliding_window"] = None
    if family in ("qwen3", "ministral", "gemma3_text", OWN):
        values["layer_types"] = [LAYER_TYPES[kind] for kind in kinds]
    if family == "llama":
        values["mlp_bias"] = False
    if family == "gemma3_text":
        del values["rope_scaling"]
        values |= {
            "hidden_activation": values.pop("hidden_act"),
            "query_pre_attn_scalar": model.head_size,
            # The embeddings are divided by what this architecture multiplies them with.
            "tie_word_embeddings": False,
            "rope_local_base_freq": model.rope_theta,
            "rope_parameters": {name: dict(rope) for name in LAYER_TYPES.values()},
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
        }
    if family == OWN:
        own = ("qk_norm", "pre_norm", "post_norm")
        values |= {name: getattr(model, name) for name in own}
        values["fast_mlp_layers"] = model.suffix_layers if model.fast_mlp else 0
        files = {"AutoConfig": "configuration_tttjax.TTTJaxConfig"}
        values["auto_map"] = {**files, "AutoModelForCausalLM": f"modeling_tttjax.{CLASSES[OWN]}"}
    return values


def learning_json(
    model: Transformer, inner: InnerConfig, lr: float, *, learn: bool
) -> dict[str, Any]:
    """What `config.json` says of how a model learns.

    learn: whether it does unless `generate` is told not to.
    """
    fast = model.fast_paths
    return {
        "fast_parameters": [p.name for p in tensor_places(model, OWN) if p.path in fast],
        "chunk_size": inner.chunk_size,
        "inner_lr": lr,
        "inner_clip": inner.clip,
        "inner_normalize": inner.rule == "normalized_sgd",
        "learn": learn,
        # Not needed there, but to import the model again.
        "suffix_layers": model.suffix_layers,
        "fast_paths": list(model.fast_patterns),
    }


def rope_scaling(scaling: tuple[float, ...]) -> dict[str, Any] | None:
    """Our `rope_scaling` in transformers' words."""
    if not scaling:
        return None
    if len(scaling) == 1:
        return {"rope_type": "linear", "factor": scaling[0]}
    names = ("factor", "low_freq_factor", "high_freq_factor")
    values = dict(zip(names, scaling, strict=False))
    return {"rope_type": "llama3", **values, "original_max_position_embeddings": int(scaling[3])}
