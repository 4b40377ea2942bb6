"""One outer step: results, skipped nonfinite steps, compile count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small import random_batch, small_config, worst

from tttjax.errors import UserError
from tttjax.models.transformer import build_model
from tttjax.parallel.mesh import make_mesh
from tttjax.training.optimizer import make_optimizer
from tttjax.training.step import make_trainer
from tttjax.ttt.outer_loss import make_inner_loop, make_outer_loss

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow]


def make_config(**train):
    inner = {"lr_init": 0.1, "lr_warmup_steps": 4}
    optim = {"warmup_steps": 3}
    train = {"batch_size": 4, "seq_len": 8, **train}
    return small_config(model={"num_layers": 1}, inner=inner, optim=optim, train=train)


@pytest.fixture(scope="module")
def trainer(x64):
    return make_trainer(make_config(), make_mesh(1, 1, 1, devices=jax.devices()[:1]))


def take(trainer, state, seed):
    return trainer.step(state, trainer.put_batch(random_batch(make_config(), seed)))


def test_a_batch_without_weighted_targets_is_refused(trainer):
    batch = random_batch(make_config())
    with pytest.raises(UserError, match="no target to learn from"):
        trainer.put_batch(batch.replace(weight=np.zeros(batch.mask.shape, bool)))


def numpy_of(tree):
    return jax.tree.map(np.array, tree)


def put(trainer, state):
    return jax.device_put(state, jax.tree.map(lambda x: x.sharding, trainer.abstract_state))


def test_step_equals_gradient_clip_adam_and_schedules(trainer):
    config = make_config()
    model = build_model(config.model, config.inner)
    state = trainer.init_state(0)
    params = numpy_of(state.params)
    loss = make_outer_loss(model, make_inner_loop(config.inner), learn=True)
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    optimizer = make_optimizer(config.optim, config.train.steps)
    opt_state, update = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
    for n, rate in enumerate((0.1 + 0.9 / 4, 0.55)):
        params_before = params
        (expected_loss, output), grads = gradient(params, random_batch(config, n), np.float32(rate))
        updates, opt_state = update(grads, opt_state, params)
        params = jax.tree.map(np.add, params, updates)
        state, metrics = take(trainer, state, n)
        assert float(metrics["loss"]) == pytest.approx(float(expected_loss), abs=1e-11)
        assert float(metrics["inner_lr"]) == pytest.approx(rate, rel=1e-6)
        assert float(metrics["lr"]) == pytest.approx(1e-2 * (n + 1) / 4, rel=1e-6)
        output = numpy_of(output)
        norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(grads)))
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-9)
        drift = np.mean(output.drift)
        assert float(metrics["fast_drift"]) == pytest.approx(drift, rel=1e-9)
        moved = jax.tree.map(lambda a, b: a - b, output.fast, params_before.fast)
        squares = sum((x**2).reshape(len(x), -1).sum(1) for x in jax.tree.leaves(moved))
        drift = np.mean(np.sqrt(squares))  # of the one layer that has fast weights
        assert float(metrics["fast_drift_layer0"]) == pytest.approx(drift, rel=1e-9)
        for name, chunk in (("first", 0), ("last", -1)):
            loss = np.mean(output.chunk_loss_N[:, chunk])
            assert float(metrics[f"{name}_chunk_loss"]) == pytest.approx(loss, rel=1e-9)
        clipped = np.mean(output.grad_norm_N >= 1.0)
        assert float(metrics["inner_clip_rate"]) == pytest.approx(clipped)
    assert worst(state.params, params) < 1e-9
    assert int(state.step) == 2
    assert int(metrics["tokens"]) == 4 * 8


def test_the_first_step_moves_the_weights(trainer):
    """The warm-up starts above zero."""
    state = trainer.init_state(0)
    before = numpy_of(state.params)
    after, _ = take(trainer, state, 0)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, numpy_of(after.params))
    assert all(jax.tree.leaves(moved))


def test_nonfinite_step_is_skipped_and_counted(trainer):
    state, _ = take(trainer, trainer.init_state(0), 0)
    saved = numpy_of(state)
    before_skips = numpy_of(state)
    for x in jax.tree.leaves(before_skips.params):
        x[0] = np.inf
    poisoned = put(trainer, before_skips)
    for times in (1, 2):
        poisoned, metrics = take(trainer, poisoned, times)
        assert bool(metrics["nonfinite"])
        assert int(metrics["skipped"]) == int(metrics["skipped_in_row"]) == times
    assert int(poisoned.step) == 3
    for part in ("params", "opt_state"):
        before, after = getattr(before_skips, part), numpy_of(getattr(poisoned, part))
        jax.tree.map(np.testing.assert_array_equal, before, after)
    healed = put(trainer, numpy_of(poisoned).replace(params=saved.params))
    healed, metrics = take(trainer, healed, 3)
    assert not bool(metrics["nonfinite"])
    assert (int(healed.skipped), int(healed.skipped_in_row)) == (2, 0)
    assert float(metrics["lr"]) == pytest.approx(1e-2 * 2 / 4, rel=1e-6)  # of updates, not steps


def test_accumulated_gradient_equals_full_batch_gradient(trainer):
    parts = make_trainer(make_config(accum_steps=2), trainer.mesh)
    full_state, full = take(trainer, trainer.init_state(0), 5)
    accumulated_state, accumulated = take(parts, trainer.init_state(0), 5)
    assert worst(full_state.params, accumulated_state.params) < 1e-10
    names = ("loss", "grad_norm", "grad_norm_fast", "fast_drift", "inner_clip_rate")
    for name in (*names, "fast_drift_layer0", "first_chunk_loss", "last_chunk_loss"):
        assert float(full[name]) == pytest.approx(float(accumulated[name]), rel=1e-9)


def test_step_is_compiled_once_and_donates_its_state(trainer):
    state = trainer.init_state(1)
    embedding = state.params.slow["embedding"]
    state, _ = take(trainer, state, 0)
    take(trainer, state, 1)
    assert trainer.step._cache_size() == 1
    assert embedding.is_deleted()


def test_initial_state_from_seed_or_weights(trainer):
    a, b, c = (numpy_of(trainer.init_state(seed).params) for seed in (0, 0, 1))
    assert worst(a, b) == 0
    assert worst(a, c) > 0.01
    from_weights = trainer.start_from(jax.tree.map(jnp.asarray, c))
    assert worst(from_weights.params, c) == 0
    assert int(from_weights.step) == int(from_weights.skipped) == 0
