"""The configuration of an official checkpoint, as far as its arrays tell.

Their shapes give every size, their names which norms there are. The window, the mini-batch, the
base of the rotary embedding and the inner learning rate leave no trace in the weights: these are
taken from the paper, which has the same at every size, and named as assumptions.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from tttjax.config import default_config
from tttjax.errors import UserError
from tttjax.interop.official.names import BLOCKS, ENDS, OF_BLOCK, OF_FAST_MLP, PRIME

# Of every TTT-E2E model of the paper (arXiv 2512.23675) and of its pretraining. What is not here
# has the paper's value as its default: inner SGD with learning rate 1 and clip 1, epsilons.
PAPER: dict[str, Any] = {
    "model.window_size": 8192,
    "model.rope_theta": 500_000.0,
    "model.compute_dtype": "bfloat16",
    "inner.chunk_size": 1024,
    "inner.lr": 1.0,
    "inner.clip": 1.0,
    "train.seq_len": 8192,
}


def deduce_config(arrays: Mapping[str, Any]) -> tuple[ConfigDict, dict[str, Any]]:
    """(the configuration of a checkpoint's arrays, by dotted name what of it is assumed).

    arrays: by official name; only `shape` and `dtype` are looked at. Raises UserError if they do
    not tell the model's sizes.
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
    """The fields of the model that its arrays decide."""

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        found = tuple(arrays[name].shape) if name in arrays else ()
        if len(found) != dimensions:
            problem = f"has shape {found}" if found else "is absent"
            raise UserError(
                f"the sizes of the model cannot be told from its arrays: {name} {problem}; give "
                "its configuration with --config=FILE."
            )
        return found

    def of_block(path: str) -> str:
        return BLOCKS + OF_BLOCK[path]

    vocab_size, embed_dim = shape(ENDS["embedding"], 2)
    num_layers, _, width = shape(of_block("mixer/wq"), 3)
    _, head_dim = shape(of_block("mixer/q_norm/weight"), 2)
    *_, mlp_dim = shape(of_block("mlp/w1"), 3)
    fast = PRIME + OF_FAST_MLP["fast_mlp/w1"]
    if width % head_dim:
        raise UserError(
            f"{of_block('mixer/wq')} has {width} columns, not a multiple of the {head_dim} entries "
            "of a head; this is no checkpoint of the official code."
        )
    dtype = arrays[ENDS["embedding"]].dtype.name
    return {
        "vocab_size": vocab_size,
        "embed_dim": embed_dim,
        "num_layers": num_layers,
        "num_heads": width // head_dim,
        "head_dim": 0 if width == embed_dim else head_dim,
        "mlp_dim": mlp_dim,
        "suffix_layers": shape(fast, 3)[0] if fast in arrays else 0,
        "fast_mlp": fast in arrays,
        "tie_embeddings": ENDS["head"] not in arrays,
        "pre_norm": of_block("mixer_norm/weight") in arrays,
        "post_norm": of_block("mixer_post_norm/weight") in arrays,
        "param_dtype": dtype if dtype == "bfloat16" else "float32",
    }
