"""What the telescope shows is what a plain loop over chunks finds, and looking changes nothing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.inference import PREFILL_LENGTH as LENGTH
from helpers.inference import setting
from helpers.small import worst

from tttjax.inference.engine import Engine
from tttjax.inference.prefill import read_chunks, start
from tttjax.inference.update_trace import start_norms, trace_chunks
from tttjax.ttt import inner_loop
from tttjax.ttt.layer_norms import fast_layers, norms, squares
from tttjax.ttt.outer_loss import make_chunk_loss

SYSTEMS: dict[str, dict] = {
    "three layers in stacks, clipped": {
        "model": {"num_layers": 4, "suffix_layers": 3, "mixers": ("window", "full")},
        "inner": {"clip": 0.5},
    },
    "head and norm, momentum": {
        "model": {"tie_embeddings": False},
        "inner": {"fast_paths": ("head", "final_norm/**", "suffix/**/mlp/w2"), "rule": "momentum"},
    },
}
# Where each layer's weights lie: (path, row), by hand.
PLACES = {
    "three layers in stacks, clipped": {
        "layer1": ("suffix/stage0/block0", 0),
        "layer2": ("suffix/stage0/block1", 0),
        "layer3": ("suffix/stage1/block0", 0),
    },
    "head and norm, momentum": {
        "layer1": ("suffix/stage0/block0", 0),
        "final_norm": ("final_norm", None),
        "head": ("head", None),
    },
}


def norm_of(tree, place) -> float:
    """Of the weights under a path, in numpy."""
    path, row = place
    for name in path.split("/"):
        tree = tree[name]
    leaves = [np.asarray(x) if row is None else np.asarray(x)[row] for x in jax.tree.leaves(tree)]
    return float(np.sqrt(sum((x**2).sum() for x in leaves)))


def plain(config, model, params, rule, token_T, places):
    """One sequence by a Python loop over the definition: [N, ...] before, after, grads, drifts."""
    chunk_loss, size = make_chunk_loss(model, params.slow), config.inner.chunk_size

    @jax.jit
    def step(progress, chunk):
        loss, (state, _, _) = chunk_loss(progress.fast, progress.state, chunk)
        g = jax.grad(lambda fast: chunk_loss(fast, progress.state, chunk)[0])(progress.fast)
        fast, rule_state, _ = inner_loop.update(
            rule, config.inner.lr, progress.fast, progress.rule_state, g, jnp.array(True)
        )
        again, _ = chunk_loss(fast, progress.state, chunk)
        return inner_loop.ReadState(fast, rule_state, state), g, loss, again

    x_TD, _ = model.run_part("prefix", params.slow, None, model.embed(params.slow, token_T[:-1]))
    progress = inner_loop.start(rule, params.fast, model.init_state(LENGTH, parts=["suffix"]))
    rows = []
    for at in range(0, len(token_T) - 1, size):
        chunk = x_TD[at : at + size], token_T[at + 1 : at + size + 1], jnp.ones(size, bool)
        progress, g, loss, again = step(progress, chunk)
        moved = jax.tree.map(np.subtract, progress.fast, params.fast)
        shown = [[norm_of(tree, place) for place in places] for tree in (g, moved)]
        rows.append((loss, again, *shown))
    return [np.array(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("name", SYSTEMS)
def test_what_is_shown_is_what_a_plain_loop_finds(x64, name):
    config, model, params, reader, weights, token = setting(SYSTEMS[name])
    assert fast_layers(model) == PLACES[name]
    context = start(reader, params, 2, LENGTH)
    look = jax.jit(partial(trace_chunks, reader, at_start=True))
    first = jax.tree.map(lambda w: w[:1], context.fast)
    _, seen = look(first, weights, context, token[:, :-1], token[:, -1])
    before, after, grad, drift = plain(
        config, model, params, reader.learner.rule, jnp.asarray(token[1]), PLACES[name].values()
    )
    np.testing.assert_allclose(seen.loss_NB[:, 1], before, atol=1e-11)
    np.testing.assert_allclose(seen.loss_after_NB[:, 1], after, atol=1e-11)
    np.testing.assert_allclose(seen.grad_norm_NBL[:, 1], grad, atol=1e-11)
    np.testing.assert_allclose(seen.drift_NBL[:, 1], drift, atol=1e-11)
    whole = np.sqrt((np.asarray(seen.grad_norm_NBL) ** 2).sum(axis=-1))
    np.testing.assert_allclose(seen.grad_norm_NB, whole, atol=1e-11)
    assert float(seen.grad_norm_NB.max()) > config.inner.clip  # else nothing was clipped
    assert worst(seen.loss_after_NB, seen.loss_NB) > 1e-3


def test_looking_changes_nothing(x64):
    _, _, params, reader, weights, token = setting({})
    read = start(reader, params, 2, LENGTH), token[:, :-1], token[:, -1]
    context, records = jax.jit(partial(read_chunks, reader, at_start=True))(weights, *read)
    look = jax.jit(partial(trace_chunks, reader, at_start=True))
    seen_context, seen = look(jax.tree.map(lambda w: w[:1], read[0].fast), weights, *read)
    assert worst(seen_context, context) < 1e-12
    for name in records._fields:
        assert worst(getattr(seen, name), getattr(records, name)) < 1e-12


def test_the_start_is_measured_by_layer_and_sums_are_wide(x64):
    name = "head and norm, momentum"
    _, model, params, reader, _, _ = setting(SYSTEMS[name])
    sizes = start_norms(Engine(reader, params, 64))
    expected = [norm_of(params.fast, place) for place in PLACES[name].values()]
    np.testing.assert_allclose(sizes, expected, rtol=1e-12)
    low = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params.fast)
    assert {x.dtype for x in jax.tree.leaves(squares(low))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(norms(model, squares(low)), expected, rtol=0.01)
