"""A context does not depend on how a text is split, and equals that of the training loop."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.inference import PREFILL_LENGTH as LENGTH
from helpers.inference import setting
from helpers.small import worst

from tttjax.config import Config
from tttjax.inference.prefill import (
    extend,
    init_context,
    logits,
    prefill,
    read_chunks,
)
from tttjax.ttt.outer_loss import make_forward as make_training_forward
from tttjax.ttt.outer_loss import make_inner_loop
from tttjax.types import Batch

pytestmark = pytest.mark.slow

LEARNING: dict[str, dict] = {
    "fast MLP": {},
    "hybrid": {"model": {"num_layers": 4, "suffix_layers": 2, "mixers": ("window", "full")}},
    "the head learns": {"model": {"tie_embeddings": False}, "inner": {"fast_paths": ("head",)}},
    "recurrent, momentum": {
        "model": {"mixers": ("mamba2", "window")},
        "inner": {"rule": "momentum"},
    },
}
STATIC = ("full", "window", "local", "mamba2+ttt_linear")


def losses_while_training(config: Config, model, params, token):
    """NLL [B, T] and final fast weights of the training loop."""
    forward = make_training_forward(model, make_inner_loop(config.inner), learn=True)
    batch = Batch(token[:, :-1], token[:, 1:], jnp.ones(token[:, 1:].shape, bool))
    output = forward(params, batch, config.inner.lr)
    return output.token_nll_T, output.fast


@pytest.mark.parametrize("name", LEARNING)
def test_read_chunks_equals_the_training_loop(x64, name):
    config, model, params, inference_model, weights, token = setting(LEARNING[name])
    expected_nll, expected_fast = losses_while_training(config, model, params, token)
    for lengths in ((16,), (4, 12)):
        context, at, nll = init_context(inference_model, params, 2, LENGTH), 0, []
        for size in lengths:
            after = at + size
            context, records = jax.jit(partial(read_chunks, inference_model, at_start=at == 0))(
                weights, context, token[:, at:after], token[:, after]
            )
            nll.append(jnp.swapaxes(records.nll_NBC, 0, 1).reshape(2, -1))
            at = after
        assert worst(jnp.concatenate(nll, axis=1), expected_nll) < 1e-11
        assert (
            worst(jax.vmap(inference_model.chunk_model.split.join)(context.fast), expected_fast)
            < 1e-11
        )


@pytest.mark.parametrize("name", ["fast MLP", "hybrid", "the head learns"])
def test_prefill_logits_equal_the_training_loop(x64, name):
    config, model, params, inference_model, weights, token = setting(LEARNING[name])
    expected_nll, _ = losses_while_training(config, model, params, token)
    for length in (3, 8):
        context = init_context(inference_model, params, 2, LENGTH)
        learned, now, logit_BV = prefill(inference_model, weights, context, token[:, :length])
        log_p_BV = jax.nn.log_softmax(logit_BV)
        result = -np.take_along_axis(log_p_BV, token[:, length, None], axis=1)[:, 0]
        assert worst(result, expected_nll[:, length - 1]) < 1e-11
        assert now.sequential["position"] == now.parallel["position"] == length
        assert learned.sequential["position"] == (length - 1) // 4 * 4


@pytest.mark.parametrize("mixer", STATIC)
def test_any_split_gives_the_same_logits(x64, mixer):
    sizes = {"mixers": (mixer,), "fast_mlp": False, "suffix_layers": 0}
    _, model, params, inference_model, weights, token = setting({"model": sizes})
    token = token[:, :-1]
    full, _ = jax.jit(jax.vmap(partial(model.apply, params, model.init_state(LENGTH))))(token)

    @partial(jax.jit, static_argnames="at_start")
    def extended(context, token_BT, at_start):
        context, h_BTD = extend(inference_model, weights, context, token_BT, at_start=at_start)
        return context, logits(inference_model, weights, context, h_BTD)

    for lengths in ((16,), (7, 6, 1, 1, 1)):
        context, at = init_context(inference_model, params, 2, LENGTH), 0
        for size in lengths:
            context, result = extended(context, token[:, at : at + size], at_start=at == 0)
            assert worst(result, full[:, at : at + size]) < 1e-11
            at += size


def test_without_updates_fast_weights_do_not_change(x64):
    _, model, params, inference_model, weights, token = setting({}, learn=False)
    full, _ = jax.vmap(partial(model.apply, params, model.init_state(LENGTH)))(token[:, :11])
    context = init_context(inference_model, params, 2, LENGTH)
    learned, now, logit_BV = prefill(inference_model, weights, context, token[:, :11])
    assert worst(logit_BV, full[:, -1]) < 1e-11
    assert learned is now
    assert worst(now.fast, context.fast) == 0
