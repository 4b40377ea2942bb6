"""The Gated DeltaNet mixer against numpy, in parts, token by token, in half precision."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.small import shaken, worst

from tttjax.config import ModelConfig
from tttjax.errors import UserError
from tttjax.models.gated_deltanet.config import GatedDeltaNetConfig
from tttjax.models.gated_deltanet.layer import GatedDeltaNet

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow]

LENGTH, EMBED, TAPS, CHUNK = 11, 6, 3, 4
KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM = 1, 2, 3, 4
EPS = 1e-5


SIZES = GatedDeltaNetConfig(KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM)
MODEL = ModelConfig(
    embed_dim=EMBED, conv_size=TAPS, scan_chunk=CHUNK, init_std=0.5, mixer_norm_eps=EPS
)


def build(dtype="float64", negative=True, **changes):
    sizes = replace(SIZES, negative_eigenvalues=negative, **changes)
    model = replace(MODEL, gated_deltanet=sizes, param_dtype=dtype)
    return GatedDeltaNet("gated_deltanet", model, nnx.Rngs(0))


@cache
def layer(negative=True):
    """(apply(weights, x, state), weights, empty state): the layer as a jitted function."""
    graph, weights = nnx.split(build(negative=negative))

    @jax.jit
    def apply(weights, x_TD, state):
        return nnx.merge(graph, weights)(x_TD, state, 0)

    empty = build(negative=negative).init_state(LENGTH, jnp.float64)
    return apply, shaken(nnx.to_pure_dict(weights)), empty


X_TD = np.random.default_rng(1).normal(size=(LENGTH, EMBED))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(w, x, negative):
    """The whole layer in numpy, one value head and token at a time."""

    def convolved(weight, kernel):
        u = np.tensordot(x, weight, 1)
        y = np.zeros_like(u)
        for t in range(LENGTH):
            for tap in range(TAPS):
                if t - (TAPS - 1) + tap >= 0:
                    y[t] += kernel[tap] * u[t - (TAPS - 1) + tap]
        return y * sigmoid(y)

    q, k = convolved(w["wq"], w["conv_q"]), convolved(w["wk"], w["conv_k"])
    v = convolved(w["wv"], w["conv_v"])
    z = np.tensordot(x, w["wz"], 1)
    q, k = (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
    beta = sigmoid(x @ w["wb"]) * (2 if negative else 1)
    decay = np.exp(-np.exp(w["a_log"]) * np.log1p(np.exp(x @ w["wa"] + w["dt_bias"])))
    out = np.zeros_like(x)
    for h in range(VALUE_HEADS):
        shared = h // (VALUE_HEADS // KEY_HEADS)
        s = np.zeros((KEY_DIM, VALUE_DIM))
        for t in range(LENGTH):
            s = decay[t, h] * s
            s = s + np.outer(k[t, shared], beta[t, h] * (v[t, h] - s.T @ k[t, shared]))
            o = s.T @ q[t, shared] / np.sqrt(KEY_DIM)
            o = o / np.sqrt((o**2).mean() + EPS) * w["norm"] * z[t, h] * sigmoid(z[t, h])
            out[t] += o @ w["wo"][h]
    return out


@pytest.mark.parametrize("negative", [True, False])
def test_equals_numpy(negative):
    apply, weights, _ = layer(negative)
    y_TD, state = apply(weights, X_TD, None)
    assert state is None
    wanted = by_hand({name: np.asarray(w) for name, w in weights.items()}, X_TD, negative)
    np.testing.assert_allclose(y_TD, wanted, atol=1e-12)


@pytest.mark.parametrize("lengths", [(LENGTH,), (6, 5), (2, 1, 8), (1,) * LENGTH], ids=str)
def test_any_split_gives_the_same_outputs_and_state(lengths):
    apply, weights, state = layer()
    wanted, _ = apply(weights, X_TD, None)
    _, whole_state = apply(weights, X_TD, state)
    outputs, first = [], 0
    for length in lengths:
        y_TD, state = apply(weights, X_TD[first : first + length], state)
        outputs.append(y_TD)
        first += length
    np.testing.assert_allclose(np.concatenate(outputs), wanted, atol=1e-12)
    assert worst(state, whole_state) < 1e-12


def test_state_has_constant_size():
    mixer = build(dtype="float32")
    state = mixer.init_state(10**9, jnp.bfloat16)
    assert {name: (x.shape, x.dtype.name) for name, x in state.items()} == {
        "memory": ((VALUE_HEADS, KEY_DIM, VALUE_DIM), "float32"),
        "conv_q": ((TAPS - 1, KEY_HEADS, KEY_DIM), "bfloat16"),
        "conv_k": ((TAPS - 1, KEY_HEADS, KEY_DIM), "bfloat16"),
        "conv_v": ((TAPS - 1, VALUE_HEADS, VALUE_DIM), "bfloat16"),
    }
    for length in (1, 5):
        x_TD = jnp.asarray(X_TD[:length], jnp.bfloat16)
        y_TD, after = jax.jit(mixer)(x_TD, state, 0)
        assert (y_TD.shape, y_TD.dtype) == (x_TD.shape, jnp.bfloat16)
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
        assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)


def test_every_weight_has_a_finite_gradient_under_vmap():
    apply, weights, _ = layer()
    x_BTD = np.stack([X_TD, 0 * X_TD])  # the second: zeros, keys of length zero

    def loss(weights):
        y_BTD, _ = jax.vmap(lambda x_TD: apply(weights, x_TD, None))(x_BTD)
        return jnp.sum(y_BTD**2)

    gradient = jax.jit(jax.grad(loss))(weights)
    for name, value in gradient.items():
        assert np.isfinite(value).all(), name
        assert np.abs(value).max() > 0, name


def test_initial_values_are_those_of_the_authors():
    mixer = build(value_heads=512, dtype="float32")
    rate, bias = np.exp(mixer.a_log[...]), mixer.dt_bias[...]
    time_step = np.log1p(np.exp(bias))
    assert rate.min() > 0
    assert rate.max() <= 16.001
    assert 6 < rate.mean() < 10  # uniform in (0, 16)
    assert 0.9e-3 < time_step.min() < time_step.max() < 0.101
    assert 0.008 < np.median(time_step) < 0.0125  # log-uniform: 0.01
    taps = np.abs(mixer.conv_v[...])
    assert 0.95 * TAPS**-0.5 < taps.max() <= TAPS**-0.5
    assert 0.45 < np.std(mixer.wv[...]) < 0.55
    np.testing.assert_array_equal(mixer.norm[...], 1)


def test_indivisible_heads_are_refused():
    with pytest.raises(UserError, match="value_heads = 3 is not a multiple of the 2 key heads"):
        replace(SIZES, key_heads=2, value_heads=3).check(MODEL)
