"""The outer loss and its gradient, against a slow loop-only form and finite differences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers.reference import Shape, sequence
from helpers.small import random_batch, shaken, small_config, worst

from tttjax.models import build_model
from tttjax.ttt.outer_loss import exact_chunks, inner_lr, learns, make_inner_loop, make_outer_loss
from tttjax.types import Batch, Params

pytestmark = pytest.mark.usefixtures("x64")
LR = 0.7
CHUNKS = 3


@pytest.fixture(scope="module")
def config(x64):
    return small_config()


@pytest.fixture(scope="module")
def model(config):
    return build_model(config.model, config.inner)


@pytest.fixture(scope="module")
def params(model):
    return shaken(model.init(jax.random.key(0)))


@pytest.fixture(scope="module")
def batch(config):
    return random_batch(config)


def gradient_of(model, inner, learn=True):
    """Jitted: (params, batch, lr) -> ((loss, reading), gradient)."""
    return jax.jit(jax.value_and_grad(make_outer_loss(model, inner, learn=learn), has_aux=True))


@pytest.fixture(scope="module")
def gradients(config, model):
    """By how many of the last updates the gradient goes through; None: all."""
    inner = make_inner_loop(config.inner)
    return {m: gradient_of(model, inner._replace(exact_chunks=m)) for m in (None, 2, 0)}


def read_slowly(config, params, batch, frozen=()):
    """The reference on every sequence: a list of what it showed."""
    m = config.model
    shape = Shape(
        prefix_layers=m.num_layers - m.suffix_layers,
        layers=m.num_layers,
        window=m.window_size,
        theta=m.rope_theta,
        eps=m.norm_eps,
        chunk=config.inner.chunk_size,
        clip=config.inner.clip,
    )
    slow, fast = (flatten_dict(tree, sep="/") for tree in (params.slow, params.fast))
    return [
        sequence(
            slow,
            fast,
            *(np.asarray(x[i]) for x in (batch.inputs, batch.targets, batch.mask)),
            shape,
            LR,
            frozen[i] if frozen else (),
        )
        for i in range(len(batch.inputs))
    ]


def mean_loss(shown):
    return float(np.mean([np.mean(one["loss"]) for one in shown]))


@pytest.fixture(scope="module")
def slow_reading(config, params, batch):
    return read_slowly(config, params, batch)


def test_loss_nll_and_inner_norms_equal_the_slow_form(gradients, params, batch, slow_reading):
    (loss, reading), _ = gradients[None](params, batch, LR)
    assert float(loss) == pytest.approx(mean_loss(slow_reading), abs=1e-12)
    for i, shown in enumerate(slow_reading):
        np.testing.assert_allclose(reading.chunk_loss_N[i], shown["loss"], atol=1e-12)
        np.testing.assert_allclose(reading.token_nll_T[i], np.ravel(shown["nll"]), atol=1e-12)
        np.testing.assert_allclose(reading.grad_norm_N[i], shown["grad_norm"], atol=1e-12)
    norms = np.asarray(reading.grad_norm_N)
    assert norms.min() < 1 < norms.max(), "some chunks must be clipped, some not"


def test_fast_weights_and_drift_equal_the_slow_form(gradients, params, batch, slow_reading):
    (_, reading), _ = gradients[None](params, batch, LR)
    final = flatten_dict(reading.fast, sep="/")
    start = flatten_dict(params.fast, sep="/")
    for i, shown in enumerate(slow_reading):
        moved = {k: sum(update[k] for update in shown["update"]) for k in start}
        for name in start:
            np.testing.assert_allclose(final[name][i], start[name] + moved[name], atol=1e-12)
        drift = np.sqrt(sum((a**2).sum() for a in moved.values()))
        assert float(reading.drift[i]) == pytest.approx(float(drift), abs=1e-12)
        assert np.linalg.norm(reading.layer_drift_L[i]) == pytest.approx(float(drift), abs=1e-12)


def direction_like(tree, seed):
    rng = np.random.default_rng(seed)
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [jnp.asarray(rng.normal(size=x.shape)) for x in leaves])


def along(params, direction, size):
    return jax.tree.map(lambda x, d: x + size * d, params, direction)


@pytest.mark.parametrize(
    ("m", "part"),
    [(None, "slow"), (None, "fast"), (2, "fast"), (0, "slow")],
    ids=["exact-slow", "exact-fast", "truncated-fast", "first_order-slow"],
)
def test_gradient_equals_finite_differences_of_the_slow_form(
    config, params, batch, gradients, slow_reading, m, part
):
    """Truncated to m: the first updates stay what they are, whatever the weights become."""
    zero = jax.tree.map(jnp.zeros_like, params)
    direction = zero.replace(**{part: direction_like(getattr(params, part), seed=1)})
    kept = CHUNKS if m == 0 else CHUNKS - m if m else 0
    frozen = [shown["update"][:kept] for shown in slow_reading]
    size = 1e-5
    plus, minus = (
        mean_loss(read_slowly(config, along(params, direction, sign * size), batch, frozen))
        for sign in (1, -1)
    )
    _, grads = gradients[m](params, batch, LR)
    products = jax.tree.map(lambda g, d: float(jnp.vdot(g, d)), grads, direction)
    expected = (plus - minus) / (2 * size)
    assert sum(jax.tree.leaves(products)) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_the_choices_differ_and_end_in_each_other(config, model, gradients, params, batch):
    by_m = {m: f(params, batch, LR)[1] for m, f in gradients.items()}
    assert worst(by_m[None], by_m[0]) > 1e-3
    assert worst(by_m[None], by_m[2]) > 1e-4
    assert worst(by_m[2], by_m[0]) > 1e-4

    def program(m):
        inner = make_inner_loop(config.inner)._replace(exact_chunks=m)
        loss = make_outer_loss(model, inner, learn=True)
        return str(jax.make_jaxpr(jax.grad(lambda *a: loss(*a)[0]))(params, batch, LR))

    assert program(CHUNKS) == program(None)  # truncated to all chunks is exact
    assert exact_chunks("first_order", 0) == 0
    assert exact_chunks("truncated", 2) == 2
    assert exact_chunks("exact", 0) is None


def test_the_loss_does_not_depend_on_the_choice(gradients, params, batch):
    losses = [float(f(params, batch, LR)[0][0]) for f in gradients.values()]
    np.testing.assert_allclose(losses, losses[0], atol=1e-13)


def test_rematerialisation_changes_nothing(config, model, gradients, params, batch):
    inner = make_inner_loop(config.inner)._replace(remat=True)
    remat_model = dataclasses.replace(model, remat=True)
    (loss, _), grads = gradient_of(remat_model, inner)(params, batch, LR)
    (expected, _), expected_grads = gradients[None](params, batch, LR)
    assert float(loss) == pytest.approx(float(expected), abs=1e-13)
    assert worst(grads, expected_grads) < 1e-12


def test_without_steps_it_is_the_static_model(config, model, gradients, params, batch):
    (loss, reading), grads = gradients[None](params, batch, 0.0)
    static = gradient_of(model, make_inner_loop(config.inner), learn=False)
    (expected, static_reading), static_grads = static(params, batch, LR)
    assert float(loss) == pytest.approx(float(expected), abs=1e-13)
    np.testing.assert_allclose(reading.token_nll_T, static_reading.token_nll_T, atol=1e-12)
    assert worst(grads, static_grads) < 1e-12
    assert worst(reading.drift, jnp.zeros(2)) == 0
    assert not learns(model, "none")
    assert learns(model, "exact")


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_a_chunk_without_targets_has_a_finite_gradient_and_teaches_nothing(
    gradients, params, batch, chunk
):
    """The derivative of the clip's norm at zero must not reach the outer gradient."""
    mask = np.array(batch.mask)
    mask[:, 4 * chunk : 4 * chunk + 4] = False
    (loss, reading), grads = gradients[None](params, batch.replace(mask=mask), LR)
    assert np.isfinite(float(loss))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert float(reading.chunk_loss_N[0, chunk]) == 0
    assert float(reading.grad_norm_N[0, chunk]) == 0


def test_a_chunk_without_targets_equals_leaving_its_update_out(config, params, batch, gradients):
    mask = np.array(batch.mask)
    mask[:, 4:8] = False
    masked = batch.replace(mask=mask)
    nothing = {k: jnp.zeros_like(v) for k, v in flatten_dict(params.fast, sep="/").items()}
    first = [shown["update"][:1] for shown in read_slowly(config, params, masked)]
    frozen = [[*updates, nothing] for updates in first]
    slow = read_slowly(config, params, masked, frozen)
    (_, reading), _ = gradients[None](params, masked, LR)
    np.testing.assert_allclose(reading.token_nll_T[0], np.ravel(slow[0]["nll"]), atol=1e-12)


def test_all_masked_is_zero_loss_and_zero_gradient(gradients, params, batch):
    nothing = batch.replace(mask=np.zeros_like(batch.mask))
    (loss, reading), grads = gradients[None](params, nothing, LR)
    assert float(loss) == 0
    assert worst(grads, jax.tree.map(jnp.zeros_like, grads)) == 0
    assert worst(reading.drift, jnp.zeros(2)) == 0


def test_sequences_learn_apart(gradients, params, batch):
    """One sequence's reading does not depend on what else is in the batch."""
    swapped = jax.tree.map(lambda x: x[::-1], batch)
    (_, a), _ = gradients[None](params, batch, LR)
    (_, b), _ = gradients[None](params, swapped, LR)
    np.testing.assert_allclose(a.token_nll_T, b.token_nll_T[::-1], atol=1e-13)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.1 + 0.9 / 4), (1, 0.55), (3, 1.0), (4, 1.0), (10**9, 1.0)]
)
def test_the_inner_rate_ramps_from_the_first_step_on(step, expected):
    got = inner_lr(step, lr=1.0, lr_init=0.1, warmup_steps=4)
    assert float(got) == pytest.approx(expected, abs=1e-12)


def test_without_warmup_the_inner_rate_is_constant():
    assert inner_lr(0, lr=0.3, lr_init=0.1, warmup_steps=0) == 0.3


def test_params_travel_as_two_disjoint_trees(params):
    slow, fast = flatten_dict(params.slow), flatten_dict(params.fast)
    assert not set(slow) & set(fast)
    assert {"/".join(k).split("/")[-2] for k in fast} == {"fast_mlp"}
    assert isinstance(Params(unflatten_dict(slow), unflatten_dict(fast)), Params)


def test_a_batch_is_three_arrays(batch):
    assert isinstance(batch, Batch)
    assert batch.inputs.shape == batch.targets.shape == batch.mask.shape
