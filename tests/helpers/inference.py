"""Small models, engines and random tokens for tests of inference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from helpers.small import small_config
from tttjax.inference.engine import Engine
from tttjax.inference.prefill import (
    Context,
    InferenceModel,
    init_context,
    make_inference_model,
    split_weights,
)
from tttjax.models.transformer import Transformer, build_model
from tttjax.ttt.outer_loss import make_inner_loop
from tttjax.types import Params

LENGTH = 22  # tokens of the texts of `make_engine`
PREFILL_LENGTH = 16  # tokens of the sequences of `setting`
SYSTEMS = {
    "ttt_e2e": {"model": {"mixers": ("window",)}},
    "hybrid": {
        "model": {
            **{"mixers": ("mamba2+full+local:4",), "num_layers": 1, "num_kv_heads": 1},
            "window_size": 3,  # less than a chunk, which local attention may have
        }
    },
    "static": {
        "model": {
            **{"mixers": ("window", "full"), "fast_mlp": False, "suffix_layers": 0},
            **{"num_heads": 4, "num_kv_heads": 2, "qk_norm": False},
        }
    },
}


def random_params(model: Transformer, seed: int = 0) -> Params:
    """Random weights without a compiled program: those of norms about 1, others about 0."""
    rng = np.random.default_rng(seed)

    def random(path, x):
        is_norm = "norm" in jax.tree_util.keystr(path)
        mean, scale = (1.0, 0.2) if is_norm else (0.0, 0.3)
        return jnp.asarray((mean + scale * rng.standard_normal(x.shape)).astype(x.dtype))

    return jax.tree_util.tree_map_with_path(random, model.abstract_params())


def make_engine(name: str):
    """An engine, compiled once for all tests that use it, and two random texts."""
    return _make_engine(name, jax.config.jax_enable_x64)


@functools.cache
def _make_engine(name: str, x64: bool):
    del x64  # part of the cache key
    config = small_config(**SYSTEMS[name])
    model = build_model(config.model, config.inner)
    params = random_params(model)
    inference_model = make_inference_model(model, make_inner_loop(config.inner), config.inner.lr)
    token = np.random.default_rng(1).integers(config.model.vocab_size, size=(2, LENGTH))
    return Engine(inference_model, params, max_length=64), token.astype(np.int32)


def empty_context(inference_model: InferenceModel, params: Params) -> Context:
    """The context of two sequences of at most PREFILL_LENGTH tokens before the first token."""
    make = functools.partial(init_context, inference_model, batch=2, max_length=PREFILL_LENGTH)
    return jax.jit(make)(params)


def setting(sections: dict, learn: bool = True):
    """(config, model, params, inference_model, its weights, tokens [2, PREFILL_LENGTH + 1])."""
    config = small_config(**sections)
    model = build_model(config.model, config.inner)
    params = random_params(model)
    inference_model = make_inference_model(
        model, make_inner_loop(config.inner), config.inner.lr, learn=learn
    )
    token = np.random.default_rng(1).integers(config.model.vocab_size, size=(2, PREFILL_LENGTH + 1))
    return config, model, params, inference_model, split_weights(inference_model, params), token


class StopAfter:
    """A stop request that arrives after `calls` prefill calls."""

    def __init__(self, calls):
        self.calls = calls

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def after(self, number):
        return number + 1 == self.calls
