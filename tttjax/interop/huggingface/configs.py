"""Conversion of a Hugging Face `config.json` to fields of `ModelConfig` and `InnerConfig`.

Features that tttjax cannot compute exactly are refused, never ignored.
"""

from collections.abc import Mapping
from typing import Any

from tttjax.config.limits import INT_MAX
from tttjax.config.values import nearest
from tttjax.errors import UserError
from tttjax.interop.huggingface.names import families

OWN = "tttjax"
LAYER_TYPES = {"full_attention": "full", "sliding_attention": "window"}
# Keys that must be absent or have one of these values, and what any other value would mean.
ALLOWED: dict[str, tuple[tuple[Any, ...], str]] = {
    "attention_bias": ((None, False), "projections with a bias"),
    "qkv_bias": ((None, False), "projections with a bias"),
    "mlp_bias": ((None, False), "MLPs with a bias"),
    "hidden_act": ((None, "silu", "swish"), "another activation than silu"),
    "hidden_activation": ((None, "silu", "swish"), "another activation than silu"),
    "partial_rotary_factor": ((None, 1, 1.0), "RoPE on a part of each head"),
    "final_logit_softcapping": ((None,), "capped logits"),
    "attn_logit_softcapping": ((None,), "capped attention scores"),
    "use_bidirectional_attention": ((None, False), "attention that is not causal"),
    "quantization_config": ((None,), "quantized weights"),
}
# Keys whose defaults differ from Llama's, so that they must be present.
DEFAULTS_DIFFER = {
    "qwen3": ("head_dim", "num_key_value_heads"),
    "mistral": ("num_key_value_heads", "sliding_window"),
    "ministral": ("num_key_value_heads", "sliding_window"),
    "gemma3_text": ("head_dim", "num_key_value_heads", "tie_word_embeddings"),
}
LARGEST = {"num_hidden_layers": 10_000}  # we allocate lists of this length


def supported() -> str:
    """The supported models, as a phrase."""
    return (
        f"the families {', '.join(families())} with silu MLPs, no biases, RoPE (plain, linear or "
        "llama3), and full or sliding-window attention"
    )


def config_from_huggingface(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig` from the contents of a `config.json`.

    Raises UserError, which lists what is supported, for other families and unsupported features.
    """
    family = values.get("model_type")
    if family not in families():
        hint = nearest(str(family), families())
        raise UserError(f"the model family {family!r} is not supported.{hint} {_supported_hint()}")
    for key, (allowed, meaning) in ALLOWED.items():
        if values.get(key) not in allowed:
            raise UserError(
                f"{key} = {values[key]!r} means {meaning}, which is not supported. "
                f"{_supported_hint()}"
            )
    heads, layers = _number(values, "num_attention_heads"), _number(values, "num_hidden_layers")
    width = _number(values, "hidden_size")
    for key in DEFAULTS_DIFFER.get(family, ()):
        if key not in values:
            raise UserError(f"config.json has no {key}, which a {family} model needs")
    head_dim = values.get("head_dim") or width // heads
    kinds, window = _attention(family, values, layers)
    theta, scaling = _rope(values, set(kinds))
    if values.get("query_pre_attn_scalar", head_dim) != head_dim:
        raise UserError(
            f"query_pre_attn_scalar = {values['query_pre_attn_scalar']} is not head_dim = "
            f"{head_dim}, which is not supported. {_supported_hint()}"
        )
    fields: dict[str, Any] = {
        "vocab_size": _number(values, "vocab_size"),
        "embed_dim": width,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": values.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "mlp_dim": _number(values, "intermediate_size"),
        "mixers": shortest_pattern(kinds),
        "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": float(values.get("rms_norm_eps", 1e-6)),
        "qk_norm": family in ("qwen3", "gemma3_text"),
        "pre_norm": True,
        "post_norm": family == "gemma3_text",
    }
    if window:
        fields["window_size"] = window
    if family == OWN:
        own = ("qk_norm", "pre_norm", "post_norm")
        fields |= {key: values[key] for key in own if key in values}
        fast_layers = values.get("fast_mlp_layers", 0)
        fields["suffix_layers"] = values.get("suffix_layers", fast_layers)
        fields["fast_mlp"] = fast_layers > 0
    return fields


def inner_from_huggingface(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `InnerConfig` from a `config.json`; none unless the family is "tttjax"."""
    if values.get("model_type") != OWN or not values.get("fast_parameters"):
        return {}
    return {
        "chunk_size": _number(values, "chunk_size"),
        "lr": float(values.get("inner_lr", 1.0)),
        "clip": float(values.get("inner_clip", 1.0)),
        "rule": "normalized_sgd" if values.get("inner_normalize") else "sgd",
        "fast_paths": tuple(values.get("fast_paths", ())),
    }


def shortest_pattern(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The shortest pattern whose repetition gives `kinds`."""
    return next(
        kinds[:size]
        for size in range(1, len(kinds) + 1)
        if all(kind == kinds[i % size] for i, kind in enumerate(kinds))
    )


def _supported_hint() -> str:
    return f"Supported are {supported()}."


def _number(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if type(value) is not int or not 1 <= value <= LARGEST.get(key, INT_MAX):
        raise UserError(
            f"config.json has {key} = {value!r}; it must be a whole number from 1 to "
            f"{LARGEST.get(key, INT_MAX)}"
        )
    return value


def _attention(family: str, values: Mapping[str, Any], layers: int) -> tuple[tuple[str, ...], int]:
    """(mixer of every layer, window size; 0: no window layers)."""
    window = values.get("sliding_window") or 0
    if family == "qwen3" and not values.get("use_sliding_window", False):
        window = 0
    types = values.get("layer_types")
    if family == "llama":
        types, window = None, 0
    if types is None:
        first = 0
        if family == "qwen3":  # the first layers use full attention
            first = values.get("max_window_layers", layers if not window else 28)
        elif family == "gemma3_text" and window:
            raise UserError(
                "config.json must have layer_types, which say which layers have a sliding window"
            )
        types = [
            "sliding_attention" if window and i >= first else "full_attention"
            for i in range(layers)
        ]
    unknown = sorted(set(types) - LAYER_TYPES.keys())
    if unknown or len(types) != layers:
        problem = (
            f"has the unknown {unknown[0]!r}" if unknown else f"does not have {layers} entries"
        )
        raise UserError(f"layer_types {problem}. {_supported_hint()}")
    kinds = tuple(LAYER_TYPES[kind] for kind in types)
    if "window" not in kinds:
        return kinds, 0
    if not window:
        raise UserError("layer_types has sliding_attention, but sliding_window is not set")
    return kinds, window


def _rope(values: Mapping[str, Any], kinds: set[str]) -> tuple[float, tuple[float, ...]]:
    """(theta, `model.rope_scaling`), from `rope_parameters` or the older `rope_scaling`."""
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    theta = values.get("rope_theta", 10000.0)
    if "rope_local_base_freq" in values and "window" in kinds:
        _check_equal("rope_theta, rope_local_base_freq", [theta, values["rope_local_base_freq"]])
    nested = [rope[name] for name, kind in LAYER_TYPES.items() if name in rope and kind in kinds]
    if nested:
        _check_equal("rope_parameters of full and window attention", nested)
        rope = dict(nested[0])
    theta = rope.pop("rope_theta", theta)
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    if rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(
            f"partial_rotary_factor = {rope['partial_rotary_factor']}. {_supported_hint()}"
        )
    scalings = {
        "default": (),
        "linear": ("factor",),
        "llama3": (
            *("factor", "low_freq_factor", "high_freq_factor"),
            "original_max_position_embeddings",
        ),
    }
    if kind not in scalings:
        raise UserError(f"RoPE of type {kind!r} is not supported. {_supported_hint()}")
    if "original_max_position_embeddings" in scalings[kind]:
        rope.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
    missing = [key for key in scalings[kind] if rope.get(key) is None]
    if missing:
        raise UserError(f"RoPE of type {kind!r} lacks {', '.join(missing)} in config.json")
    return float(theta), tuple(float(rope[key]) for key in scalings[kind])


def _check_equal(names: str, values: list[Any]) -> None:
    if any(value != values[0] for value in values[1:]):
        raise UserError(
            f"{names} differ ({values[0]} and {values[1]}), which is not supported. "
            f"{_supported_hint()}"
        )
