"""Learned inner learning rates: their gradient, and what they multiply."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small import random_batch, shaken, small_config, worst

from tttjax.config import from_config_dict
from tttjax.config.build import to_dict
from tttjax.errors import UserError
from tttjax.models.transformer import build_model
from tttjax.ttt.outer_loss import make_inner_loop, make_outer_loss
from tttjax.types import Params

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow]
LR = 0.7
FAST = ("suffix/**/fast_mlp/**", "head")
SHAPES = {
    "model": {"inner_lr": ()},
    "layer": {"inner_lr/suffix/stage0/block0": (2,), "inner_lr/head": ()},
}


def with_rates(kind):
    model = {"suffix_layers": 2 if kind == "layer" else 1, "tie_embeddings": False}
    return small_config(model=model, inner={"learn_lr": kind, "fast_paths": FAST})


def flat_rates(params):
    leaves = jax.tree_util.tree_flatten_with_path({"inner_lr": params.slow["inner_lr"]})[0]
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


@cache
def setting(kind):
    """(weights, batch, jitted loss and gradient) with rates of one kind."""
    config = with_rates(kind)
    model = build_model(config.model, config.inner)
    loss = make_outer_loss(model, make_inner_loop(config.inner), learn=True)
    function = jax.jit(jax.value_and_grad(loss, argnums=(0, 2), has_aux=True))
    return shaken(jax.jit(model.init)(jax.random.key(0))), random_batch(config), function


def with_r(params, r):
    return Params(slow={**params.slow, "inner_lr": r}, fast=params.fast)


def test_the_gradient_is_that_of_finite_differences():
    """Of the fast form; test_meta_gradient.py compares it with the reference."""
    params, batch, function = setting("layer")
    rng = np.random.default_rng(1)
    r = params.slow["inner_lr"]
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), r)
    step = 1e-5

    def loss(sign):
        moved = jax.tree.map(lambda x, d: x + sign * step * d, r, direction)
        return function(with_r(params, moved), batch, LR)[0][0]

    expected = (loss(1) - loss(-1)) / (2 * step)
    assert abs(expected) > 1e-4
    gradient = function(params, batch, LR)[1][0].slow["inner_lr"]
    products = jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)
    assert abs(sum(jax.tree.leaves(products)) - expected) < 1e-8 * max(1, abs(expected))


def test_one_rate_multiplies_the_configured_one():
    params, batch, function = setting("model")
    with_rate = function(with_r(params, jnp.asarray(0.5)), batch, LR)
    scaled = function(with_r(params, jnp.asarray(0.0)), batch, LR * np.exp(0.5))
    assert worst(with_rate[0], scaled[0]) < 1e-13
    gradient, of_lr = with_rate[1]
    assert abs(gradient.slow["inner_lr"] - LR * of_lr) < 1e-13  # d/dr = lr exp(r) d/dlr of the rate


@pytest.mark.parametrize("kind", SHAPES)
def test_there_is_a_rate_for_each_unit(kind):
    params, _, _ = setting(kind)
    assert {path: leaf.shape for path, leaf in flat_rates(params).items()} == SHAPES[kind]


def test_weights_have_a_rate_for_each_entry():
    params, _, _ = setting("weight")
    shapes = jax.tree.map(jnp.shape, params.slow["inner_lr"])
    assert shapes == jax.tree.map(jnp.shape, params.fast)


def test_a_layer_without_rate_does_not_move():
    params, batch, function = setting("layer")
    r = {"suffix": {"stage0": {"block0": jnp.asarray([-jnp.inf, 0.0])}}, "head": jnp.asarray(0.3)}
    (_, output), _ = function(with_r(params, r), batch, LR)
    assert np.all(output.layer_drift_L[:, 0] == 0)
    assert np.all(output.layer_drift_L[:, 1:] > 0)


def test_rates_start_at_the_configured_one():
    config = with_rates("weight")
    model = build_model(config.model, config.inner)
    params = model.init(0)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(params.slow["inner_lr"]))
    rates = model.inner_rates(params.slow, 0.3)
    assert jax.tree.structure(rates) == jax.tree.structure(params.fast)
    assert all(np.all(leaf == 0.3) for leaf in jax.tree.leaves(rates))


def test_rates_need_inner_updates_in_training():
    values = to_dict(dataclasses.replace(with_rates("layer")))
    values["inner"]["meta_gradient"] = "none"
    with pytest.raises(UserError, match=r"inner\.learn_lr"):
        from_config_dict(values)
