"""A context does not depend on how a text is split, and equals that of the training loop."""

import functools
from functools import partial

import jax
import numpy as np
import pytest
from helpers.exhaustive import only
from helpers.inference import PREFILL_LENGTH as LENGTH
from helpers.inference import empty_context, setting
from helpers.small import worst

from tttjax.inference.prefill import extend, logits, prefill, read_chunks
from tttjax.ttt.outer_loss import make_forward as make_training_forward
from tttjax.ttt.outer_loss import make_inner_loop
from tttjax.types import Batch

pytestmark = pytest.mark.slow

# In each, other mixers, stacks and fast weights, in the prefix and in the suffix.
LEARNING: dict[str, dict] = {
    "fast MLP": {},
    "full prefix, two layers in the suffix, the head learns": {
        "model": {
            **{"num_layers": 3, "suffix_layers": 2, "mixers": ("full", "window", "full")},
            "tie_embeddings": False,
        },
        "inner": {"fast_paths": ("head", "suffix/**/mlp/**")},
    },
    "recurrent, momentum": {
        "model": {"mixers": ("mamba2", "window")},
        "inner": {"rule": "momentum"},
    },
}
STATIC = (("full", "window"), ("local:4", "mamba2+ttt_linear"))


def nll_of(logit, target):
    """Negative log-likelihoods of targets [...] from logits [..., V]."""
    logit = np.asarray(logit)
    chosen = np.take_along_axis(logit, target[..., None], axis=-1)[..., 0]
    return np.log(np.exp(logit).sum(axis=-1)) - chosen


def logits_at_once(model, params, token_BT):
    """Logits [B, T, V] of the whole model."""
    apply = partial(model.apply, params, model.init_state(LENGTH))
    return np.asarray(jax.jit(jax.vmap(apply))(token_BT)[0])


@functools.cache
def learning_setting(name):
    """`setting`, and NLL [B, T] and final fast weights of the training loop."""
    config, model, params, *others, token = setting(LEARNING[name])
    forward = make_training_forward(model, make_inner_loop(config.inner), learn=True)
    batch = Batch(token[:, :-1], token[:, 1:], np.ones(token[:, 1:].shape, bool))
    output = jax.jit(forward)(params, batch, config.inner.lr)
    expected = np.asarray(output.token_nll_T), output.fast
    return params, *others, token, expected


@pytest.mark.parametrize("name", only(list(LEARNING)[:1], LEARNING))
def test_reading_equals_the_training_loop(x64, name):
    """Chunks with their updates, and the tokens of a chunk without."""
    params, inference_model, weights, token, (expected_nll, expected_fast) = learning_setting(name)
    read = jax.jit(partial(read_chunks, inference_model), static_argnames="at_start")
    context, at, nll = empty_context(inference_model, params), 0, []
    for size in (4, 12) if name == "fast MLP" else (8, 8):
        after = at + size
        context, records = read(
            weights, context, token[:, at:after], token[:, after], at_start=at == 0
        )
        nll.append(np.swapaxes(records.nll_NBC, 0, 1).reshape(2, -1))
        if at == 0:
            logit_BTV = read_tokens(inference_model, weights, context, token[:, after:][:, :4])
            found = nll_of(logit_BTV, token[:, after + 1 :][:, :4])
            assert worst(found, expected_nll[:, after : after + 4]) < 1e-11
        at = after
    assert worst(np.concatenate(nll, axis=1), expected_nll) < 1e-11
    fast = jax.jit(jax.vmap(inference_model.chunk_model.split.join))(context.fast)
    assert worst(fast, expected_fast) < 1e-11


@partial(jax.jit, static_argnums=0)
def read_tokens(inference_model, weights, context, token_BT):
    """Logits of tokens of an incomplete chunk."""
    context, h_BTD = extend(inference_model, weights, context, token_BT)
    return logits(inference_model, weights, context, h_BTD)


def test_prefill_logits_equal_the_training_loop(x64):
    params, inference_model, weights, token, (expected_nll, _) = learning_setting("fast MLP")
    run = jax.jit(partial(prefill, inference_model))
    for length in (3, 8):
        context = empty_context(inference_model, params)
        learned, now, logit_BV = run(weights, context, token[:, :length])
        assert worst(nll_of(logit_BV, token[:, length]), expected_nll[:, length - 1]) < 1e-11
        assert now.sequential["position"] == now.parallel["position"] == length
        assert learned.sequential["position"] == (length - 1) // 4 * 4


@pytest.mark.parametrize(
    "mixers", [STATIC[0], pytest.param(STATIC[1], marks=pytest.mark.exhaustive)]
)
def test_any_split_gives_the_same_logits(x64, mixers):
    sizes = {"mixers": mixers, "fast_mlp": False, "suffix_layers": 0}
    _, model, params, inference_model, weights, token = setting({"model": sizes})
    token = token[:, :-1]
    full = logits_at_once(model, params, token)

    @partial(jax.jit, static_argnames="at_start")
    def extended(context, token_BT, at_start):
        context, h_BTD = extend(inference_model, weights, context, token_BT, at_start=at_start)
        return context, logits(inference_model, weights, context, h_BTD)

    context, at = empty_context(inference_model, params), 0
    for size in (7, 6, 1, 1, 1):
        context, result = extended(context, token[:, at : at + size], at_start=at == 0)
        assert worst(result, full[:, at : at + size]) < 1e-11
        at += size


def test_without_updates_fast_weights_do_not_change(x64):
    _, model, params, inference_model, weights, token = setting({}, learn=False)
    full = logits_at_once(model, params, token[:, :11])
    context = empty_context(inference_model, params)

    @jax.jit
    def run(weights, context):
        learned, now, logit_BV = prefill(inference_model, weights, context, token[:, :11])
        assert learned is now
        return now, logit_BV

    now, logit_BV = run(weights, context)
    assert worst(logit_BV, full[:, -1]) < 1e-11
    assert worst(now.fast, context.fast) == 0
