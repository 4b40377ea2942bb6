"""The inner loop on a toy regression: every rule, every position, against plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tttjax.ttt import inner_loop
from tttjax.ttt.update_rules import RULES, global_norm, make_rule

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow]
CHUNKS, ROWS = 4, 3


def chunk_loss(fast, state, chunk):
    """A leaky two-layer regression whose state counts the chunks and shifts the target."""
    x, y, mask = chunk
    out = jnp.tanh(x @ fast["w"] + fast["b"]) + 0.1 * state["sum"]
    error = jnp.where(mask, jnp.sum((out - y) ** 2, axis=-1), 0)
    loss = jnp.sum(error) / jnp.maximum(jnp.sum(mask), 1)
    return loss, ({"sum": state["sum"] + jnp.mean(out)}, jnp.any(mask), loss)


def make_data(seed=0):
    rng = np.random.default_rng(seed)
    fast = {"w": jnp.asarray(rng.normal(size=(3, 2))), "b": jnp.asarray(rng.normal(size=2))}
    x, y = rng.normal(size=(CHUNKS, ROWS, 3)), 2 * rng.normal(size=(CHUNKS, ROWS, 2))
    return fast, (jnp.asarray(x), jnp.asarray(y), jnp.ones((CHUNKS, ROWS), bool))


def outer_loss(name, exact_chunks=None, remat=False):
    """Jitted: (fast, chunks, lr) -> mean loss, and its gradient for the initial weights."""
    rule = make_rule(name, clip=0.7)

    def loss(fast, chunks, lr):
        read_state = inner_loop.start(rule, fast, {"sum": jnp.zeros(())})
        _, records = inner_loop.adapt(
            chunk_loss, rule, lr, read_state, chunks, exact_chunks=exact_chunks, remat=remat
        )
        return jnp.mean(records.loss)

    return jax.jit(jax.value_and_grad(loss))


@pytest.fixture(scope="module")
def losses(x64):
    return {name: outer_loss(name) for name in RULES}


@pytest.mark.parametrize("name", RULES)
def test_outer_gradient_of_every_rule_equals_finite_differences(losses, name):
    fast, chunks = make_data()
    direction, _ = make_data(seed=1)
    size, lr = 1e-6, 0.3
    _, g = losses[name](fast, chunks, lr)
    plus, minus = (
        float(
            losses[name](jax.tree.map(lambda w, d, s=s: w + s * d, fast, direction), chunks, lr)[0]
        )
        for s in (size, -size)
    )
    result = sum(float(jnp.vdot(g[k], direction[k])) for k in g)
    assert result == pytest.approx((plus - minus) / (2 * size), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("position", [0, 1, CHUNKS - 1], ids=["first", "middle", "last"])
@pytest.mark.parametrize("name", RULES)
def test_chunk_without_targets_is_skipped_by_every_rule(losses, name, position):
    """The gradient is finite; weights and rule state do not change."""
    fast, (x, y, mask) = make_data()
    loss, g = losses[name](fast, (x, y, mask.at[position].set(False)), 0.3)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(g))
    rule = make_rule(name, clip=0.7)
    read_state = inner_loop.start(rule, fast, {"sum": jnp.zeros(())})
    chunk_losses = []
    for i in range(CHUNKS):
        chunk = (x[i], y[i], mask[i])
        if i == position:
            _, (state, *_) = chunk_loss(read_state.fast, read_state.state, chunk)
            read_state = read_state._replace(state=state)
            continue
        read_state, record = inner_loop.read_chunk(chunk_loss, rule, 0.3, read_state, chunk)
        chunk_losses.append(float(record.loss))
    assert float(loss) == pytest.approx(sum(chunk_losses) / CHUNKS, abs=1e-12)


def test_sgd_equals_a_python_loop():
    fast, chunks = make_data()
    rule = make_rule("sgd", clip=0.7)
    read_state = inner_loop.start(rule, fast, {"sum": jnp.zeros(())})
    end, records = inner_loop.adapt(chunk_loss, rule, 0.3, read_state, chunks)
    state = {"sum": jnp.zeros(())}
    for i in range(CHUNKS):
        chunk = jax.tree.map(lambda a, i=i: a[i], chunks)
        (loss, (state, *_)), g = jax.value_and_grad(chunk_loss, has_aux=True)(fast, state, chunk)
        norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in g.values()))
        assert float(records.loss[i]) == pytest.approx(float(loss), abs=1e-12)
        assert float(records.grad_norm[i]) == pytest.approx(norm, abs=1e-12)
        scale = min(1.0, 0.7 / norm)
        fast = {k: fast[k] - 0.3 * scale * g[k] for k in fast}
    for k in fast:
        np.testing.assert_allclose(end.fast[k], fast[k], atol=1e-12)
    assert float(end.state["sum"]) == pytest.approx(float(state["sum"]), abs=1e-12)


@pytest.mark.parametrize("exact", [0, 1, 2, CHUNKS, CHUNKS + 1])
def test_truncation_does_not_change_the_loss(losses, exact):
    fast, chunks = make_data()
    loss, g = outer_loss("sgd", exact)(fast, chunks, 0.3)
    expected, exact_g = losses["sgd"](fast, chunks, 0.3)
    assert float(loss) == pytest.approx(float(expected), abs=1e-13)
    difference = float(global_norm(jax.tree.map(jnp.subtract, g, exact_g)))
    assert (difference < 1e-13) == (exact >= CHUNKS)


def test_rematerialisation_changes_nothing(losses):
    fast, chunks = make_data()
    _, g = outer_loss("momentum", remat=True)(fast, chunks, 0.3)
    _, expected = losses["momentum"](fast, chunks, 0.3)
    assert float(global_norm(jax.tree.map(jnp.subtract, g, expected))) < 1e-13


def test_chunk_loss_precedes_its_update():
    """Another target in chunk 2 changes the losses of chunks 2 and 3, none before."""
    fast, (x, y, mask) = make_data()
    rule = make_rule("sgd", clip=0.7)

    def losses_of(y, lr):
        read_state = inner_loop.start(rule, fast, {"sum": jnp.zeros(())})
        return inner_loop.adapt(chunk_loss, rule, lr, read_state, (x, y, mask))[1].loss

    before, after = losses_of(y, 0.3), losses_of(y.at[2, 0].add(1.0), 0.3)
    np.testing.assert_array_equal(before[:2], after[:2])
    assert float(before[3]) != float(after[3])
    assert float(losses_of(y, 0.3)[0]) == float(losses_of(y, 0.0)[0])


def test_fast_weights_keep_dtype_for_float64_learning_rate():
    fast, chunks = make_data()
    fast = jax.tree.map(lambda w: w.astype(jnp.float32), fast)
    chunks = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype != bool else a, chunks)
    rule = make_rule("adam")
    read_state = inner_loop.start(rule, fast, {"sum": jnp.zeros((), jnp.float32)})
    end, _ = inner_loop.adapt(chunk_loss, rule, jnp.asarray(0.3, jnp.float64), read_state, chunks)
    assert {leaf.dtype for leaf in jax.tree.leaves(end.fast)} == {jnp.dtype("float32")}
