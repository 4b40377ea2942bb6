"""Custom inner rules and losses in both forms, and what is refused."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.small import random_batch, shaken, small_config, worst

from tttjax.config.custom_code import CustomCode
from tttjax.errors import UserError
from tttjax.models.transformer import build_model
from tttjax.ops.cross_entropy.nll import masked_mean
from tttjax.ttt.custom_code import check_fast_rule, custom_loss, custom_rule
from tttjax.ttt.outer_loss import make_inner_loop, make_outer_loss
from tttjax.ttt.update_rules import make_rule

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow]


def mean_nll(chunk):
    return masked_mean(chunk.nll_C, chunk.mask_C)


def focal(chunk):
    """Weighs tokens by their loss, and has a term in states, head and fast weights."""
    probability_CV = jax.nn.softmax(chunk.h_CD @ chunk.head_DV)
    size = sum(jnp.sum(w**2) for w in jax.tree.leaves(chunk.fast))
    return masked_mean(chunk.nll_C**2, chunk.mask_C) + jnp.sum(probability_CV**3) + 0.1 * size


@cache
def setting():
    config = small_config()
    model = build_model(config.model, config.inner)
    params = shaken(jax.jit(model.init)(jax.random.key(0)))
    return model, make_inner_loop(config.inner), params, random_batch(config, masked=0.2)


def value_and_gradient(form, **changes):
    model, inner, params, batch = setting()
    loss = make_outer_loss(model, inner._replace(form=form, **changes), learn=True)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch, 0.7)


@pytest.mark.exhaustive
def test_both_forms_agree_for_a_custom_loss():
    rule = optax.chain(optax.scale_by_rss(eps=1.0), optax.scale(-0.5))
    (loss, output), grads = value_and_gradient("reference", loss=focal, rule=rule)
    (fast_loss, fast_output), fast_grads = value_and_gradient("fast", loss=focal, rule=rule)
    assert abs(loss - fast_loss) < 1e-12
    assert worst(output, fast_output) < 1e-10
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(grads))
    assert worst(grads, fast_grads) < 1e-11 * max(1.0, largest)
    # The outer loss is that of the next token, whatever is learned from.
    batch = setting()[-1]
    nll_BNC = output.token_nll_T.reshape(len(batch.mask), -1, 4)
    mean = masked_mean(nll_BNC, batch.mask.reshape(nll_BNC.shape))
    assert abs(jnp.mean(mean) - loss) < 1e-13


@pytest.mark.exhaustive
def test_the_mean_nll_as_custom_loss_changes_nothing():
    (loss, _), grads = value_and_gradient("fast")
    (custom, _), custom_grads = value_and_gradient("fast", loss=mean_nll)
    assert abs(loss - custom) < 1e-13
    assert worst(grads, custom_grads) < 1e-12


@pytest.mark.exhaustive
def test_a_custom_loss_without_targets_leaves_no_nan():
    """Here the softmax over no target."""
    model, inner, params, batch = setting()
    mask = np.array(batch.mask)
    mask[0, 4:8] = False
    batch = batch.replace(mask=mask)

    def surprise(c):
        scores_C = jnp.where(c.mask_C, jax.lax.stop_gradient(c.nll_C), -jnp.inf)
        return jnp.sum(c.nll_C * jax.nn.softmax(scores_C))

    results = []
    for form in ("reference", "fast"):
        loss = make_outer_loss(model, inner._replace(form=form, loss=surprise), learn=True)
        results.append(jax.jit(jax.grad(loss, has_aux=True))(params, batch, 0.7))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(results))
    assert worst(*(grads for grads, _ in results)) < 1e-11


@pytest.mark.parametrize("name", ["sgd", "momentum", "normalized_sgd", "adam", "muon"])
def test_no_built_in_rule_reads_the_weights(name):
    check_fast_rule(make_rule(name), setting()[2].fast)


@jax.custom_vjp
def only_reverse(x):
    return x * x


only_reverse.defvjp(lambda x: (x * x, x), lambda x, bar: (2 * x * bar,))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rule": optax.adamw(0.1)}, "inner rule reads the fast weights"),
        ({"loss": lambda c: only_reverse(jnp.sum(c.nll_C))}, "has no forward derivative"),
    ],
)
def test_what_the_fast_form_cannot_derive_is_refused(changes, words):
    with pytest.raises(UserError, match=f"{words}.*inner.form=reference"):
        value_and_gradient("fast", **changes)


def test_a_rate_from_outside_is_refused_by_the_fast_form():
    model, inner, params, batch = setting()

    def outer(rate, form):
        rule = optax.stateless(lambda g, _: jax.tree.map(lambda x: -rate * x, g))
        loss = make_outer_loss(model, inner._replace(rule=rule, form=form), learn=True)
        return loss(params, batch, 1.0)[0]

    with pytest.raises(UserError, match=r"traced value.*inner\.form=reference.*inner\.learn_lr"):
        jax.eval_shape(jax.grad(lambda rate: outer(rate, "fast")), 0.5)
    jax.eval_shape(jax.grad(lambda rate: outer(rate, "reference")), 0.5)


def code(rule=None, loss=None):
    return CustomCode("my.py", b"", rule, loss)


def test_what_is_no_rule_or_no_scalar_is_refused():
    with pytest.raises(UserError, match=r"inner_rule of my\.py returned float"):
        custom_rule(code(rule=lambda inner: inner.lr), small_config().inner)
    for bad in (lambda c: c.nll_C, lambda c: jnp.argmax(c.nll_C)):
        with pytest.raises(UserError, match=r"inner_loss of my\.py returned"):
            value_and_gradient("fast", loss=custom_loss(code(loss=bad)))
