"""The transformers architecture that matches a model exactly, and its `config.json`.

Models without a match, and all with test-time training, are exported with their own modeling code
(`exported_code`), the family "tttjax".
"""

from collections.abc import Mapping
from typing import Any

from tttjax.config import InnerConfig, ModelConfig
from tttjax.errors import UserError
from tttjax.interop.huggingface import configs
from tttjax.interop.huggingface.configs import OWN
from tttjax.interop.huggingface.names import tensor_slots
from tttjax.models.transformer import Transformer

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    OWN: "TTTJaxForCausalLM",
}
LAYER_TYPES = {mixer: layer_type for layer_type, mixer in configs.LAYER_TYPES.items()}
RULES = ("sgd", "normalized_sgd")
EXPORTED = (
    "Only models whose blocks have full or window attention and SwiGLU MLPs can be exported, "
    "without fast weights or with the inner rules sgd and normalized_sgd"
)


def choose_family(
    model: ModelConfig, inner: InnerConfig, *, learns: bool, own_code: bool = False
) -> str:
    """The family to export a model as.

    learns: whether the export has fast weights. own_code: use our modeling code in any case.
    Raises UserError for a model that no family can express.
    """
    _check_exportable(model, inner, learns)
    if own_code or learns or model.fast_mlp or not model.pre_norm:
        return OWN
    if model.qk_norm and not model.post_norm:
        return "qwen3"
    is_divisible = model.embed_dim % model.num_heads == 0  # Llama and Gemma 3 require it
    if model.post_norm:
        return "gemma3_text" if model.qk_norm and is_divisible else OWN
    if model.mixer_kinds == {"full"}:
        return "llama" if is_divisible else "mistral"
    return "mistral" if model.mixer_kinds == {"window"} else "ministral"


def _check_exportable(model: ModelConfig, inner: InnerConfig, learns: bool) -> None:
    unsupported = sorted(model.mixer_kinds - LAYER_TYPES.keys())
    joined = [mixer for mixer in model.mixers if "+" in mixer]
    if unsupported or joined:
        problem = f"model.mixers has {joined[0] if joined else unsupported[0]!r}"
    elif model.pre_conv:
        problem = "model.pre_conv = True adds convolutions to its blocks"
    elif not model.mlp_dim:
        problem = "model.mlp_dim = 0 removes the MLPs"
    elif model.fast_mlp and model.fast_mlp_heads:
        problem = f"model.fast_mlp_heads = {model.fast_mlp_heads} makes its fast MLPs multi-head"
    elif learns and inner.rule not in RULES:
        problem = f"its update rule is inner.rule = {inner.rule!r}"
    elif learns and inner.loss != "next_token":
        problem = f"its inner loss is inner.loss = {inner.loss!r}"
    elif inner.learn_lr != "none":
        problem = f"inner.learn_lr = {inner.learn_lr!r} makes its inner learning rates weights"
    else:
        return
    raise UserError(f"this model cannot be exported: {problem}. {EXPORTED}.")


def config_json(
    model: ModelConfig, family: str, *, dtype: str, max_length: int, tokens: Mapping[str, Any]
) -> dict[str, Any]:
    """The `config.json` of a model without fast weights, for transformers 4 and 5.

    max_length: context length in training. tokens: bos_token_id and so on.
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
        # rope_theta and rope_scaling are the older form of rope_parameters.
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
            # Gemma multiplies embeddings by sqrt(D); the export divides them, and not the head.
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
    """The fields of `config.json` that describe the inner loop.

    learn: the default of `generate(learn=...)`.
    """
    fast = model.fast_paths
    return {
        "fast_parameters": [p.name for p in tensor_slots(model, OWN) if p.path in fast],
        "chunk_size": inner.chunk_size,
        "inner_lr": lr,
        "inner_clip": inner.clip,
        "inner_normalize": inner.rule == "normalized_sgd",
        "learn": learn,
        # Only needed to import the model again.
        "suffix_layers": model.config.suffix_layers,
        "fast_paths": list(model.fast_patterns),
    }


def rope_scaling(scaling: tuple[float, ...]) -> dict[str, Any] | None:
    """`model.rope_scaling` as transformers' `rope_scaling`."""
    if not scaling:
        return None
    if len(scaling) == 1:
        return {"rope_type": "linear", "factor": scaling[0]}
    names = ("factor", "low_freq_factor", "high_freq_factor")
    values = dict(zip(names, scaling, strict=False))
    return {"rope_type": "llama3", **values, "original_max_position_embeddings": int(scaling[3])}
