"""Kimi Delta Attention: against fla, in chunks, with extreme decays; the layer against numpy."""

import runpy
from functools import cache
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.small import shaken

from tttjax.config import ModelConfig
from tttjax.models.kda.config import KDAConfig
from tttjax.models.kda.delta_rule import kda_chunked
from tttjax.models.kda.layer import KimiDeltaAttention
from tttjax.ops.delta_rule import gated_delta_rule_recurrent

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow, pytest.mark.exhaustive]

LENGTH, EMBED, TAPS, CHUNK = 11, 6, 3, 4
HEADS, KEY_DIM, VALUE_DIM = 2, 5, 3
EPS = 1e-5


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def operands(length, seed=0):
    """q, k, v, g, beta and a state, float64."""
    rng = np.random.default_rng(seed)
    q, k = (unit(rng.normal(size=(length, HEADS, KEY_DIM))) for _ in range(2))
    v = rng.normal(size=(length, HEADS, VALUE_DIM))
    g = -rng.exponential(size=(length, HEADS, KEY_DIM))
    beta = rng.uniform(size=(length, HEADS))
    return q, k, v, g, beta, rng.normal(size=(HEADS, KEY_DIM, VALUE_DIM))


def close(results, expected, tolerance):
    for result, target in zip(*map(jax.tree.leaves, (results, expected)), strict=True):
        np.testing.assert_allclose(result, target, atol=tolerance, rtol=0)


@cache
def in_chunks(chunk):
    return jax.jit(lambda *x: kda_chunked(*x, chunk))


recurrent = jax.jit(gated_delta_rule_recurrent)


@cache
def gradients_of(form):
    """Gradients of all inputs; and their derivative in a direction."""
    every = tuple(range(6))

    def loss(*x):
        return sum(jnp.sum(jnp.sin(y + 1)) for y in form(*x))

    gradient = jax.grad(loss, every)
    return jax.jit(gradient), jax.jit(lambda x, dx: jax.jvp(gradient, x, dx)[1])


def naive_of_fla():
    """fla's definition. The file alone: importing its package needs triton."""
    try:
        path = metadata.distribution("fla-core").locate_file("fla/ops/kda/naive.py")
    except metadata.PackageNotFoundError:
        pytest.skip("fla-core is not installed (extra `interop`)")
    return runpy.run_path(str(path))["naive_recurrent_kda"]


def test_recurrent_equals_fla(monkeypatch):
    naive = naive_of_fla()
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "float", torch.float64)  # the dtype in which it computes
    x = operands(23)
    batch = [torch.from_numpy(y)[None] for y in x]
    o, state = naive(*batch[:5], initial_state=batch[5], output_final_state=True)
    close(recurrent(*x), (o[0].numpy(), state[0].numpy()), 1e-14)


@pytest.mark.parametrize("chunk", [1, 3, 4, 16, 64])
@pytest.mark.parametrize("length", [0, 1, 4, 13, 37])
def test_chunks_equal_the_definition(length, chunk):
    x = operands(length)
    close(in_chunks(chunk)(*x), recurrent(*x), 1e-14)


@pytest.mark.parametrize(("length", "chunk"), [(13, 4), (9, 16)])
def test_derivatives_of_chunks_equal_those_of_the_definition(length, chunk):
    x, direction = operands(length), operands(length, seed=1)
    (first, second), (first_exact, second_exact) = map(gradients_of, (in_chunks(chunk), recurrent))
    close(first(*x), first_exact(*x), 1e-13)
    close(second(x, direction), second_exact(x, direction), 1e-13)


def test_extreme_decays_stay_finite_and_precise():
    """Channels that forget at once, or hardly, or everything at some tokens."""
    x = operands(40)
    g = x[3]
    g[:] = np.where(np.random.default_rng(2).random(g.shape) < 0.5, -50.0, -1e-6)
    g[:, :, 0], g[:, :, 1] = -50.0, -1e-6
    g[7], g[20, :, 2:] = -1e4, -np.inf
    exact = recurrent(*x), gradients_of(recurrent)[0](*x)
    assert all(np.isfinite(y).all() for y in jax.tree.leaves(exact))
    for form, dtype, tolerance in (
        (in_chunks(32), np.float64, 1e-13),
        (in_chunks(32), np.float32, 2e-6),
        (recurrent, np.float32, 2e-6),
    ):
        inputs = [y.astype(dtype) for y in x]
        results = form(*inputs), gradients_of(form)[0](*inputs)
        assert all(y.dtype == dtype for y in jax.tree.leaves(results))
        close(results, exact, tolerance)


def build(dtype="float64", heads=HEADS):
    model = ModelConfig(
        embed_dim=EMBED,
        kda=KDAConfig(heads=heads, key_dim=KEY_DIM, value_dim=VALUE_DIM),
        conv_size=TAPS,
        mixer_norm_eps=EPS,
        scan_chunk=CHUNK,
        init_std=0.5,
        param_dtype=dtype,
    )
    return KimiDeltaAttention("kda", model, nnx.Rngs(0))


@cache
def layer():
    """(apply(weights, x, state), weights, empty state): the layer as a jitted function."""
    graph, weights = nnx.split(build())

    @jax.jit
    def apply(weights, x_TD, state):
        return nnx.merge(graph, weights)(x_TD, state, 0)

    empty = build().init_state(LENGTH, jnp.float64)
    return apply, shaken(nnx.to_pure_dict(weights)), empty


X_TD = np.random.default_rng(1).normal(size=(LENGTH, EMBED))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(w, x):
    """The whole layer in numpy, one head and token at a time."""

    def convolved(name):
        u = np.tensordot(x, w[f"w{name}"], 1)
        padded = np.concatenate([np.zeros((TAPS - 1, *u.shape[1:])), u])
        y = sum(w[f"conv_{name}"][tap] * padded[tap : tap + LENGTH] for tap in range(TAPS))
        return y * sigmoid(y)

    q, k = (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) for y in map(convolved, "qk"))
    v, beta = convolved("v"), sigmoid(x @ w["wb"])
    step = np.log1p(np.exp(np.tensordot(x @ w["wa_down"], w["wa_up"], 1) + w["dt_bias"]))
    decay = np.exp(-np.exp(w["a_log"])[:, None] * step)
    gate = sigmoid(np.tensordot(x @ w["wz_down"], w["wz_up"], 1) + w["z_bias"])
    out = np.zeros_like(x)
    for h in range(HEADS):
        s = np.zeros((KEY_DIM, VALUE_DIM))
        for t in range(LENGTH):
            key = k[t, h]
            forget = np.eye(KEY_DIM) - beta[t, h] * np.outer(key, key)
            s = forget @ np.diag(decay[t, h]) @ s + beta[t, h] * np.outer(key, v[t, h])
            o = s.T @ q[t, h] / np.sqrt(KEY_DIM)
            out[t] += (o / np.sqrt((o**2).mean() + EPS) * w["norm"] * gate[t, h]) @ w["wo"][h]
    return out


def test_layer_equals_numpy():
    apply, weights, _ = layer()
    y_TD, state = apply(weights, X_TD, None)
    assert state is None
    expected = by_hand({name: np.asarray(w) for name, w in weights.items()}, X_TD)
    close(y_TD, expected, 1e-13)


@pytest.mark.parametrize("lengths", [(LENGTH,), (6, 5), (2, 1, 8), (1,) * LENGTH], ids=str)
def test_any_split_gives_the_same_outputs_and_state(lengths):
    apply, weights, state = layer()
    expected = apply(weights, X_TD, None)[0], apply(weights, X_TD, state)[1]
    outputs = []
    for part_TD in np.split(X_TD, np.cumsum(lengths)[:-1]):
        y_TD, state = apply(weights, part_TD, state)
        outputs.append(y_TD)
    close((np.concatenate(outputs), state), expected, 1e-13)


def test_bfloat16_inputs_are_finite_and_keep_the_dtypes_of_the_state():
    mixer = build(dtype="float32")
    state = mixer.init_state(10**9, jnp.bfloat16)
    assert {name: (x.shape, x.dtype.name) for name, x in state.items()} == {
        "memory": ((HEADS, KEY_DIM, VALUE_DIM), "float32"),
        "conv_q": ((TAPS - 1, HEADS, KEY_DIM), "bfloat16"),
        "conv_k": ((TAPS - 1, HEADS, KEY_DIM), "bfloat16"),
        "conv_v": ((TAPS - 1, HEADS, VALUE_DIM), "bfloat16"),
    }
    for length in (1, 5):
        x_TD = jnp.asarray(X_TD[:length], jnp.bfloat16)
        y_TD, after = jax.jit(mixer)(x_TD, state, 0)
        assert (y_TD.shape, y_TD.dtype) == (x_TD.shape, jnp.bfloat16)
        assert all(np.isfinite(np.asarray(y, np.float32)).all() for y in (y_TD, *after.values()))
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
        assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)


def test_every_weight_has_a_finite_gradient_under_vmap():
    apply, weights, _ = layer()
    x_BTD = np.stack([X_TD, 0 * X_TD])  # the second: zeros, keys of length zero

    def loss(weights):
        y_BTD, _ = jax.vmap(lambda x_TD: apply(weights, x_TD, None))(x_BTD)
        return jnp.sum(y_BTD**2)

    for name, value in jax.jit(jax.grad(loss))(weights).items():
        assert np.isfinite(value).all(), name
        assert np.abs(value).max() > 0, name


def test_initial_decays_are_those_of_the_authors():
    mixer = build(dtype="float32", heads=512)
    rate, time_step = np.exp(mixer.a_log[...]), np.log1p(np.exp(mixer.dt_bias[...]))
    assert 0.999 < rate.min() < 1.5 < 15.5 < rate.max() < 16.001  # uniform
    assert 0.9e-3 < time_step.min() < time_step.max() < 0.101
    assert 0.009 < np.median(time_step) < 0.011  # log-uniform: 0.01
