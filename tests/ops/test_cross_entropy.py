"""The blocked cross-entropy against autodiff of its definition: values, derivatives, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tttjax.errors import UserError
from tttjax.ops.cross_entropy import (
    blocked_nll,
    blocked_nll_pair,
    blocked_nll_twice,
    blocked_nll_with_slope,
    token_nll,
)

pytestmark = pytest.mark.usefixtures("x64")
T, D, V = 7, 5, 11
# Whole; blocks that divide neither rows nor vocabulary (the last of each overlaps or is filled up).
BLOCKS = [{}, {"rows_block": 3}, {"vocab_block": 4}, {"rows_block": 3, "vocab_block": 4}]


@pytest.fixture(scope="module")
def arrays(x64):
    """h, head, targets (first and last column among them), directions of h and head, weights."""
    rng = np.random.default_rng(0)
    h, h_dot = rng.normal(size=(2, T, D))
    head, head_dot = rng.normal(size=(2, D, V))
    target = np.array([0, V - 1, 3, 7, 7, 8, V - 1])
    a, b = rng.normal(size=(2, T))
    a[2] = b[4] = 0
    return tuple(jnp.asarray(x) for x in (h, head, target, h_dot, head_dot, a, b))


def close(got, wanted, atol=1e-12):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-11, atol=atol), got, wanted)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_value_and_gradient(arrays, blocks):
    h, head, target, *_, a, _ = arrays

    def loss(nll, *of):
        return jnp.sum(a * jnp.sin(nll(*of, target)))

    got = jax.value_and_grad(lambda *x: loss(lambda *y: blocked_nll(*y, **blocks), *x), (0, 1))
    wanted = jax.value_and_grad(lambda *x: loss(token_nll, *x), (0, 1))
    close(jax.jit(got)(h, head), wanted(h, head))
    close(blocked_nll(h, head, target, **blocks), token_nll(h, head, target))


def dense_pair(h, head, target, h_dot, head_dot):
    return jax.jvp(lambda *x: token_nll(*x, target), (h, head), (h_dot, head_dot))


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_pair_and_its_gradient(arrays, blocks, moving):
    h, head, target, h_dot, head_dot, a, b = arrays
    head_dot = head_dot if moving else jnp.zeros_like(head)

    def loss(pair):
        return jnp.sum(a * jnp.sin(pair[0]) + b * pair[1] ** 2), pair

    def blocked(h, head, h_dot, head_dot):
        of_head = (head_dot,) if moving else ()
        return loss(blocked_nll_pair(h, head, target, h_dot, *of_head, **blocks))

    def dense(h, head, h_dot, head_dot):
        return loss(dense_pair(h, head, target, h_dot, head_dot))

    of = (0, 1, 2, 3) if moving else (0, 1, 2)
    got = jax.jit(jax.value_and_grad(blocked, of, has_aux=True))(h, head, h_dot, head_dot)
    close(got, jax.value_and_grad(dense, of, has_aux=True)(h, head, h_dot, head_dot))


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("blocks", [BLOCKS[1], BLOCKS[3]])
def test_gradient_of_jvp_as_in_the_meta_gradient(arrays, blocks, known):
    """Along weights below h alone; then along the head too, which the pair must notice."""
    h, head, target, h_dot, head_dot, a, b = arrays
    slope = blocked_nll_with_slope(h, head, target, **blocks)[1] if known else None

    def outer(nll, directions):
        def of(h, head):
            primals = (h, head)[: len(directions)]
            f = lambda *x: jnp.sum(a * nll(*x, *(h, head)[len(x) :]))
            value, tangent = jax.jvp(f, primals, directions)
            return value * 0.3 + tangent

        return jax.jit(jax.grad(of, (0, 1)))(h, head)

    def blocked(h, head):
        return blocked_nll_twice(h, head, target, slope, **blocks)

    for directions in ((h_dot,), (h_dot, head_dot)):
        wanted = outer(lambda h, head: token_nll(h, head, target), directions)
        close(outer(blocked, directions), wanted)


@pytest.mark.parametrize("blocks", [BLOCKS[0], BLOCKS[3]])
def test_gradient_of_gradient(arrays, blocks):
    """Reverse over reverse; inside, of h alone, as the inner loop; and of h and head."""
    h, head, target, h_dot, head_dot, a, b = arrays

    def twice(nll, inner):
        def of(h, head, a):
            slopes = jax.grad(lambda *x: jnp.sum(a * nll(*x, target)), inner)(h, head)
            return sum(jnp.sum(x * jnp.cos(y)) for x, y in zip(slopes, (h_dot, head_dot)))

        return jax.jit(jax.grad(of, (0, 1, 2)))(h, head, a)

    for inner in ((0,), (0, 1)):
        close(twice(lambda *x: blocked_nll(*x, **blocks), inner), twice(token_nll, inner))
