"""A context is the same however a text is split, and is what the inner loop of training leaves."""

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
    logits,
    prefill,
    read_chunks,
    start,
)
from tttjax.ttt.outer_loss import make_forward as make_training_reader
from tttjax.ttt.outer_loss import make_inner_loop
from tttjax.types import Batch

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
    """NLL [B, T] and last fast weights of the loop that training differentiates."""
    read = make_training_reader(model, make_inner_loop(config.inner), learn=True)
    batch = Batch(token[:, :-1], token[:, 1:], jnp.ones(token[:, 1:].shape, bool))
    reading = read(params, batch, config.inner.lr)
    return reading.token_nll_T, reading.fast


@pytest.mark.parametrize("name", LEARNING)
def test_chunks_leave_the_losses_and_weights_of_the_training_loop(x64, name):
    config, model, params, reader, weights, token = setting(LEARNING[name])
    expected_nll, expected_fast = losses_while_training(config, model, params, token)
    for pieces in ((16,), (4, 12)):
        context, at, nll = start(reader, params, 2, LENGTH), 0, []
        for size in pieces:
            after = at + size
            context, seen = jax.jit(partial(read_chunks, reader, at_start=at == 0))(
                weights, context, token[:, at:after], token[:, after]
            )
            nll.append(jnp.swapaxes(seen.nll_NBC, 0, 1).reshape(2, -1))
            at = after
        assert worst(jnp.concatenate(nll, axis=1), expected_nll) < 1e-11
        assert worst(jax.vmap(reader.learner.cut.join)(context.fast), expected_fast) < 1e-11


@pytest.mark.parametrize("name", ["fast MLP", "hybrid", "the head learns"])
def test_a_prompt_s_last_logits_are_those_of_the_training_loop(x64, name):
    config, model, params, reader, weights, token = setting(LEARNING[name])
    expected_nll, _ = losses_while_training(config, model, params, token)
    for length in (3, 8):
        context = start(reader, params, 2, LENGTH)
        learned, now, logit_BV = prefill(reader, weights, context, token[:, :length])
        log_p_BV = jax.nn.log_softmax(logit_BV)
        found = -np.take_along_axis(log_p_BV, token[:, length, None], axis=1)[:, 0]
        assert worst(found, expected_nll[:, length - 1]) < 1e-11
        assert now.above["position"] == now.below["position"] == length
        assert learned.above["position"] == (length - 1) // 4 * 4


@pytest.mark.parametrize("mixer", STATIC)
def test_any_split_gives_the_same_logits(x64, mixer):
    sizes = {"mixers": (mixer,), "fast_mlp": False, "suffix_layers": 0}
    _, model, params, reader, weights, token = setting({"model": sizes})
    token = token[:, :-1]
    whole, _ = jax.vmap(partial(model.apply, params, model.init_state(LENGTH)))(token)
    for pieces in ((16,), (7, 6, 1, 1, 1)):
        context, at = start(reader, params, 2, LENGTH), 0
        for size in pieces:
            context, h_BTD = extend(
                reader, weights, context, token[:, at : at + size], at_start=at == 0
            )
            found = logits(reader, weights, context, h_BTD)
            assert worst(found, whole[:, at : at + size]) < 1e-11
            at += size


def test_without_learning_the_fast_weights_stay(x64):
    _, model, params, reader, weights, token = setting({}, learn=False)
    whole, _ = jax.vmap(partial(model.apply, params, model.init_state(LENGTH)))(token[:, :11])
    context = start(reader, params, 2, LENGTH)
    learned, now, logit_BV = prefill(reader, weights, context, token[:, :11])
    assert worst(logit_BV, whole[:, -1]) < 1e-11
    assert learned is now
    assert worst(now.fast, context.fast) == 0
