"""The delta rule, chunked and recurrent, against numpy; extreme decays."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tttjax.ops.delta_rule import (
    gated_delta_rule,
    gated_delta_rule_recurrent,
    l2_normalise,
    unit_lower_inverse,
)

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow]

KEY_DIM, VALUE_DIM = 4, 3


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def operands(length, key_heads=2, value_heads=2, seed=0):
    """q, k, v, g, beta (up to 2: negative eigenvalues) and a state, float64."""
    rng = np.random.default_rng(seed)
    q, k = (unit(rng.normal(size=(length, key_heads, KEY_DIM))) for _ in range(2))
    v = rng.normal(size=(length, value_heads, VALUE_DIM))
    g = -rng.exponential(size=(length, value_heads))
    beta = rng.uniform(0, 2, size=(length, value_heads))
    return q, k, v, g, beta, rng.normal(size=(value_heads, KEY_DIM, VALUE_DIM))


def by_hand(q, k, v, g, beta, state):
    """S <- exp(g) (I - beta k k^T) S + beta k v^T as a matrix product, head by head."""
    length, heads, _ = v.shape
    out, last = np.empty(v.shape), np.empty(state.shape)
    for h in range(heads):
        shared = h * k.shape[1] // heads
        s = state[h].astype(np.float64)
        for t in range(length):
            key = k[t, shared].astype(np.float64)
            transition = np.eye(len(key)) - beta[t, h] * np.outer(key, key)
            s = np.exp(g[t, h]) * transition @ s + beta[t, h] * np.outer(key, v[t, h])
            out[t, h] = q[t, shared] @ s / np.sqrt(len(key))
        last[h] = s
    return out, last


def close(results, expected, tolerance):
    for result, target in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, target, atol=tolerance, rtol=0)


@cache
def in_chunks(chunk):
    return jax.jit(lambda *x: gated_delta_rule(*x, chunk))


recurrent = jax.jit(gated_delta_rule_recurrent)

CASES = [
    # tokens, chunk, key heads, value heads: full chunks, remainder, partial chunk, chunks of one
    (8, 4, 2, 2),
    (13, 5, 2, 2),
    (3, 16, 1, 1),
    (4, 1, 1, 1),
    (7, 4, 2, 4),
    (5, 3, 1, 3),
]


@pytest.mark.parametrize(("length", "chunk", "key_heads", "value_heads"), CASES)
def test_both_forms_equal_the_definition(length, chunk, key_heads, value_heads):
    x = operands(length, key_heads, value_heads)
    expected = by_hand(*x)
    close(in_chunks(chunk)(*x), expected, 1e-13)
    close(recurrent(*x), expected, 1e-13)


def test_no_tokens_leave_the_state_unchanged():
    x = operands(0)
    o, state = in_chunks(4)(*x)
    assert o.shape == x[2].shape
    np.testing.assert_array_equal(state, x[-1])


def test_gradients_equal_finite_differences_of_the_definition():
    x = operands(7, key_heads=2, value_heads=4)
    weights = [np.random.default_rng(1).normal(size=y.shape) for y in by_hand(*x)]

    def loss_of(form):
        return lambda *x: sum((y * w).sum() for y, w in zip(form(*x), weights, strict=True))

    every = tuple(range(len(x)))
    gradients = jax.jit(jax.grad(loss_of(in_chunks(4)), every))(*x)
    close(gradients, jax.jit(jax.grad(loss_of(recurrent), every))(*x), 1e-12)
    for index, gradient in enumerate(gradients):
        direction = np.random.default_rng(2).normal(size=gradient.shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = list(x)
            moved[index] = x[index] + step * direction
            ends.append(loss_of(by_hand)(*moved))
        derivative = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(np.vdot(gradient, direction), derivative, rtol=1e-7, atol=1e-8)


def test_extreme_gates_keep_float32_finite_and_precise():
    """Tokens with full decay among tokens with almost none, and beta 0."""
    q, k, v, g, beta, state = operands(32)
    g[:] = -0.01
    g[5::9] = -1e4
    g[20] = -np.inf
    g[1::4] = 0
    beta[::3] = 0
    expected = by_hand(q, k, v, g, beta, state)
    args_float32 = [x.astype(np.float32) for x in (q, k, v, g, beta, state)]

    def loss(form):
        return lambda *x: sum(jnp.sum(y**2) for y in form(*x))

    for form in (in_chunks(32), recurrent):
        results = form(*args_float32)
        assert all(y.dtype == jnp.float32 for y in results)
        close(results, expected, 3e-6)
        for gradient in jax.jit(jax.grad(loss(form), tuple(range(6))))(*args_float32):
            assert np.isfinite(gradient).all()


def test_beta_two_reflects_the_state():
    """64 times the same key: the hardest system to solve, eigenvalue -1 every time."""
    key = unit(np.random.default_rng(0).normal(size=KEY_DIM))
    _, _, _, _, _, state = operands(0)
    k = np.broadcast_to(key, (64, 2, KEY_DIM))
    v, gates = np.zeros((64, 2, VALUE_DIM)), np.zeros((64, 2))
    close(in_chunks(64)(k, k, v, gates, gates + 2, state)[1:], [state], 1e-13)
    mirrored = state - 2 * np.einsum("k,l,hlv->hkv", key, key, state)
    last = in_chunks(64)(k[:63], k[:63], v[:63], gates[:63], gates[:63] + 2, state)[1:]
    close(last, [mirrored], 1e-13)


def test_state_of_bfloat16_inputs_is_float32():
    x = operands(6)
    half = [jnp.asarray(y, jnp.bfloat16) for y in x[:5]]
    for form in (in_chunks(4), recurrent):
        o, state = form(*half, jnp.asarray(x[5], jnp.float32))
        assert (o.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
        close([o.astype(np.float32), state], by_hand(*x), 0.05)


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_unit_lower_inverse(size):
    rng = np.random.default_rng(size)
    a = np.tril(rng.normal(size=(2, size, size)), -1)
    expected = np.linalg.inv(np.eye(size) + a)
    np.testing.assert_allclose(jax.jit(unit_lower_inverse)(a), expected, rtol=1e-10, atol=1e-10)


def test_unit_lower_inverse_is_twice_differentiable():
    a = np.tril(np.random.default_rng(0).normal(size=(2, 3, 3)), -1)
    check_grads(jax.jit(lambda a: unit_lower_inverse(jnp.tril(a, -1))), (a,), order=2)


def test_l2_normalise():
    x = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 1e-3]])
    np.testing.assert_allclose(l2_normalise(x), [[0.6, 0.8], [0, 0], [0, np.sqrt(0.5)]], atol=1e-7)
    assert np.isfinite(jax.grad(lambda x: l2_normalise(x).sum())(x)).all()
    assert l2_normalise(jnp.ones(3, jnp.bfloat16)).dtype == jnp.float32
