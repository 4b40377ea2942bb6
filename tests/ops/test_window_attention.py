"""Window attention's custom derivatives against autodiff of dense attention, in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.attention_chunks import dense, random_chunk

from tttjax.errors import UserError
from tttjax.ops.attention.attend import AttentionMask
from tttjax.ops.window_attention import (
    QKV,
    Tiling,
    window_attention,
    window_attention_jvp,
    window_attention_pair,
)

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow]
HEADS = 2  # by default, with a batch of two


def close(actual, expected, tolerance=1e-12):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance), actual, expected)


CASES = {
    # queries, buffered keys, window, block, tiling, positions (buffer empty, partly full, full)
    "tiled": (6, 8, 8, 0, (2, 4), (0, 3, 8, 1000)),
    "partial tiles": (7, 9, 9, 0, (3, 4), (0, 1, 4, 9, 11)),
    "tiles longer than the key groups": (3, 5, 5, 0, (2, 7), (0, 4, 9)),
    "window larger than the buffer": (4, 5, 50, 0, (3, 2), (0, 5, 100)),
    "window smaller than the buffer": (5, 9, 3, 0, (2, 2), (0, 5, 20)),
    "window of one": (5, 3, 1, 0, (2, 2), (0, 7)),
    "single query": (1, 8, 8, 0, (1, 3), (0, 5, 9)),
    "no buffer": (5, 0, 3, 0, (2, 2), (0,)),
    "blocks of the sequence and a window": (5, 9, 4, 6, (2, 2), (0, 5, 10, 13)),
    "blocks of the sequence": (5, 9, 0, 6, (2, 2), (0, 5, 13)),
    "automatic tiling: one block": (6, 8, 8, 0, (0, 0), (0, 5, 1000)),
}


GROUPED = ("tiled", "partial tiles", "no buffer")  # one KV head for all query heads


@pytest.mark.parametrize("name", CASES)
def test_first_and_second_derivatives_equal_dense(name):
    """First-order gradients, and the meta-gradient's: reverse over (value, tangent of the chunk).

    Losses are nonlinear, so that all cotangents differ; buffered keys included.
    """
    queries, num_buffered, window, block, tiling, positions = CASES[name]
    kv_heads = 1 if name in GROUPED else HEADS
    x, dot = (
        random_chunk(queries, p, s, kv_heads=kv_heads) for s, p in enumerate((num_buffered, 0))
    )
    weight = random_chunk(queries, 0, seed=2)
    attention_mask = AttentionMask(window, block)

    def scalars(blocked, blocked_jvp):
        def first(x, position):
            return jnp.sum(jnp.sin(blocked(x, position) * weight.q))

        def second(x, along, position):
            def inner(q, k_chunk, v_chunk):
                o = blocked_jvp(x._replace(q=q, k_chunk=k_chunk, v_chunk=v_chunk), position)
                return o, jnp.sum(jnp.cos(o * weight.q))

            own = (x.q, x.k_chunk, x.v_chunk), (along.q, along.k_chunk, along.v_chunk)
            (o, loss), (o_dot, loss_dot) = jax.jvp(inner, *own)
            return loss + loss_dot + jnp.sum(o * weight.k_chunk + jnp.sin(o_dot))

        def derivatives(position):
            of_second = jax.value_and_grad(second, argnums=(0, 1))
            return jax.value_and_grad(first)(x, position), of_second(x, dot, position)

        return jax.jit(derivatives)

    actual = scalars(
        lambda x, position: window_attention(*x, position, attention_mask, Tiling(*tiling)),
        lambda x, position: window_attention_jvp(*x, position, attention_mask, Tiling(*tiling)),
    )
    expected = scalars(*2 * [lambda x, position: dense(x, position, attention_mask)])
    for position in positions:
        close(actual(position), expected(position), 2e-12)


# two buffer slots are empty
ATTENTION_MASK, TILING, POSITION = AttentionMask(window=5), Tiling(3, 2), 3


def small_losses():
    """A nonlinear loss of a small chunk: by `blocked`, by `blocked_jvp`, by dense attention."""
    weight = random_chunk(4, 0, seed=1).q

    def loss(o):
        return jnp.sum(jnp.sin(o * weight))

    return (
        lambda x: loss(window_attention(*x, POSITION, ATTENTION_MASK, TILING)),
        lambda x: loss(window_attention_jvp(*x, POSITION, ATTENTION_MASK, TILING)),
        lambda x: loss(dense(x, POSITION, ATTENTION_MASK)),
    )


def test_gradient_of_tangent_includes_the_buffer():
    """jvp of grad, and grad of jvp along the chunk, equal those of dense attention."""
    blocked, blocked_jvp, dense_loss = small_losses()
    x, dot = random_chunk(4, 5), random_chunk(4, 5, seed=2)

    def tangent(loss):
        def along_chunk(x):
            return jax.jvp(partial(of_chunk, x, loss), chunk_arrays(x), chunk_arrays(dot))[1]

        return jax.jit(jax.grad(along_chunk))(x)

    def jvp_of_grad(loss):
        return jax.jit(lambda x: jax.jvp(jax.grad(loss), (x,), (dot,))[1])(x)

    close(tangent(blocked_jvp), tangent(dense_loss))
    close(jvp_of_grad(blocked), jvp_of_grad(dense_loss))


def test_tangent_along_the_buffer_raises():
    x = random_chunk(4, 5)
    with pytest.raises(UserError, match="no tangent along buffered keys"):
        jax.jvp(small_losses()[1], (x,), (x,))


def chunk_arrays(x):
    return x.q, x.k_chunk, x.v_chunk


def of_chunk(x, loss, q, k_chunk, v_chunk):
    """`loss` of x with other arrays of the chunk; the buffer is a constant."""
    return loss(x._replace(q=q, k_chunk=k_chunk, v_chunk=v_chunk))


def test_constant_buffer_needs_no_cotangent_products():
    """The inner step has 3 matrix products with the buffer; the full gradient has 5."""
    blocked = small_losses()[0]
    x = random_chunk(4, 5)

    def products(f, *arguments):
        return str(jax.make_jaxpr(f)(*arguments)).count("dot_general[")

    inner = jax.grad(partial(of_chunk, x, blocked), argnums=(0, 1, 2))
    assert products(inner, *chunk_arrays(x)) == products(jax.grad(blocked), x) - 2


def test_pair_value_and_unbatched_sequence():
    x, dot = (
        random_chunk(4, 5),
        random_chunk(4, 0, seed=2)._replace(k_buffered=None, v_buffered=None),
    )
    o, o_dot = window_attention_pair(x, dot, POSITION, ATTENTION_MASK, TILING)
    close(o, window_attention(*x, POSITION, ATTENTION_MASK, TILING))

    def one(x, dot):
        return window_attention_pair(x, dot, POSITION, ATTENTION_MASK, TILING)

    close((o, o_dot), jax.vmap(one)(x, dot), 1e-14)


def test_bfloat16_is_as_accurate_as_dense():
    """A constant in k's tangent shifts all scores equally and must not cost precision."""
    wide, dot = random_chunk(16, 24), random_chunk(16, 0, seed=3)
    dot = QKV(dot.q, None, None, dot.k_chunk + 30.0, dot.v_chunk)
    bars = random_chunk(16, 0, seed=4)

    def derivatives(dtype, attention):
        x, along, (o_bar, _, _, o_dot_bar, _) = jax.tree.map(
            lambda y: y.astype(jnp.bfloat16).astype(dtype), (wide, dot, bars)
        )

        def pair(x, along):
            own = (x.q, x.k_chunk, x.v_chunk), (along.q, along.k_chunk, along.v_chunk)
            return jax.jvp(lambda q, k, v: attention(x._replace(q=q, k_chunk=k, v_chunk=v)), *own)

        @jax.jit
        def out_and_gradients(x, along):
            out, back = jax.vjp(pair, x, along)
            return out, back((o_bar, o_dot_bar))

        return out_and_gradients(x, along)

    attention_mask = AttentionMask(window=24)
    exact, rough = (
        derivatives(d, lambda x: dense(x, 10, attention_mask)) for d in (float, jnp.bfloat16)
    )
    actual = derivatives(
        jnp.bfloat16, lambda x: window_attention_jvp(*x, 10, attention_mask, Tiling(8, 8))
    )
    assert {x.dtype for x in jax.tree.leaves(actual)} == {jnp.dtype(jnp.bfloat16)}
    leaves = [[np.asarray(x, float) for x in jax.tree.leaves(t)] for t in (actual, rough, exact)]
    for ours, dense_bf16, true in zip(*leaves, strict=True):
        scale = np.linalg.norm(true)
        error, allowed = (np.linalg.norm(y - true) / scale for y in (ours, dense_bf16))
        assert error < max(0.02, 1.5 * allowed)


def test_memory_is_linear_in_keys():
    def temporary(queries, num_buffered):
        x, dot = (
            random_chunk(queries, num_buffered, dtype=np.float32),
            random_chunk(queries, 0, dtype=np.float32),
        )
        dot = dot._replace(k_buffered=None, v_buffered=None)

        def pair_vjp(x, dot, position):
            def pair(x, dot):
                return window_attention_pair(
                    x, dot, position, AttentionMask(num_buffered), Tiling(64, 64)
                )

            out, back = jax.vjp(pair, x, dot)
            return out, back(out)

        compiled = jax.jit(pair_vjp).lower(x, dot, jnp.int32(num_buffered)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(256, 512), temporary(512, 1024)
    scores = 4 * 2 * HEADS * 512 * (512 + 1024)
    assert long < 2.1 * short
    assert long < scores / 2  # the pair would need several such arrays
