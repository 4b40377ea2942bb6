"""Names, shapes and conversions of Hugging Face tensors, without transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers.small import small_config

from tttjax.errors import UserError
from tttjax.interop.huggingface import (
    HEAD,
    check_names,
    config_from_huggingface,
    inner_from_huggingface,
    iter_weights,
    tensor_slots,
    unmatched_weights,
)
from tttjax.interop.huggingface.names import families
from tttjax.models.stacking import combine
from tttjax.models.transformer import build_model

STATIC = {"fast_mlp": False, "suffix_layers": 0, "qk_norm": False, "post_norm": False}
MODELS = {
    "llama": {**STATIC, "tie_embeddings": False},
    "qwen3": {**STATIC, "qk_norm": True},
    "gemma3_text": {**STATIC, "qk_norm": True, "post_norm": True},
    "tttjax": {},
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def to_tensors(slots, params) -> dict[str, np.ndarray]:
    flat = flatten_dict(combine(params.slow, params.fast), sep="/")
    rows = {p: np.asarray(flat[p.path] if p.row is None else flat[p.path][p.row]) for p in slots}
    return {slot.name: slot.to_hf(ours) for slot, ours in rows.items()}


def shape_of(slots, name: str) -> tuple[int, ...]:
    return next(slot.shape for slot in slots if slot.name == name)


@pytest.mark.parametrize("family", MODELS)
def test_conversion_of_every_weight_round_trips(family):
    config = small_config(model={**MODELS[family], "num_layers": 3})
    model = build_model(config.model, config.inner)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.standard_normal(x.shape, np.float32), model.abstract_params()
    )
    slots = tensor_slots(model, family)
    tensors = to_tensors(slots, params)
    assert unmatched_weights(model, slots) == []
    assert {slot.name: slot.shape for slot in slots} == {k: v.shape for k, v in tensors.items()}
    flat = flatten_dict(combine(params.slow, params.fast), sep="/")
    paths_and_rows = set()
    for path, row, array in iter_weights(slots, tensors.__getitem__):
        ours = flat[path] if row is None else flat[path][row]
        # Gemma's norms are stored as their difference from 1.
        assert np.abs(array - ours).max() <= (1e-6 if family == "gemma3_text" else 0)
        paths_and_rows.add((path, row))
    assert len(paths_and_rows) == sum(len(x) if "stage" in path else 1 for path, x in flat.items())


def test_rope_pairs_become_half_split():
    config = small_config(model=MODELS["qwen3"])
    model = build_model(config.model, config.inner)
    slot = next(p for p in tensor_slots(model, "qwen3") if p.name.endswith("k_norm.weight"))
    assert slot.to_hf(np.array([0, 1, 2, 3])).tolist() == [0, 2, 1, 3]
    assert slot.from_hf(np.array([0, 2, 1, 3])).tolist() == [0, 1, 2, 3]


def test_missing_unexpected_and_misshapen_tensors_are_refused():
    config = small_config(model=MODELS["llama"])
    model = build_model(config.model, config.inner)
    slots = tensor_slots(model, "llama")
    names = {slot.name for slot in slots}
    check_names(names | {"model.layers.0.self_attn.rotary_emb.inv_freq"}, slots, "the file")
    with pytest.raises(UserError, match=r"missing lm_head.weight; unexpected model.layers.0.mlp.b"):
        check_names(names - {"lm_head.weight"} | {"model.layers.0.mlp.b"}, slots, "the file")
    with pytest.raises(UserError, match=r"embed_tokens.weight has shape \(2, 2\)"):
        list(iter_weights(slots, lambda name: np.zeros((2, 2), np.float32)))
    tied = small_config(model=MODELS["gemma3_text"])
    tied = build_model(tied.model, tied.inner)
    slots = tensor_slots(tied, "gemma3_text")
    with pytest.raises(UserError, match=r"lm_head.weight is not the same weight as the tied"):
        list(iter_weights(slots, lambda name: np.ones(shape_of(slots, name), np.float32)))
    with pytest.raises(UserError, match="families are llama"):
        tensor_slots(model, "gpt2")


def test_a_tied_head_must_equal_the_embedding():
    """Entry by entry: one large entry does not hide other differences; rounding is allowed."""
    config = small_config(model=MODELS["gemma3_text"])
    model = build_model(config.model, config.inner)
    slots = tensor_slots(model, "gemma3_text")
    rng = np.random.default_rng(0)
    random = jax.tree.map(
        lambda x: rng.standard_normal(x.shape, np.float32), model.abstract_params()
    )
    tensors = to_tensors(slots, random)
    head = tensors[HEAD].copy()
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].copy()
    scale = config.model.embed_dim**-0.5
    head[0, 0], tensors["model.embed_tokens.weight"][0, 0] = 100, 100 * scale
    rounded = {name: x.astype(jnp.bfloat16) for name, x in {**tensors, HEAD: head}.items()}
    assert len(list(iter_weights(slots, rounded.__getitem__))) == len(slots) - 1
    head[1:] += 0.5
    with pytest.raises(UserError, match="not the same weight"):
        list(iter_weights(slots, {**tensors, HEAD: head}.__getitem__))


def test_fields_of_a_config():
    fields = config_from_huggingface(LLAMA)
    assert fields["mixers"] == ("full",)
    assert fields["rope_scaling"] == ()
    assert (fields["num_kv_heads"], fields["head_dim"], fields["norm_eps"]) == (2, 4, 1e-5)
    assert not any(fields[name] for name in ("qk_norm", "post_norm", "tie_embeddings"))

    older = config_from_huggingface({**LLAMA, "rope_scaling": LLAMA3_ROPE})
    newer = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    newer["rope_parameters"] = {**LLAMA3_ROPE, "rope_theta": 500000.0}
    assert config_from_huggingface(newer) == older
    assert older["rope_scaling"] == (8, 1, 4, 8192)
    assert older["rope_theta"] == 500000

    qwen = {**LLAMA, "model_type": "qwen3", "head_dim": 8, "sliding_window": 7}
    assert config_from_huggingface(qwen)["mixers"] == ("full",)
    assert config_from_huggingface(qwen)["qk_norm"]
    sliding = {**qwen, "use_sliding_window": True, "max_window_layers": 1}
    assert config_from_huggingface(sliding)["mixers"] == ("full", "window", "window")
    assert config_from_huggingface(sliding)["window_size"] == 7

    mistral = {**LLAMA, "model_type": "mistral"}
    assert config_from_huggingface({**mistral, "sliding_window": 9})["mixers"] == ("window",)
    assert config_from_huggingface({**mistral, "sliding_window": None})["mixers"] == ("full",)
    with pytest.raises(UserError, match="has no sliding_window"):  # 4096 in transformers
        config_from_huggingface(mistral)


def test_fields_of_a_model_with_fast_weights():
    own = {
        **LLAMA,
        "model_type": "tttjax",
        "fast_mlp_layers": 2,
        "pre_norm": True,
        "post_norm": True,
    }
    own |= {"fast_parameters": ["a"], "chunk_size": 16, "inner_lr": 0.5, "inner_clip": 2.0}
    fields = config_from_huggingface(own)
    assert (fields["suffix_layers"], fields["fast_mlp"], fields["post_norm"]) == (2, True, True)
    inner = inner_from_huggingface({**own, "fast_paths": ["suffix/**"]})
    assert inner == {
        "chunk_size": 16,
        "lr": 0.5,
        "clip": 2.0,
        "rule": "sgd",
        "fast_paths": ("suffix/**",),
    }
    assert inner_from_huggingface(LLAMA) == {}


MINISTRAL = {"model_type": "ministral", "sliding_window": 9}
REFUSED = {
    "family": ({"model_type": "gpt2"}, "'gpt2' is not supported.*llama, mistral"),
    "bias": ({"attention_bias": True}, "a bias, which is not supported"),
    "mlp_bias": ({"mlp_bias": True}, "MLPs with a bias"),
    "activation": ({"hidden_act": "gelu"}, "another activation than silu"),
    "rope": ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "type 'yarn'"),
    "rope_lacks": ({"rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
    "partial": ({"partial_rotary_factor": 0.5}, "a part of each head"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantized weights"),
    "layer_types": (
        {**MINISTRAL, "layer_types": ["chunked_attention"] * 3},
        "unknown 'chunked_attention'",
    ),
    "too_few": ({**MINISTRAL, "layer_types": ["full_attention"]}, "not have 3 entries"),
    "number": ({"hidden_size": "16"}, "hidden_size = '16'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_features_are_refused(name):
    changes, sentence = REFUSED[name]
    with pytest.raises(UserError, match=sentence):
        config_from_huggingface({**LLAMA, **changes})
    assert set(MODELS) < set(families())
