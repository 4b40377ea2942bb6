"""Window attention's own derivatives against autodiff of the dense definition, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tttjax.ops.attention import Sight, attend, visible
from tttjax.ops.window_attention import (
    Chunk,
    Tiling,
    window_attention,
    window_attention_pair,
    window_attention_twice,
)

pytestmark = pytest.mark.usefixtures("x64")
BATCH, HEADS, DIM = 2, 2, 3


def chunk(queries, past, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)

    def normal(length):
        return jnp.asarray(rng.normal(size=(BATCH, length, HEADS, DIM)), dtype)

    return Chunk(normal(queries), *(normal(x) for x in (past, past, queries, queries)))


def dense(chunk, position, sight):
    """The definition, for each sequence; what is before the sequence's start has a position < 0."""
    past, queries = chunk.k_past.shape[-3], chunk.q.shape[-3]
    key_S = position - past + jnp.arange(past + queries)
    seen_TS = visible(key_S[past:], key_S, sight)

    def one(x):
        k, v = jnp.concatenate((x.k_past, x.k_own)), jnp.concatenate((x.v_past, x.v_own))
        return attend(x.q, k, v, seen_TS)

    return jax.vmap(one)(chunk)


def close(got, wanted, tolerance=1e-12):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance), got, wanted)


CASES = {
    # queries, past, position, window, block, tiling
    "start, one block": (6, 8, 0, 8, 0, (6, 8)),
    "start, in blocks": (6, 8, 0, 8, 0, (2, 3)),
    "window partly filled": (6, 8, 5, 8, 0, (3, 2)),
    "window just full": (6, 8, 8, 8, 0, (2, 4)),
    "long ago": (6, 8, 1000, 8, 0, (2, 2)),
    "nothing divides": (7, 9, 11, 9, 0, (3, 4)),
    "nothing divides, start": (7, 9, 4, 9, 0, (5, 4)),
    "keys of a block beyond the past": (3, 5, 4, 5, 0, (2, 7)),
    "window of the chunk": (6, 6, 6, 6, 0, (4, 4)),
    "window larger than the past": (4, 5, 5, 50, 0, (3, 2)),
    "window smaller than the past": (5, 9, 20, 3, 0, (2, 2)),
    "window of one": (5, 3, 7, 1, 0, (2, 2)),
    "no window": (5, 6, 4, 0, 0, (2, 4)),
    "single query": (1, 8, 5, 8, 0, (1, 3)),
    "no past": (5, 0, 0, 3, 0, (2, 2)),
    "blocks of the sequence": (5, 9, 13, 0, 6, (2, 2)),
    "blocks and a window": (5, 9, 10, 4, 6, (2, 4)),
    "chosen": (6, 8, 5, 8, 0, (0, 0)),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    queries, past, position, window, block, tiling = request.param
    return chunk(queries, past), position, Sight(window, block), Tiling(*tiling)


def test_value_and_gradient(case):
    """Of a nonlinear function, so that cotangents differ; past keys included."""
    x, position, sight, tiling = case

    def loss(f):
        return jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(f(x) * weight))))

    weight = chunk(x.q.shape[1], 0, seed=1).q
    got = loss(lambda x: window_attention(*x, position, sight, tiling))(x)
    close(got, loss(lambda x: dense(x, position, sight))(x))


def test_gradient_of_a_tangent(case):
    """What the meta-gradient takes: reverse over (value, tangent along q and own keys)."""
    x, position, sight, tiling = case
    dot = chunk(x.q.shape[1], 0, seed=2)
    weight = chunk(x.q.shape[1], 0, seed=3)

    def scalar(f):
        def of(x, along):
            def inner(q, k_own, v_own):
                o = f(x._replace(q=q, k_own=k_own, v_own=v_own))
                return o, jnp.sum(jnp.cos(o * weight.q))

            own = (x.q, x.k_own, x.v_own), (along.q, along.k_own, along.v_own)
            (o, loss), (o_dot, loss_dot) = jax.jvp(inner, *own)
            return loss + loss_dot + jnp.sum(o * weight.k_own + jnp.sin(o_dot))

        return jax.jit(jax.value_and_grad(of, argnums=(0, 1)))

    got = scalar(lambda x: window_attention_twice(*x, position, sight, tiling))(x, dot)
    close(got, scalar(lambda x: dense(x, position, sight))(x, dot), 2e-12)
