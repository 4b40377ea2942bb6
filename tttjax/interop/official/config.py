"""The configuration of an official checkpoint, inferred from its arrays.

Shapes determine all sizes, names the norms. The weights do not determine the window, the chunk
size, RoPE's theta and the inner learning rate: these are the paper's values, which are the same at
every size, and are reported as assumptions.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from tttjax.config import default_config
from tttjax.errors import UserError
from tttjax.interop.official.names import (
    BLOCK_NAMES,
    BLOCK_PREFIX,
    FAST_MLP_NAMES,
    PRIME_PREFIX,
    TOP_LEVEL_NAMES,
)

# Values of all TTT-E2E models in the paper (arXiv 2512.23675) during pretraining. Other fields have
# the paper's value as their default: inner SGD with learning rate 1 and clip 1, epsilons.
PAPER: dict[str, Any] = {
    "model.window_size": 8192,
    "model.rope_theta": 500_000.0,
    "model.compute_dtype": "bfloat16",
    "inner.chunk_size": 1024,
    "inner.lr": 1.0,
    "inner.clip": 1.0,
    "train.seq_len": 8192,
}


def infer_config(arrays: Mapping[str, Any]) -> tuple[ConfigDict, dict[str, Any]]:
    """(configuration of a checkpoint, its assumed fields by dotted name).

    arrays: by official name; only `shape` and `dtype` are used. Raises UserError if they do not
    determine the model's sizes.
    """
    model = _model(arrays)
    assumed = dict(PAPER)
    if not model["fast_mlp"]:
        assumed["model.mixers"] = ("full",)
    config = default_config()
    config.model.update(model)
    for name, value in assumed.items():
        section, _, field = name.partition(".")
        config[section][field] = value
    return config, assumed


def _model(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The model fields that the arrays determine."""

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        array_shape = tuple(arrays[name].shape) if name in arrays else ()
        if len(array_shape) != dimensions:
            problem = f"has shape {array_shape}" if array_shape else "is absent"
            raise UserError(
                f"the arrays do not determine the model's sizes: {name} {problem}; give the "
                "configuration with --config=FILE."
            )
        return array_shape

    def block_name(path: str) -> str:
        return BLOCK_PREFIX + BLOCK_NAMES[path]

    vocab_size, embed_dim = shape(TOP_LEVEL_NAMES["embedding"], 2)
    num_layers, _, width = shape(block_name("mixer/wq"), 3)
    _, head_dim = shape(block_name("mixer/q_norm/weight"), 2)
    *_, mlp_dim = shape(block_name("mlp/w1"), 3)
    fast = PRIME_PREFIX + FAST_MLP_NAMES["fast_mlp/w1"]
    if width % head_dim:
        raise UserError(
            f"{block_name('mixer/wq')} has {width} columns, not a multiple of the head size "
            f"{head_dim}; this is no checkpoint of the official code."
        )
    dtype = arrays[TOP_LEVEL_NAMES["embedding"]].dtype.name
    return {
        "vocab_size": vocab_size,
        "embed_dim": embed_dim,
        "num_layers": num_layers,
        "num_heads": width // head_dim,
        "head_dim": 0 if width == embed_dim else head_dim,
        "mlp_dim": mlp_dim,
        "suffix_layers": shape(fast, 3)[0] if fast in arrays else 0,
        "fast_mlp": fast in arrays,
        "tie_embeddings": TOP_LEVEL_NAMES["head"] not in arrays,
        "pre_norm": block_name("mixer_norm/weight") in arrays,
        "post_norm": block_name("mixer_post_norm/weight") in arrays,
        "param_dtype": dtype if dtype == "bfloat16" else "float32",
    }
