"""The blocked cross-entropy against autodiff of its definition: values, derivatives, memory."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tttjax.errors import UserError
from tttjax.ops.cross_entropy.blocked import Blocks
from tttjax.ops.cross_entropy.nll import blocked_nll, blocked_nll_jvp, token_nll

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow]
T, D, V = 7, 5, 11
# One block; blocks that divide neither rows nor vocabulary (the last overlaps or is padded).
BLOCKS = [Blocks(8, None), Blocks(3, None), Blocks(8, 4), Blocks(3, 4)]


def nll_and_pair(h, head, target, h_dot, blocks):
    """The losses, and the same with their derivative along h_dot."""
    nll, residuals = blocked_nll(h, head, target, blocks)
    return nll, jvp(lambda h: blocked_nll_jvp(h, head, target, residuals, blocks), h, h_dot)


def jvp(f, h, h_dot):
    return jax.jvp(f, (h,), (h_dot,))


@pytest.fixture(scope="module")
def arrays(x64):
    """h, head, targets (first and last column among them), direction of h, weights of losses."""
    rng = np.random.default_rng(0)
    h, h_dot = rng.normal(size=(2, T, D))
    head = rng.normal(size=(D, V))
    target = np.array([0, V - 1, 3, 7, 7, 8, V - 1])
    a, b = rng.normal(size=(2, T))
    a[2] = b[4] = 0
    return tuple(jnp.asarray(x) for x in (h, head, target, h_dot, a, b))


def close(got, expected, atol=1e-12):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-11, atol=atol), got, expected
    )


@pytest.mark.parametrize("blocks", BLOCKS)
def test_value_and_gradient(arrays, blocks):
    h, head, target, _, a, _ = arrays

    def loss(nll, *of):
        nll_T = nll(*of, target)
        return jnp.sum(a * jnp.sin(nll_T)), nll_T

    def derivatives(nll):
        derive = jax.value_and_grad(partial(loss, nll), (0, 1), has_aux=True)
        return jax.jit(derive)(h, head)

    close(derivatives(lambda *x: blocked_nll(*x, blocks)[0]), derivatives(token_nll))


@pytest.mark.parametrize("blocks", BLOCKS)
def test_tangent_and_gradient_of_both(arrays, blocks):
    h, head, target, h_dot, a, b = arrays
    residuals = blocked_nll(h, head, target, blocks)[1]

    def derivatives(nll):
        def loss(h, head, h_dot):
            pair = jvp(lambda h: nll(h, head), h, h_dot)
            return jnp.sum(a * jnp.sin(pair[0]) + b * pair[1] ** 2), pair

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(h, head, h_dot)

    close(
        derivatives(lambda h, head: blocked_nll_jvp(h, head, target, residuals, blocks)),
        derivatives(lambda h, head: token_nll(h, head, target)),
    )


@pytest.mark.parametrize("blocks", [BLOCKS[0], BLOCKS[3]])
def test_gradient_of_gradient(arrays, blocks):
    h, head, target, h_dot, a, _ = arrays

    def grad_of_grad(nll):
        def of(h, head, a):
            grads = jax.grad(lambda *x: jnp.sum(a * nll(*x, target)), (0, 1))(h, head)
            return jnp.vdot(grads[0], h_dot) + jnp.sum(jnp.sin(grads[1]))

        return jax.jit(jax.grad(of, (0, 1, 2)))(h, head, a)

    close(grad_of_grad(lambda *x: blocked_nll(*x, blocks)[0]), grad_of_grad(token_nll))


def meta(nll, h, head, h_dot):
    """Loss plus its derivative along h_dot, as differentiated by the meta-gradient."""
    return sum(jvp(lambda h: jnp.mean(nll(h, head)), h, h_dot))


def blocked_meta(h, head, target, h_dot, blocks):
    """`meta` of the blocked form; the residuals are constants."""
    residuals = blocked_nll(*jax.lax.stop_gradient((h, head)), target, blocks)[1]
    return meta(lambda *x: blocked_nll_jvp(*x, target, residuals, blocks), h, head, h_dot)


def test_a_batch_is_the_same_as_its_rows(arrays):
    """With a batch axis, where the head has one gradient for all rows; and under vmap."""
    h, head, target, h_dot, *_ = arrays
    batch = [np.stack([x, x[::-1]]) for x in (h, target, h_dot)]

    def loss(h, head, target, h_dot):
        nll, pair = nll_and_pair(h, head, target, h_dot, Blocks(4, None))
        return jnp.sum(nll**2) + jnp.sum(pair[0] * pair[1])

    grad = jax.grad(loss, (0, 1))
    alone = map(np.asarray, jax.jit(grad)(h, head, target, h_dot))
    native = jax.jit(grad)(batch[0], head, *batch[1:])
    mapped = jax.jit(jax.vmap(grad, (0, None, 0, 0)))(batch[0], head, *batch[1:])
    of_h, of_head = alone
    close(native, (np.stack([of_h, of_h[::-1]]), 2 * of_head))
    close(mapped, (native[0], np.stack([of_head] * 2)))


@pytest.mark.parametrize("blocks", [BLOCKS[0], BLOCKS[3]])
def test_extreme_logits_are_finite_and_exact(arrays, blocks):
    """Logits of 10^4 in float32: target probabilities of 1, 0 and between."""
    h, head, target, h_dot, *_ = (np.array(x) for x in arrays)
    target[0] = np.argmax(h[0] @ head)
    h[:3] *= 5e3
    args_float32 = [x.astype(np.float32) for x in (h, head, h_dot)]

    def of(meta, *args):
        return jax.jit(jax.value_and_grad(meta, (0, 1, 2)))(*args)

    got = of(lambda h, head, h_dot: blocked_meta(h, head, target, h_dot, blocks), *args_float32)
    expected = of(partial(meta, lambda h, head: token_nll(h, head, target)), h, head, h_dot)
    assert np.abs(h @ head).max() > 1e4
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize("blocks", [Blocks(20, None), Blocks(20, 30)])
def test_bfloat16_accumulates_in_float32(blocks):
    """Losses and tangents are not rounded to bfloat16; gradients to within its precision."""
    rng = np.random.default_rng(1)
    h, h_dot, head = (
        jnp.asarray(rng.normal(size=size), jnp.bfloat16) for size in ((50, 6), (50, 6), (6, 99))
    )
    target = jnp.asarray(rng.integers(99, size=50))
    exact = [x.astype(jnp.float32) for x in (h, head, h_dot)]

    @jax.jit
    def narrow(h, head, h_dot):
        loss = jax.grad(lambda *x: jnp.sum(blocked_nll(*x, target, blocks)[0]), (0, 1))
        return nll_and_pair(h, head, target, h_dot, blocks)[1], loss(h, head)

    @jax.jit
    def wide(h, head, h_dot):
        loss = jax.grad(lambda *x: jnp.sum(token_nll(*x, target)), (0, 1))
        return jvp(lambda h: token_nll(h, head, target), h, h_dot), loss(h, head)

    (pair, grads), (dense, expected) = narrow(h, head, h_dot), wide(*exact)
    for x, y, tolerance in zip(pair, dense, (1e-5, 3e-2), strict=True):
        assert x.dtype == jnp.float32
        assert np.sum(np.asarray(x) == np.asarray(x.astype(jnp.bfloat16), np.float32)) < 5
        np.testing.assert_allclose(x, y, atol=tolerance)
    for x, y in zip(grads, expected, strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(x, np.float32), y, rtol=2e-2, atol=2e-2)


def products(f, *args):
    """Multiplications by a D x V matrix of T rows in a program, loops counted by length."""

    def count(jaxpr, times):
        total = 0
        for eqn in jaxpr.eqns:
            inside = times * eqn.params.get("length", 1)
            for sub in jaxprs_in_params(eqn.params):
                total += count(sub, inside)
            if eqn.primitive.name == "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                size = np.prod([eqn.invars[0].aval.shape[i] for i in contracted])
                total += times * size * np.prod(eqn.outvars[0].aval.shape)
        return total

    return count(jax.make_jaxpr(f)(*args).jaxpr, 1) / (64 * 8 * 32)


@pytest.mark.parametrize("blocks", [Blocks(64, None), Blocks(16, None), Blocks(16, 8)])
def test_number_of_products_is_as_documented(blocks):
    h, head, target = jnp.ones((64, 8)), jnp.ones((8, 32)), jnp.zeros(64, int)

    def nll(h, head):
        return jnp.mean(blocked_nll(h, head, target, blocks)[0])

    assert products(nll, h, head) == 2
    assert products(jax.value_and_grad(nll), h, head) == 2
    assert products(jax.value_and_grad(nll, (0, 1)), h, head) == 4

    def pair(h, head, h_dot, residuals):
        return meta(lambda *x: blocked_nll_jvp(*x, target, residuals, blocks), h, head, h_dot)

    residuals = blocked_nll(h, head, target, blocks)[1]
    assert products(pair, h, head, h, residuals) == 0
    assert products(jax.value_and_grad(pair, (0, 1, 2)), h, head, h, residuals) == 5


@pytest.mark.parametrize("blocks", [Blocks(32, None), Blocks(64, 256)])
def test_memory_has_a_bound(blocks):
    """Bound: six blocks of logits, six arrays like h, one like the head."""
    h, head, target = jnp.ones((512, 8), "float32"), jnp.ones((8, 2048), "float32"), jnp.arange(512)
    block = blocks.rows * (blocks.vocab or 2048)
    bound = 4 * (6 * block + 6 * h.size + head.size + 8 * len(h))
    assert bound < h.shape[0] * head.shape[1] * 4 / 2

    def first(h, head):
        return jnp.mean(blocked_nll(h, head, target, blocks)[0])

    def second(h, head, h_dot):
        return blocked_meta(h, head, target, h_dot, blocks)

    def temporary(f, *args):
        return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes

    assert temporary(jax.value_and_grad(first, (0, 1)), h, head) < bound
    assert temporary(jax.grad(second, (0, 1, 2)), h, head, h) < bound


def test_a_sharded_vocabulary_is_not_all_gathered():
    """Head over `tensor`, batch over `data`: by the partitioner, and inside shard_map."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(2)
    parts = (PartitionSpec("data"), PartitionSpec(None, "tensor"), PartitionSpec("data"))
    host = [rng.normal(size=size) for size in ((4, 6, 5), (5, 16), (4, 6, 5))]
    host.append(rng.integers(16, size=(4, 6)))
    args = [
        jax.device_put(x, NamedSharding(mesh, part))
        for x, part in zip(host, (*parts, parts[0]), strict=True)
    ]

    def of(h, head, h_dot, target):
        def second(h, head, h_dot):
            return blocked_meta(h, head, target, h_dot, Blocks(6, None))

        return jax.value_and_grad(second, (0, 1, 2))(h, head, h_dot)

    def of_shard(*args):
        value, grads = of(*args)
        mean = jax.lax.pmean((value, grads[1]), "data")
        return mean[0], (grads[0] / 2, mean[1], grads[2] / 2)

    rows, replicated = PartitionSpec("data"), PartitionSpec()
    manual = jax.shard_map(
        of_shard,
        mesh=mesh,
        in_specs=(rows, replicated, rows, rows),
        out_specs=(replicated, (rows, replicated, rows)),
        axis_names={"data"},
        check_vma=False,
    )
    expected = jax.jit(of)(*host)
    for f in (of, manual):
        compiled = jax.jit(f).lower(*args).compile()
        assert not re.search("all-gather|all-to-all|collective-permute", compiled.as_text())
        assert "all-reduce" in compiled.as_text()
        got = compiled(*args)
        assert got[1][1].sharding.spec == parts[1]
        close(got, expected)


def test_unsupported_derivatives_raise(arrays):
    h, head, target, h_dot, *_ = arrays
    blocks = BLOCKS[0]
    residuals = blocked_nll(h, head, target, blocks)[1]

    def loss(h, head):
        return jnp.sum(blocked_nll_jvp(h, head, target, residuals, blocks))

    def second(h):
        return jax.jvp(lambda h: loss(h, head), (h,), (h_dot,))[1]

    with pytest.raises(UserError, match="first and second derivatives only"):
        jax.grad(lambda h: jnp.sum(jax.grad(second)(h)))(h)
    with pytest.raises(UserError, match="no tangent along the head"):
        jax.jvp(loss, (h, head), (h_dot, head))
    with pytest.raises(ValueError, match="reverse-mode"):
        jax.grad(loss)(h, head)


def test_shapes_that_do_not_match_raise(arrays):
    h, head, *_ = arrays
    with pytest.raises(UserError, match=r"targets \(3,\) must be shaped"):
        blocked_nll(h, head, jnp.zeros(3, int), BLOCKS[0])
