"""Blocked attention against dense attention, values and gradients; attention masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tttjax.ops.attention.attend import AttentionMask, attend, attend_blocked, mask_fn

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow]


def numpy_attention(q, k, v, attention_mask):
    """NumPy loops over queries and heads, with explicit key lists."""
    out, shared = np.zeros_like(q), q.shape[1] // k.shape[1]
    for t in range(len(q)):
        keys = [
            s
            for s in range(t + 1)
            if (not attention_mask.window or s > t - attention_mask.window)
            and (not attention_mask.block or s // attention_mask.block == t // attention_mask.block)
        ]
        for h in range(q.shape[1]):
            g = h // shared
            score = np.array([q[t, h] @ k[s, g] for s in keys]) / np.sqrt(q.shape[-1])
            weight = np.exp(score - score.max())
            out[t, h] = (weight / weight.sum()) @ v[keys, g]
    return out


def qkv(length, seed=0, heads=(2, 2, 2)):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(length, h, 4)) for h in heads]


CASES = [
    # tokens, window, block, query_block: dense, windowed, segments; with and without padding
    (9, 4, 0, 8),
    (24, 5, 0, 4),
    (23, 5, 0, 4),
    (21, 1, 0, 3),
    (24, 0, 0, 4),
    (23, 0, 0, 4),
    (22, 20, 0, 4),
    (22, 60, 0, 4),
    (24, 0, 6, 4),
    (23, 3, 6, 4),
]


@pytest.mark.parametrize(("length", "window", "block", "query_block"), CASES)
def test_blocked_equals_dense(length, window, block, query_block):
    attention_mask = AttentionMask(window=window, block=block)
    grouped = length % 2 == 1
    q, k, v = qkv(length, heads=(4, 2, 2) if grouped else (2, 2, 2))
    weight = np.random.default_rng(1).normal(size=q.shape)
    position = jnp.arange(length)

    def blocked(q, k, v):
        return attend_blocked(q, k, v, attention_mask, query_block)

    def dense(q, k, v):
        return attend(q, k, v, mask_fn(position, position, attention_mask))

    def out_and_gradients(f):
        def loss(*a):
            out = f(*a)
            return jnp.sum(out * weight), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    grads, out = out_and_gradients(blocked)
    np.testing.assert_allclose(out, numpy_attention(q, k, v, attention_mask), atol=1e-12)
    expected_grads, expected = out_and_gradients(dense)
    np.testing.assert_allclose(out, expected, atol=1e-12)
    for actual, expected in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-12)


def test_mask_as_a_literal_matrix():
    mask = mask_fn(jnp.arange(4), jnp.arange(-1, 4), AttentionMask(window=2))
    expected = ["01000", "01100", "00110", "00011"]
    assert ["".join(str(int(x)) for x in row) for row in mask] == expected
    blocks = mask_fn(jnp.arange(5), jnp.arange(5), AttentionMask(block=2))
    expected = ["10000", "11000", "00100", "00110", "00001"]
    assert ["".join(str(int(x)) for x in row) for row in blocks] == expected


def test_fully_masked_query_has_finite_derivatives():
    q, k, v = qkv(4)

    def loss(q, k, v):
        return jnp.sum(attend(q, k, v, jnp.zeros((4, 4), bool)))

    hessian_rows = jax.jit(jax.jacfwd(jax.grad(loss)))(*qkv(4))
    assert np.isfinite(loss(q, k, v))
    assert np.isfinite(hessian_rows).all()


def test_softmax_is_float32_under_bfloat16():
    """Hundreds of equal small weights would not sum to 1 in bfloat16."""
    length = 600
    q = k = jnp.zeros((length, 1, 2), jnp.bfloat16)
    v = jnp.ones((length, 1, 2), jnp.bfloat16)
    position = jnp.arange(length)
    out = attend(q, k, v, mask_fn(position, position, AttentionMask()))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), 1.0, atol=0.01)
