"""The fast form of the meta-gradient equals the reference form for all configurations."""

from functools import cache

import jax
import numpy as np
import pytest
from helpers.exhaustive import only
from helpers.small import random_batch, shaken, small_config, worst

from tttjax.models.split_model import SplitModel
from tttjax.models.transformer import build_model
from tttjax.ttt.outer_loss import make_inner_loop, make_outer_loss

pytestmark = pytest.mark.slow

# Options that do not interact share a case; with one suffix block its mixers are in the parallel
# part, so attention in the loop over chunks needs two.
CASES = {
    "two suffix blocks, window of a chunk, full attention, grouped queries, clip active": {
        "model": {
            "num_layers": 3,
            "suffix_layers": 2,
            "window_size": 4,
            "mixers": ("window", "full"),
            "num_heads": 4,
            "num_kv_heads": 2,
        },
        "inner": {"clip": 0.1},
    },
    "the whole model is suffix, long window, adam, no clip, chunks of two, one sequence": {
        "model": {"suffix_layers": 2, "window_size": 50},
        "inner": {"rule": "adam", "lr": 0.1, "clip": 0.0, "chunk_size": 2},
        "train": {"batch_size": 1, "seq_len": 6},
    },
    "recurrent layers and a convolution, recomputed": {
        "model": {
            "suffix_layers": 2,
            "mixers": ("window", "ttt_linear"),
            "pre_conv": True,
        },
        "inner": {"trajectory": "recompute"},
        "train": {"seq_len": 16},
    },
    "blocks of the official code, an untied head is fast, muon, truncated": {
        "model": {"mixers": ("local:4",), "suffix_layers": 2, "tie_embeddings": False},
        "inner": {
            "fast_paths": ("head", "suffix/**/fast_mlp/w1"),
            "rule": "muon",
            "meta_gradient": "truncated",
            "truncate_chunks": 2,
            "learn_lr": "weight",
        },
    },
    "attention, static MLPs and the last norm are fast": {
        "model": {"fast_mlp": False},
        "inner": {
            "fast_paths": ("suffix/**/mixer/w*", "suffix/**/mlp/**", "final_norm/**"),
            "learn_lr": "layer",
        },
    },
    "untied, no norms, multi-head fast MLPs, one KV head, normalised": {
        "model": {
            "tie_embeddings": False,
            "post_norm": False,
            "qk_norm": False,
            "fast_mlp_heads": 2,
            "num_kv_heads": 1,
        },
        "inner": {"rule": "normalized_sgd"},
    },
    "no mixers": {"model": {"mixers": ("none",)}},
    "window attention, recomputed, truncated, momentum": {
        "model": {"suffix_layers": 2},
        "inner": {
            "trajectory": "recompute",
            "rule": "momentum",
            "meta_gradient": "truncated",
            "truncate_chunks": 2,
            "learn_lr": "layer",
        },
        "train": {"seq_len": 16},
    },
    "first order": {"inner": {"meta_gradient": "first_order"}},
    "only the last stage of three suffix blocks learns": {
        "model": {"mixers": ("full", "window"), "num_layers": 3, "suffix_layers": 3},
        "inner": {"fast_paths": ("suffix/stage1/block0/fast_mlp/**",)},
    },
    "one chunk, two suffix blocks": {
        "model": {"suffix_layers": 2, "window_size": 12},
        "inner": {"chunk_size": 12},
    },
}


@cache
def derivatives(config, dtype):
    """(weights, by form: the jitted loss, output, gradients in weights and inner rate)."""
    model = build_model(config.model, config.inner)
    inner = make_inner_loop(config.inner)
    params = shaken(jax.jit(model.init)(jax.random.key(0)))
    functions = {}
    for form in ("reference", "fast"):
        loss = make_outer_loss(model, inner._replace(form=form), learn=True)
        functions[form] = jax.jit(jax.value_and_grad(loss, argnums=(0, 2), has_aux=True))
    return params, functions


def both_forms(config, batch, dtype):
    """(loss, output, gradients in weights and inner learning rate) of each form."""
    params, functions = derivatives(config, dtype)
    lr = np.asarray(0.7, dtype)
    return functions["reference"](params, batch, lr), functions["fast"](params, batch, lr)


TYPICAL = (
    "two suffix blocks, window of a chunk, full attention, grouped queries, clip active",
    "no mixers",
)


@pytest.mark.parametrize("name", only(TYPICAL, CASES))
def test_both_forms_agree(x64, name):
    config = small_config(**CASES[name])
    batch = random_batch(config, masked=0.2)
    ((loss, reading), grads), ((fast_loss, fast_reading), fast_grads) = both_forms(
        config, batch, "float64"
    )
    assert abs(loss - fast_loss) < 1e-12
    assert worst(reading, fast_reading) < 1e-10
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(grads))
    assert largest > 1e-3
    assert worst(grads, fast_grads) < 1e-11 * max(1.0, largest)


def drawn(seed):
    """A random configuration: depth, window, chunks, batch, clip, rule, trajectory, and more."""
    rng = np.random.default_rng(seed)

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    chunk, suffix = pick(2, 3, 5), pick(1, 2, 3)
    return small_config(
        model={
            "suffix_layers": suffix,
            "num_layers": suffix + pick(0, 1),
            "window_size": chunk + pick(0, 1, 4, 20),
            "num_kv_heads": pick(1, 2),
            "post_norm": pick(True, False),
            "qk_norm": pick(True, False),
            "tie_embeddings": pick(True, False),
        },
        inner={
            "chunk_size": chunk,
            "clip": pick(0.0, 0.1, 1.0),
            "rule": pick("sgd", "momentum", "adam"),
            "lr": pick(0.1, 0.5),
            "trajectory": pick("rewind", "recompute"),
        },
        train={"seq_len": chunk * pick(1, 3, 4), "batch_size": pick(1, 2, 3)},
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", [2, 3])
def test_both_forms_agree_for_random_configurations_in_float64(x64, seed):
    config = drawn(seed)
    (_, grads), (_, fast_grads) = both_forms(config, random_batch(config, seed, 0.3), "float64")
    largest = max(1.0, *(float(np.abs(x).max()) for x in jax.tree.leaves(grads)))
    assert worst(grads, fast_grads) < 1e-11 * largest


def both_gradients_in_float32(make_config, **batch):
    """Gradients by each form, whatever the other tests of the module have set."""
    with jax.enable_x64(False), jax.default_matmul_precision("highest"):
        config = make_config()
        (_, grads), (_, fast_grads) = both_forms(config, random_batch(config, **batch), "float32")
    dtypes = {x.dtype for x in jax.tree.leaves((grads, fast_grads))}
    assert dtypes == {np.dtype(np.float32)}
    return grads, fast_grads


@pytest.mark.exhaustive
def test_both_forms_agree_for_a_random_configuration_in_float32():
    seed = 3
    grads, fast_grads = both_gradients_in_float32(lambda: drawn(seed), seed=seed, masked=0.3)
    pairs = list(zip(jax.tree.leaves(grads), jax.tree.leaves(fast_grads), strict=True))
    total = np.sqrt(sum(np.linalg.norm(a) ** 2 for a, _ in pairs))
    assert np.sqrt(sum(np.linalg.norm(a - b) ** 2 for a, b in pairs)) <= 1e-5 * total


def test_chunk_without_targets_has_no_update(x64):
    config = small_config(**CASES["attention, static MLPs and the last norm are fast"])
    batch = random_batch(config)
    mask = batch.mask.copy()
    mask[0, 4:8] = False
    (_, grads), (_, fast_grads) = both_forms(config, batch.replace(mask=mask), "float64")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(fast_grads))
    assert worst(grads, fast_grads) < 1e-11


@pytest.mark.exhaustive
def test_in_float32():
    grads, fast_grads = both_gradients_in_float32(small_config)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(fast_grads), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a) + 1e-7


def test_mixers_before_the_first_fast_weight_are_parallel():
    lifted = {
        name: SplitModel(build_model(config.model, config.inner)).first_mixers_are_parallel
        for name, config in {
            "fast MLPs": small_config(),
            "fast attention": small_config(inner={"fast_paths": ("suffix/**/mixer/wq",)}),
            "no mixers": small_config(model={"mixers": ("none",)}),
        }.items()
    }
    assert lifted == {"fast MLPs": True, "fast attention": False, "no mixers": False}
