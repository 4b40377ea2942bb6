"""Grouped-query attention equals attention with repeated heads of keys and values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers.small import random_batch, shaken, small_config, worst

from tttjax.models.transformer import build_model
from tttjax.ttt.outer_loss import make_inner_loop, make_outer_loss
from tttjax.types import Params

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow, pytest.mark.exhaustive]
HEADS, KV_HEADS = 4, 2
SIZES = {
    **{"num_heads": HEADS, "mixers": ("full", "window"), "rope_scaling": (4.0, 1.0, 4.0, 64.0)},
    **{"tie_embeddings": False, "post_norm": False},  # as in the Llama and Qwen families
}


def built(kv_heads):
    config = small_config(model={**SIZES, "num_kv_heads": kv_heads})
    return config, build_model(config.model, config.inner)


def change_heads(params, change):
    """Weights in which wk and wv, [L, D, heads, K], have been changed."""
    flat = flatten_dict({"slow": params.slow, "fast": params.fast})
    changed = {path: change(x) if path[-1] in ("wk", "wv") else x for path, x in flat.items()}
    return Params(**unflatten_dict(changed))


def repeated(params):
    return change_heads(params, lambda w: jnp.repeat(w, HEADS // KV_HEADS, axis=2))


def summed(gradient):
    """Over the heads that were copies of one."""

    def one(w):
        layers, width, _, entries = w.shape
        return w.reshape(layers, width, KV_HEADS, -1, entries).sum(3)

    return change_heads(gradient, one)


def test_loss_and_gradient_equal_repeated_heads():
    results = []
    for kv_heads in (KV_HEADS, 0):
        config, model = built(kv_heads)
        inner = make_inner_loop(config.inner)._replace(form="reference")
        loss = make_outer_loss(model, inner, learn=True)
        params = shaken(built(KV_HEADS)[1].init(jax.random.key(0)))
        params = params if kv_heads else repeated(params)
        derive = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (value, output), gradient = derive(params, random_batch(config), 0.7)
        results.append((value, output, gradient if kv_heads else summed(gradient)))
    assert worst(*results) < 1e-12


def test_logits_equal_repeated_heads_with_smaller_state():
    config, grouped = built(KV_HEADS)
    _, plain = built(HEADS)
    params = shaken(grouped.init(jax.random.key(0)))
    token_T = np.arange(12, dtype=np.int32) % config.model.vocab_size
    states = [model.init_state(12) for model in (grouped, plain)]
    logit_TV, _ = jax.jit(grouped.apply)(params, states[0], token_T)
    wanted_TV, _ = jax.jit(plain.apply)(repeated(params), states[1], token_T)
    np.testing.assert_allclose(logit_TV, wanted_TV, atol=1e-12)
    small, large = (sum(x.size for x in jax.tree.leaves(s["blocks"])) for s in states)
    assert small * HEADS == large * KV_HEADS


def test_equal_numbers_of_heads_change_nothing():
    def program(kv_heads):
        _, model = built(kv_heads)
        state = model.init_state(12)
        return str(jax.make_jaxpr(model.apply)(model.abstract_params(), state, jnp.arange(12)))

    assert program(0) == program(HEADS)
