"""Writes checkpoints in the official code's format, of tiny models with random weights."""

from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict

from tttjax.config import Config, from_config_dict
from tttjax.interop.official.names import official_shapes
from tttjax.models.transformer import build_model


def official_config(**model) -> Config:
    """A TTT-E2E model with two prefix and two suffix blocks."""
    fields = {"vocab_size": 264, "embed_dim": 8, "num_layers": 4, "num_heads": 2, "mlp_dim": 12}
    fast = {"suffix_layers": 2, "fast_mlp": True, "window_size": 16}
    inner = {"chunk_size": 8}
    train = {"seq_len": 32, "batch_size": 8}
    return from_config_dict({"model": {**fields, **fast, **model}, "inner": inner, "train": train})


def official_arrays(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under official names."""
    rng = np.random.default_rng(seed)
    shapes = official_shapes(build_model(config.model, config.inner))
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write_official(folder: Path, arrays: dict[str, np.ndarray], step: int = 3) -> Path:
    """Writes `folder`/`step` and returns it; absent nodes are stored as None, as officially."""
    tree = unflatten_dict(arrays, sep=".")
    tree["language_model"]["model"]["ln_f"]["bias"] = None
    manager = ocp.CheckpointManager(folder.absolute(), item_names=("model_weights",))
    manager.save(step, args=ocp.args.Composite(model_weights=ocp.args.StandardSave(tree)))
    manager.wait_until_finished()
    manager.close()
    return folder / str(step)
