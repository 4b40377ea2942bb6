"""The update trace equals a plain loop over chunks and does not change the context."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.inference import PREFILL_LENGTH as LENGTH
from helpers.inference import empty_context, setting
from helpers.small import worst

from tttjax.inference.engine import Engine
from tttjax.inference.prefill import read_chunks
from tttjax.inference.update_trace import start_norms, trace_chunks
from tttjax.ttt import inner_loop
from tttjax.ttt.layer_norms import fast_layers, norms, squares
from tttjax.ttt.outer_loss import make_chunk_loss

pytestmark = pytest.mark.slow

SYSTEMS: dict[str, dict] = {
    "three layers in stacks, clipped": {
        "model": {"num_layers": 3, "suffix_layers": 3, "mixers": ("window", "full")},
        "inner": {"clip": 0.5},
    },
    "head and norm, momentum": {
        "model": {"tie_embeddings": False},
        "inner": {"fast_paths": ("head", "final_norm/**", "suffix/**/mlp/w2"), "rule": "momentum"},
    },
}
# The weights of each layer, by hand: (path, row).
LAYERS = {
    "three layers in stacks, clipped": {
        "layer0": ("suffix/stage0/block0", 0),
        "layer1": ("suffix/stage0/block1", 0),
        "layer2": ("suffix/stage1/block0", 0),
    },
    "head and norm, momentum": {
        "layer1": ("suffix/stage0/block0", 0),
        "final_norm": ("final_norm", None),
        "head": ("head", None),
    },
}


def norm_of(tree, layer) -> float:
    """The norm of the weights under a path, in numpy."""
    path, row = layer
    for name in path.split("/"):
        tree = tree[name]
    leaves = [np.asarray(x) if row is None else np.asarray(x)[row] for x in jax.tree.leaves(tree)]
    return float(np.sqrt(sum((x**2).sum() for x in leaves)))


def plain(config, model, params, rule, token_T, layers):
    """One sequence by a Python loop over the definition: [N, ...] before, after, grads, drifts."""
    chunk_loss, size = make_chunk_loss(model, params.slow), config.inner.chunk_size

    @jax.jit
    def step(read_state, chunk):
        (loss, (state, _, _)), g = jax.value_and_grad(chunk_loss, has_aux=True)(
            read_state.fast, read_state.state, chunk
        )
        fast, rule_state, _ = inner_loop.update(
            rule, config.inner.lr, read_state.fast, read_state.rule_state, g, jnp.array(True)
        )
        again, _ = chunk_loss(fast, read_state.state, chunk)
        return inner_loop.ReadState(fast, rule_state, state), g, loss, again

    @jax.jit
    def start(params):
        embedded_TD = model.embed(params.slow, token_T[:-1])
        x_TD, _ = model.run_part("prefix", params.slow, None, embedded_TD)
        state = model.init_state(LENGTH, parts=["suffix"])
        return x_TD, inner_loop.start(rule, params.fast, state)

    x_TD, read_state = start(params)
    rows = []
    for at in range(0, len(token_T) - 1, size):
        end = at + size
        chunk = np.asarray(x_TD)[at:end], token_T[at + 1 : end + 1], np.ones(size, bool)
        read_state, g, loss, again = step(read_state, chunk)
        drift = jax.tree.map(np.subtract, read_state.fast, params.fast)
        layer_norms = [[norm_of(tree, layer) for layer in layers] for tree in (g, drift)]
        rows.append((loss, again, *layer_norms))
    return [np.array(column) for column in zip(*rows, strict=True)]


@functools.cache
def traced(name):
    """`setting`, the empty context, and the results of `trace_chunks` from it."""
    config, model, params, inference_model, weights, token = setting(SYSTEMS[name])
    context = empty_context(inference_model, params)
    run_trace = jax.jit(partial(trace_chunks, inference_model, at_start=True))
    first = jax.tree.map(lambda w: np.asarray(w)[:1], context.fast)
    results = run_trace(first, weights, context, token[:, :-1], token[:, -1])
    return (config, model, params, inference_model, weights, token), context, results


@pytest.mark.parametrize("name", SYSTEMS)
def test_trace_equals_a_plain_loop(x64, name):
    (config, model, params, inference_model, _, token), _, (_, trace) = traced(name)
    assert fast_layers(model) == LAYERS[name]
    before, after, grad, drift = plain(
        config,
        model,
        params,
        inference_model.chunk_model.rule,
        token[1],
        LAYERS[name].values(),
    )
    np.testing.assert_allclose(trace.loss_NB[:, 1], before, atol=1e-11)
    np.testing.assert_allclose(trace.loss_after_NB[:, 1], after, atol=1e-11)
    np.testing.assert_allclose(trace.grad_norm_NBL[:, 1], grad, atol=1e-11)
    np.testing.assert_allclose(trace.drift_NBL[:, 1], drift, atol=1e-11)
    total = np.sqrt((np.asarray(trace.grad_norm_NBL) ** 2).sum(axis=-1))
    np.testing.assert_allclose(trace.grad_norm_NB, total, atol=1e-11)
    assert float(trace.grad_norm_NB.max()) > config.inner.clip  # else nothing was clipped
    assert worst(trace.loss_after_NB, trace.loss_NB) > 1e-3


def test_trace_does_not_change_context_or_records(x64):
    (*_, inference_model, weights, token), start, results = traced("head and norm, momentum")
    traced_context, trace = results
    read = jax.jit(partial(read_chunks, inference_model, at_start=True))
    context, records = read(weights, start, token[:, :-1], token[:, -1])
    assert worst(traced_context, context) < 1e-12
    for name in records._fields:
        assert worst(getattr(trace, name), getattr(records, name)) < 1e-12


def test_start_norms_by_layer_in_float32(x64):
    name = "head and norm, momentum"
    (_, model, params, inference_model, *_), *_ = traced(name)
    start = start_norms(Engine(inference_model, params, 64))
    expected = [norm_of(params.fast, layer) for layer in LAYERS[name].values()]
    np.testing.assert_allclose(start, expected, rtol=1e-12)
    low = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params.fast)
    assert {x.dtype for x in jax.tree.leaves(squares(low))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(norms(model, squares(low)), expected, rtol=0.01)
