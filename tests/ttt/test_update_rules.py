"""Inner rules: values against hand computations and optax, derivatives finite everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tttjax.config import schema
from tttjax.ttt.update_rules import (
    RULES,
    clip_by_global_norm,
    global_norm,
    make_rule,
    normalize_by_global_norm,
)

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow]


def make_tree(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        "a": jnp.asarray(scale * rng.normal(size=(2, 4, 3))),
        "b": jnp.asarray(scale * rng.normal(size=5)),
    }


def updates_of(rule, gradients):
    state, out = rule.init(gradients[0]), []
    for g in gradients:
        u, state = rule.update(g, state, gradients[0])
        out.append(u)
    return out


def norm_of(tree):
    return np.sqrt(sum(float((np.asarray(x) ** 2).sum()) for x in tree.values()))


def assert_close(a, b, atol=1e-12):
    for k in b:
        np.testing.assert_allclose(a[k], b[k], atol=atol)


def test_global_norm_and_its_derivative_at_zero():
    tree = make_tree()
    assert float(global_norm(tree)) == pytest.approx(norm_of(tree), rel=1e-12)
    zero = jax.tree.map(jnp.zeros_like, tree)
    assert float(global_norm(zero)) == 0
    assert_close(jax.grad(global_norm)(zero), zero)


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clip_has_optax_value(max_norm):
    tree = make_tree()
    result, _ = clip_by_global_norm(max_norm).update(tree, optax.EmptyState())
    expected, _ = optax.clip_by_global_norm(max_norm).update(tree, optax.EmptyState())
    assert_close(result, expected)


def test_clip_uses_the_norm_of_all_arrays():
    tree = make_tree()
    result, _ = clip_by_global_norm(0.5).update(tree, optax.EmptyState())
    assert norm_of(result) == pytest.approx(0.5, rel=1e-12)
    assert_close(result, {k: v * (0.5 / norm_of(tree)) for k, v in tree.items()})
    small = make_tree(scale=1e-3)
    same, _ = clip_by_global_norm(0.5).update(small, optax.EmptyState())
    for k in small:
        np.testing.assert_array_equal(same[k], small[k])


def test_clip_derivative_includes_its_norm():
    """d(g c/|g|) along g is 0: a longer gradient gives the same clipped one."""
    tree = make_tree()

    def clipped(size):
        scaled = jax.tree.map(lambda x: size * x, tree)
        return clip_by_global_norm(0.5).update(scaled, optax.EmptyState())[0]

    _, tangent = jax.jvp(clipped, (1.0,), (1.0,))
    assert norm_of(tangent) < 1e-12


def test_sgd_without_clip_is_minus_the_gradient():
    tree = make_tree(scale=100.0)
    assert_close(
        updates_of(make_rule("sgd", clip=0.0), [tree])[0], jax.tree.map(jnp.negative, tree)
    )


def test_momentum_is_heavy_ball_of_clipped_gradients():
    gradients = [make_tree(seed, scale=2.0) for seed in range(3)]
    result = updates_of(make_rule("momentum", clip=1.0, momentum=0.8), gradients)
    m = dict.fromkeys(gradients[0], 0)
    for u, g in zip(result, gradients, strict=True):
        m = {k: 0.8 * m[k] + g[k] / norm_of(g) for k in g}
        assert_close(u, {k: -m[k] for k in m})


@pytest.mark.parametrize(("clip", "length"), [(0.0, 1.0), (0.25, 0.25)])
def test_normalised_steps_have_one_length(clip, length):
    for scale in (1e-6, 1.0, 1e6):
        (u,) = updates_of(make_rule("normalized_sgd", clip=clip), [make_tree(scale=scale)])
        assert norm_of(u) == pytest.approx(length, rel=1e-9)
    zero = jax.tree.map(jnp.zeros_like, make_tree())
    assert norm_of(normalize_by_global_norm(1.0).update(zero, optax.EmptyState())[0]) == 0


def test_adam_is_optax_adam():
    gradients = [make_tree(seed) for seed in range(3)]
    result = updates_of(make_rule("adam", clip=0.0, b1=0.8, b2=0.9, eps=1e-6), gradients)
    expected = updates_of(optax.adam(1.0, b1=0.8, b2=0.9, eps=1e-6), gradients)
    for u, w in zip(result, expected, strict=True):
        assert_close(u, w, atol=1e-8)


def test_muon_makes_every_matrix_of_stack_near_orthogonal():
    (u,) = updates_of(make_rule("muon", clip=0.0), [make_tree()])
    for matrix in np.asarray(u["a"]):
        singular = np.linalg.svd(matrix, compute_uv=False)
        assert singular.max() / singular.min() < 2.5
    first = np.abs(u["b"])  # vectors follow Adam, whose first step is the same for all entries
    np.testing.assert_allclose(first, first[0], rtol=1e-5)
    np.testing.assert_array_equal(np.sign(u["b"]), -np.sign(make_tree()["b"]))
    grown = updates_of(make_rule("muon", clip=0.0), [make_tree(scale=50.0)])[0]
    assert_close(grown, u, atol=1e-3)


@pytest.mark.parametrize("where", ["everywhere", "one array"])
@pytest.mark.parametrize("name", RULES)
def test_derivatives_are_finite_at_zero_gradients(name, where):
    tree = make_tree()
    zero = jax.tree.map(jnp.zeros_like, tree)
    if where == "one array":
        zero = {**tree, "a": zero["a"]}
    rule = make_rule(name)

    def summed(g):
        u, _ = rule.update(g, rule.init(g), g)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(u))

    for leaf in jax.tree.leaves(jax.grad(summed)(zero)):
        assert np.isfinite(leaf).all()


def test_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="unknown inner rule 'sdg'"):
        make_rule("sdg")


def test_configuration_offers_every_rule():
    assert (*RULES, "custom") == schema.RULES
