"""Small configurations and random batches for the tests of the core."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np

from tttjax.config import Config, default_config, from_config_dict
from tttjax.types import Batch

SMALL = {
    "model": {
        "vocab_size": 11,
        "embed_dim": 8,
        "num_layers": 2,
        "num_heads": 2,
        "mlp_dim": 6,
        "window_size": 5,
        "suffix_layers": 1,
        "fast_mlp": True,
        "init_std": 0.4,
        "rope_theta": 100.0,
        "remat": "none",
        "mamba2": {"head_dim": 4, "state_size": 3},
        "ttt_layer": {"chunk_size": 5},
        "scan_chunk": 6,
    },
    "inner": {"chunk_size": 4, "clip": 1.0, "remat": False},
    "train": {"steps": 20, "batch_size": 2, "seq_len": 12},
    "optim": {"peak_lr": 1e-2},
}


def small_config(**sections: dict) -> Config:
    """SMALL with changes by section; in float64 wherever x64 is on.

    Mixers may be "local:SIZE" too, which runs cannot choose.
    """
    config = default_config()
    for changes in (SMALL, sections):
        for section, values in changes.items():
            config[section].update(values)
    mixers = config.model.mixers
    config.model.mixers = tuple(re.sub(r"local:\d+", "full", entry) for entry in mixers)
    if jax.config.jax_enable_x64 and config.model.compute_dtype == "float32":
        config.model.param_dtype = config.model.compute_dtype = "float64"
        config.inner.fast_dtype = "float64"
    checked = from_config_dict(config)
    model = dataclasses.replace(checked.model, mixers=tuple(mixers))
    return dataclasses.replace(checked, model=model)


def random_batch(config: Config, seed: int = 0, masked: float = 0.1) -> Batch:
    """Random tokens as numpy; each target is masked with probability `masked`."""
    rng = np.random.default_rng(seed)
    size = config.train.batch_size, config.train.seq_len
    inputs, targets = (
        rng.integers(config.model.vocab_size, size=size, dtype=np.int32) for _ in range(2)
    )
    return Batch(inputs=inputs, targets=targets, mask=rng.random(size) >= masked)


def shaken(params, seed: int = 0):
    """The same weights plus noise, so that no norm weight is 1 and no term drops out."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), params)


def worst(a, b) -> float:
    """Largest absolute difference of two trees of one structure; 0 without leaves."""
    difference = jax.tree.map(lambda x, y: np.max(np.abs(np.asarray(x) - np.asarray(y))), a, b)
    return float(np.max(jax.tree.leaves(difference), initial=0.0))  # NaN if any is
