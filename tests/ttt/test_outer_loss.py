"""The outer loss and its gradient, against a slow loop-only form and finite differences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers.exhaustive import only
from helpers.reference import Shape, sequence
from helpers.small import random_batch, shaken, small_config, worst

from tttjax.models.transformer import build_model
from tttjax.ttt.outer_loss import (
    exact_chunks,
    inner_lr,
    learns,
    make_forward,
    make_inner_loop,
    make_outer_loss,
    normalise_weights,
)
from tttjax.types import Batch, Params

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow]
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
    """Jitted: (params, batch, lr) -> ((loss, output), gradient)."""
    return jax.jit(jax.value_and_grad(make_outer_loss(model, inner, learn=learn), has_aux=True))


@pytest.fixture(scope="module")
def gradients(config, model):
    """By the number of last updates that the gradient goes through; None: all."""
    inner = make_inner_loop(config.inner)
    return {m: gradient_of(model, inner._replace(exact_chunks=m)) for m in (None, 2, 0)}


def run_reference(config, params, batch, frozen=()):
    """The results of the reference for every sequence."""
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


def mean_loss(results):
    return float(np.mean([np.mean(one["loss"]) for one in results]))


@pytest.fixture(scope="module")
def reference(config, params, batch):
    return run_reference(config, params, batch)


def test_loss_nll_and_inner_norms_equal_the_reference(gradients, params, batch, reference):
    (loss, output), _ = gradients[None](params, batch, LR)
    assert float(loss) == pytest.approx(mean_loss(reference), abs=1e-12)
    for i, result in enumerate(reference):
        np.testing.assert_allclose(output.chunk_loss_N[i], result["loss"], atol=1e-12)
        np.testing.assert_allclose(output.token_nll_T[i], np.ravel(result["nll"]), atol=1e-12)
        np.testing.assert_allclose(output.grad_norm_N[i], result["grad_norm"], atol=1e-12)
    norms = np.asarray(output.grad_norm_N)
    assert norms.min() < 1 < norms.max(), "some chunks must be clipped, some not"


def test_fast_weights_and_drift_equal_the_reference(gradients, params, batch, reference):
    (_, output), _ = gradients[None](params, batch, LR)
    final = flatten_dict(output.fast, sep="/")
    start = flatten_dict(params.fast, sep="/")
    for i, result in enumerate(reference):
        change = {k: sum(update[k] for update in result["update"]) for k in start}
        for name in start:
            np.testing.assert_allclose(final[name][i], start[name] + change[name], atol=1e-12)
        drift = np.sqrt(sum((a**2).sum() for a in change.values()))
        assert float(output.drift[i]) == pytest.approx(float(drift), abs=1e-12)
        assert np.linalg.norm(output.layer_drift_L[i]) == pytest.approx(float(drift), abs=1e-12)


def direction_like(tree, seed):
    rng = np.random.default_rng(seed)
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [jnp.asarray(rng.normal(size=x.shape)) for x in leaves])


def along(params, direction, size):
    return jax.tree.map(lambda x, d: x + size * d, params, direction)


@pytest.mark.parametrize(
    ("m", "part"),
    only([(None, "slow"), (2, "fast")], [(None, "slow"), (None, "fast"), (2, "fast"), (0, "slow")]),
    ids=["exact-slow", "exact-fast", "truncated-fast", "first_order-slow"],
)
def test_gradient_equals_finite_differences_of_the_reference(
    config, params, batch, gradients, reference, m, part
):
    """Truncated to m: the first updates are constants."""
    zero = jax.tree.map(jnp.zeros_like, params)
    direction = zero.replace(**{part: direction_like(getattr(params, part), seed=1)})
    constant = CHUNKS if m == 0 else CHUNKS - m if m else 0
    frozen = [result["update"][:constant] for result in reference]
    size = 1e-5
    plus, minus = (
        mean_loss(run_reference(config, along(params, direction, sign * size), batch, frozen))
        for sign in (1, -1)
    )
    _, grads = gradients[m](params, batch, LR)
    products = jax.tree.map(lambda g, d: float(jnp.vdot(g, d)), grads, direction)
    expected = (plus - minus) / (2 * size)
    assert sum(jax.tree.leaves(products)) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_truncations_differ_and_reach_the_exact_gradient(config, model, gradients, params, batch):
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


def test_loss_does_not_depend_on_truncation(gradients, params, batch):
    losses = [float(f(params, batch, LR)[0][0]) for f in gradients.values()]
    np.testing.assert_allclose(losses, losses[0], atol=1e-13)


def test_rematerialisation_changes_nothing(config, model, gradients, params, batch):
    inner = make_inner_loop(config.inner)._replace(remat=True)
    model_config = dataclasses.replace(config.model, remat="block")
    remat_model = build_model(model_config, config.inner)
    (loss, _), grads = gradient_of(remat_model, inner)(params, batch, LR)
    (expected, _), expected_grads = gradients[None](params, batch, LR)
    assert float(loss) == pytest.approx(float(expected), abs=1e-13)
    assert worst(grads, expected_grads) < 1e-12


def test_learning_rate_zero_equals_the_static_model(config, model, gradients, params, batch):
    (loss, output), grads = gradients[None](params, batch, 0.0)
    static = gradient_of(model, make_inner_loop(config.inner), learn=False)
    (expected, static_output), static_grads = static(params, batch, LR)
    assert float(loss) == pytest.approx(float(expected), abs=1e-13)
    np.testing.assert_allclose(output.token_nll_T, static_output.token_nll_T, atol=1e-12)
    assert worst(grads, static_grads) < 1e-12
    assert worst(output.drift, jnp.zeros(2)) == 0
    assert not learns(model, "none")
    assert learns(model, "exact")


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_chunk_without_targets_has_finite_gradient(gradients, params, batch, chunk):
    """The derivative of the clip's norm at zero must not reach the outer gradient."""
    mask = np.array(batch.mask)
    mask[:, 4 * chunk : 4 * chunk + 4] = False
    (loss, output), grads = gradients[None](params, batch.replace(mask=mask), LR)
    assert np.isfinite(float(loss))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert float(output.chunk_loss_N[0, chunk]) == 0
    assert float(output.grad_norm_N[0, chunk]) == 0


def test_chunk_without_targets_has_no_update(config, params, batch, gradients):
    mask = np.array(batch.mask)
    mask[:, 4:8] = False
    masked = batch.replace(mask=mask)
    zero = {k: jnp.zeros_like(v) for k, v in flatten_dict(params.fast, sep="/").items()}
    first = [result["update"][:1] for result in run_reference(config, params, masked)]
    frozen = [[*updates, zero] for updates in first]
    slow = run_reference(config, params, masked, frozen)
    (_, output), _ = gradients[None](params, masked, LR)
    np.testing.assert_allclose(output.token_nll_T[0], np.ravel(slow[0]["nll"]), atol=1e-12)


def test_all_masked_is_zero_loss_and_zero_gradient(gradients, params, batch):
    masked = batch.replace(mask=np.zeros_like(batch.mask))
    (loss, output), grads = gradients[None](params, masked, LR)
    assert float(loss) == 0
    assert worst(grads, jax.tree.map(jnp.zeros_like, grads)) == 0
    assert worst(output.drift, jnp.zeros(2)) == 0


def weighted(batch, masked=0.6):
    """The batch with weights, which the first chunk and most other targets do not have."""
    weight = (np.random.default_rng(3).random(batch.mask.shape) >= masked) & batch.mask
    weight[:, :4] = False
    weight[1, 5:] = False
    return batch.replace(weight=weight)


@pytest.mark.parametrize("form", only(["fast"], ["reference", "fast", "static"]))
def test_weights_give_the_mean_over_the_chosen_targets(
    config, model, params, batch, reference, form
):
    """Loss and gradient are those of a sum by hand; the inner loop sees all targets."""
    batch = weighted(batch)
    chosen = np.argwhere(batch.weight)
    learn, inner = form != "static", make_inner_loop(config.inner)
    if learn:
        inner = inner._replace(form=form)
    forward = make_forward(model, inner, learn=learn)

    def by_hand(params):
        nll_BT = forward(params, batch.replace(weight=None), LR).token_nll_T
        return sum(nll_BT[i, t] for i, t in chosen) / len(chosen)

    expected, expected_grads = jax.jit(jax.value_and_grad(by_hand))(params)
    (loss, output), grads = gradient_of(model, inner, learn)(params, normalise_weights(batch), LR)
    assert float(loss) == pytest.approx(float(expected), abs=1e-12)
    assert worst(grads, expected_grads) < 1e-12
    if learn:
        nll_BT = np.array([np.ravel(result["nll"]) for result in reference])
        assert float(loss) == pytest.approx(nll_BT[batch.weight].mean(), abs=1e-12)
        np.testing.assert_allclose(output.grad_norm_N[1], reference[1]["grad_norm"], atol=1e-12)


def test_a_sequence_without_weight_adds_nothing(gradients, params, batch):
    batch = weighted(batch)
    weight = np.array(batch.weight)
    weight[1] = False
    of_both = gradients[None](params, normalise_weights(batch.replace(weight=weight)), LR)
    first = jax.tree.map(lambda x: x[:1], batch)
    of_first = gradients[None](params, normalise_weights(first), LR)
    assert float(of_both[0][0]) == pytest.approx(float(of_first[0][0]), abs=1e-13)
    assert worst(of_both[1], of_first[1]) < 1e-13
    nothing = batch.replace(weight=np.zeros_like(weight))
    (loss, _), grads = gradients[None](params, normalise_weights(nothing), LR)
    assert float(loss) == 0
    assert worst(grads, jax.tree.map(jnp.zeros_like, grads)) == 0


def test_sequences_of_a_batch_are_independent(gradients, params, batch):
    """A sequence's result does not depend on the rest of the batch."""
    swapped = jax.tree.map(lambda x: x[::-1], batch)
    (_, a), _ = gradients[None](params, batch, LR)
    (_, b), _ = gradients[None](params, swapped, LR)
    np.testing.assert_allclose(a.token_nll_T, b.token_nll_T[::-1], atol=1e-13)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.1 + 0.9 / 4), (1, 0.55), (3, 1.0), (4, 1.0), (10**9, 1.0)]
)
def test_inner_rate_ramps_from_the_first_step(step, expected):
    result = inner_lr(step, lr=1.0, lr_init=0.1, warmup_steps=4)
    assert float(result) == pytest.approx(expected, abs=1e-12)


def test_without_warmup_the_inner_rate_is_constant():
    assert inner_lr(0, lr=0.3, lr_init=0.1, warmup_steps=0) == 0.3


def test_params_are_two_disjoint_trees(params):
    slow, fast = flatten_dict(params.slow), flatten_dict(params.fast)
    assert not set(slow) & set(fast)
    assert {"/".join(k).split("/")[-2] for k in fast} == {"fast_mlp"}
    assert isinstance(Params(unflatten_dict(slow), unflatten_dict(fast)), Params)


def test_a_batch_is_three_arrays(batch):
    assert isinstance(batch, Batch)
    assert len(jax.tree.leaves(normalise_weights(batch))) == 3
    assert batch.inputs.shape == batch.targets.shape == batch.mask.shape
