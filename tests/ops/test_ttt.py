"""TTT of both inner models: the two forms, the definition token by token, any split."""

from functools import partial

import helpers.ttt_reference as by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small import worst

from tttjax.ops.ttt import (
    FORMS,
    InnerNorm,
    final_weights,
    initial_state,
    learning_rates,
    ttt,
)

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow]
INNER = ("linear", "mlp")
HEADS, SIZE, CHUNK, LENGTH, EPS = 2, 4, 5, 13, 1e-6
BASE_LR = 2.0  # several times what the paper takes, so that an error in what is learned shows


def problem(inner, seed=0):
    """Random tokens, inner weights, norm weights and per-index learning rates."""
    rng = np.random.default_rng(seed)
    hidden = 3 * SIZE if inner == "mlp" else SIZE
    weights = {"w1": rng.normal(size=(HEADS, SIZE, hidden)), "b1": rng.normal(size=(HEADS, hidden))}
    if inner == "mlp":
        weights["w2"] = rng.normal(size=(HEADS, hidden, SIZE))
        weights["b2"] = rng.normal(size=(HEADS, SIZE))
    q, k, v = rng.normal(size=(3, LENGTH, HEADS, SIZE))
    return {
        "q": q,
        "k": k,
        "v": v,
        "lam": rng.uniform(size=(LENGTH, HEADS)),
        "token_idx": np.array([0.1, -0.6, 0.05, 0.02, 0.1]),  # the second is clipped
        "weights": weights,
        "scale": 1 + 0.2 * rng.normal(size=(HEADS, SIZE)),
        "bias": rng.normal(size=(HEADS, SIZE)),
    }


def rates(p):
    return learning_rates(BASE_LR, SIZE, jnp.asarray(p["token_idx"]))


@partial(jax.jit, static_argnames=("form", "output"))
def run(p, state=None, position=0, form="dual", output="query"):
    """(z, state) of all the tokens in `p`."""
    q_THK = p["q"] if output == "query" else None
    norm = InnerNorm(p["scale"], p["bias"], EPS)
    tokens = q_THK, p["k"], p["v"], p["lam"]
    return ttt(*tokens, rates(p), p["weights"], norm, state, position, form=form)


def empty(p, dtype=jnp.float64):
    return initial_state({name: w.shape for name, w in p["weights"].items()}, dtype)


def run_split(p, lengths, **options):
    """(z of all tokens, last state), in calls of these lengths."""
    state, out, first = empty(p), [], 0
    for length in lengths:
        part = {n: p[n][first : first + length] for n in ("q", "k", "v", "lam")}
        z_THK, state = run({**p, **part}, state, jnp.int32(first), **options)
        out.append(z_THK)
        first += length
    return jnp.concatenate(out), state


@pytest.mark.parametrize("output", ["query", "key"])
@pytest.mark.parametrize("inner", INNER)
def test_equals_the_definition_token_by_token(inner, output):
    p = problem(inner)
    tau = np.maximum(0, 1 / np.arange(1, CHUNK + 1) + p["token_idx"])
    assert tau[1] == 0
    fixed = {"scale": p["scale"], "bias": p["bias"], "eps": EPS}
    q = p["q"] if output == "query" else None
    tokens = q, p["k"], p["v"], p["lam"]
    expected, expected_last = by_hand.all_heads(*tokens, tau, BASE_LR / SIZE, p["weights"], fixed)
    for form in FORMS:
        np.testing.assert_allclose(run(p, form=form, output=output)[0], expected, atol=1e-11)
        z_THK, state = run_split(p, (LENGTH,), form=form, output=output)
        np.testing.assert_allclose(z_THK, expected, atol=1e-11)
        last = final_weights(state, p["weights"], rates(p), LENGTH)
        assert worst(last, expected_last) < 1e-11


@pytest.mark.parametrize("inner", INNER)
def test_gradients_of_the_forms_agree(inner):
    """With respect to tokens, rates, the initial inner weights and the norm."""
    p = problem(inner)
    cotangent = np.random.default_rng(1).normal(size=p["q"].shape)

    @partial(jax.jit, static_argnames="form")
    def value_and_gradient(p, form):
        return jax.value_and_grad(lambda p: jnp.sum(run(p, form=form)[0] * cotangent))(p)

    dual, primal = (value_and_gradient(p, form) for form in FORMS)
    assert min(jax.tree.leaves(jax.tree.map(lambda g: np.abs(g).max(), dual[1]))) > 1e-3
    assert worst(dual, primal) < 1e-10


@pytest.mark.parametrize("inner", INNER)
def test_dual_form_stores_no_weights_per_token(inner):
    p = problem(inner)

    def temporary_bytes(form):
        gradient = jax.jit(jax.grad(lambda p: jnp.sum(run(p, form=form)[0])))
        return gradient.lower(p).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes("dual") < temporary_bytes("primal")


def test_gradients_equal_finite_differences():
    """Through the inner gradients: exact second derivatives."""
    p = problem("mlp")
    cotangent = np.random.default_rng(1).normal(size=p["q"].shape)
    loss = jax.jit(lambda p: jnp.sum(run(p)[0] * cotangent))
    rng = np.random.default_rng(2)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), p)
    direction["token_idx"] *= 0.1  # keeps the clipped one clipped
    derivative = sum(
        jax.tree.leaves(jax.tree.map(lambda g, d: jnp.sum(g * d), jax.grad(loss)(p), direction))
    )

    def moved(step):
        return float(loss(jax.tree.map(lambda x, d: x + step * d, p, direction)))

    step = 1e-5
    assert (moved(step) - moved(-step)) / (2 * step) == pytest.approx(float(derivative), rel=1e-6)


SPLITS = [(5, 5, 3), (3, 10), (7, 1, 1, 4), (1,) * LENGTH]


@pytest.mark.parametrize(
    ("inner", "output", "form"),
    [
        ("linear", "query", "dual"),
        ("mlp", "query", "dual"),
        ("mlp", "query", "primal"),
        ("mlp", "key", "dual"),
    ],
)
def test_any_split_gives_the_same_outputs_and_state(inner, output, form):
    p = problem(inner)
    options = {"output": output, "form": form}
    expected, expected_state = run_split(p, (LENGTH,), **options)
    for lengths in SPLITS:
        z_THK, state = run_split(p, lengths, **options)
        np.testing.assert_allclose(z_THK, expected, atol=1e-11)
        assert worst(state, expected_state) < 1e-11


@pytest.mark.exhaustive
def test_gradients_flow_through_the_state():
    p = problem("mlp")
    cotangent = np.random.default_rng(1).normal(size=p["q"].shape)

    def gradient(lengths):
        return jax.grad(lambda p: jnp.sum(run_split(p, lengths)[0] * cotangent))(p)

    assert worst(gradient((LENGTH,)), gradient((6, 1, 6))) < 1e-10


def test_a_full_mini_batch_leaves_no_sums():
    p = problem("mlp")
    _, state = run_split(p, (2 * CHUNK,))
    assert all((np.asarray(state[f"g_{name}"]) == 0).all() for name in p["weights"])
    assert worst(final_weights(state, p["weights"], rates(p), 2 * CHUNK), p["weights"]) > 1e-2
    _, state = run_split(p, (2 * CHUNK + 1,))
    assert all((np.asarray(state[f"g_{name}"]) != 0).any() for name in p["weights"])


def test_final_weights_at_position_zero_are_initial():
    p = problem("linear")
    assert worst(final_weights(empty(p), p["weights"], rates(p), 0), p["weights"]) == 0


def test_state_and_output_are_float32_under_bfloat16():
    p = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), problem("mlp"))
    z_THK, state = run(p, empty(p, jnp.float32), jnp.int32(0))
    assert z_THK.dtype == jnp.float32
    assert {x.dtype for x in state.values()} == {jnp.dtype(jnp.float32)}
