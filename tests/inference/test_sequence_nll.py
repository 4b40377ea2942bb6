"""Scores of whole sequences equal those of the training definition, in float64, on every mesh."""

import functools

import jax
import numpy as np
import pytest
from helpers.exhaustive import only
from helpers.inference import random_params
from helpers.small import random_batch, small_config, worst

from tttjax.inference.prefill import make_inference_model
from tttjax.inference.sequence_nll import make_scorer
from tttjax.models.transformer import build_model
from tttjax.parallel.mesh import batch_sharding, make_mesh, param_shardings
from tttjax.ttt.outer_loss import make_forward, make_inner_loop

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow]

SIZES = {"embed_dim": 16, "mlp_dim": 8, "vocab_size": 16, "num_heads": 4, "head_dim": 4}
# Between them, every mixer, each once in the prefix or the suffix.
MODELS: dict[str, dict] = {
    "window, fast MLP": {"inner": {"learn_lr": "weight"}},
    "full and local, two layers in the suffix, the head learns, Adam": {
        "model": {
            "num_layers": 4,
            "suffix_layers": 2,
            "mixers": ("full", "local:4", "window", "full"),
            **{"tie_embeddings": False, "num_kv_heads": 2, "pre_conv": True},
        },
        "inner": {
            "fast_paths": ("head", "suffix/**/mlp/**"),
            "rule": "adam",
            "learn_lr": "layer",
        },
    },
    "recurrent, momentum": {
        "model": {"mixers": ("mamba2+kda", "gated_deltanet+window")},
        "inner": {"rule": "momentum"},
    },
    "TTT layers": {"model": {"mixers": ("ttt_linear", "ttt_mlp")}},
    "static": {
        "model": {"mixers": ("window", "mamba2+full"), "suffix_layers": 0, "fast_mlp": False}
    },
}
CASES = [
    (name, learn) for name in MODELS for learn in (True, False) if (name, learn) != ("static", True)
]
ON_A_MESH = [("window, fast MLP", True), ("recurrent, momentum", True), ("static", False)]


@functools.cache
def setting(name):
    """(config, model, weights, batch of four sequences with one chunk fully masked)."""
    sections = MODELS[name]
    config = small_config(
        model={**SIZES, **sections.get("model", {})},
        inner=sections.get("inner", {}),
        train={"batch_size": 4, "seq_len": 12},
    )
    model = build_model(config.model, config.inner)
    batch = random_batch(config, masked=0.3)
    token = np.concatenate((batch.inputs, batch.targets[:, -1:]), axis=1)
    mask = batch.mask.copy()
    mask[1, 4:8] = False
    return config, model, random_params(model), batch.replace(targets=token[:, 1:], mask=mask)


@functools.cache
def by_definition(name, learn):
    config, model, params, batch = setting(name)
    inner = make_inner_loop(config.inner)._replace(form="reference")
    forward = jax.jit(make_forward(model, inner, learn=learn))
    return np.asarray(forward(params, batch, config.inner.lr).token_nll_T)


def scores(name, learn, mesh):
    config, model, params, batch = setting(name)
    shardings = param_shardings(mesh, model.axes(), model.abstract_params())
    params = jax.device_put(params, shardings)
    inner = make_inner_loop(config.inner)
    inference_model = make_inference_model(model, inner, lr=0.0, learn=learn)
    batch = jax.device_put(batch, batch_sharding(mesh))
    return make_scorer(inference_model, mesh)(params, batch, config.inner.lr)


TYPICAL = [(name, True) for name in MODELS if name.startswith(("window", "full"))]


@pytest.mark.parametrize(("name", "learn"), only([*TYPICAL, ("static", False)], CASES))
def test_scores_equal_the_training_definition(name, learn):
    actual = scores(name, learn, make_mesh(devices=jax.devices()[:1]))
    assert worst(actual, by_definition(name, learn)) < 1e-11


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "learn"), ON_A_MESH)
def test_scores_on_a_mesh_equal_the_training_definition(name, learn):
    actual = scores(name, learn, make_mesh(2, 2, 2))
    assert actual.sharding.is_fully_replicated
    assert worst(actual, by_definition(name, learn)) < 1e-11


@pytest.mark.exhaustive
def test_learning_changes_the_scores():
    """Else the tests above would compare nothing."""
    for name in set(MODELS) - {"static"}:
        on, off = (by_definition(name, learn) for learn in (True, False))
        assert worst(on[:, :4], off[:, :4]) < 1e-11
        assert worst(on, off) > 1e-4
