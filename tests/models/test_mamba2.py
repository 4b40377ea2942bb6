"""The Mamba-2 layer against its definition, in parts, its limits and initial weights."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tttjax.config import ModelConfig
from tttjax.errors import UserError
from tttjax.models.mamba2.config import Mamba2Config
from tttjax.models.mamba2.layer import Mamba2

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow]

T, D, H, P, G, N, J = 10, 6, 4, 3, 2, 5, 4
SIZES = Mamba2Config(head_dim=P, state_size=N, groups=G)
MODEL = ModelConfig(
    embed_dim=D, mamba2=SIZES, conv_size=J, scan_chunk=4, init_std=0.4, param_dtype="float64"
)


def make_layer(sizes=SIZES, **changes):
    """A layer and its weights with noise on all, so that no bias is 0 and no scale is 1.

    Steps are of order 1, where each token writes and erases much.
    """
    graphdef, weights = nnx.split(make_mamba2(mamba2=sizes, **changes))
    rng = np.random.default_rng(0)
    weights = jax.tree.map(
        lambda w: w + jnp.asarray(0.3 * rng.normal(size=w.shape), w.dtype),
        nnx.to_pure_dict(weights),
    )
    weights["dt_bias"] = jnp.asarray(rng.normal(size=H), weights["dt_bias"].dtype)
    return lambda weights: nnx.merge(graphdef, weights), weights


def make_mamba2(**changes):
    return Mamba2("mamba2", replace(MODEL, **changes), nnx.Rngs(0))


def make_input(length: int = T) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(length, D))


def silu(x):
    return x / (1 + np.exp(-x))


def by_definition(w, x, limits=(0, np.inf), eps=1e-5):
    """The layer one token at a time, in float64."""
    w = {name: np.asarray(value, np.float64) for name, value in w.items()}
    inputs = {name: np.zeros((J, *w[f"w{name}"].shape[1:])) for name in "xbc"}
    state, outputs = np.zeros((H, P, N)), []
    for token in x:
        now = {}
        for name in "xbc":
            new = np.tensordot(token, w[f"w{name}"], 1)
            inputs[name] = np.concatenate([inputs[name][1:], new[None]])
            mixed = (inputs[name] * w[f"conv_{name}"]).sum(0) + w[f"conv_{name}_bias"]
            now[name] = silu(mixed)
        dt = np.clip(np.log1p(np.exp(token @ w["wdt"] + w["dt_bias"])), *limits)
        z = np.tensordot(token, w["wz"], 1)
        y = np.empty((H, P))
        for h in range(H):
            b, c = now["b"][h // (H // G)], now["c"][h // (H // G)]
            decay = np.exp(-dt[h] * np.exp(w["a_log"][h]))
            state[h] = decay * state[h] + dt[h] * np.outer(now["x"][h], b)
            y[h] = state[h] @ c + w["skip"][h] * now["x"][h]
        gated = (y * silu(z)).reshape(G, -1)
        normed = gated / np.sqrt((gated**2).mean(-1, keepdims=True) + eps)
        outputs.append(np.einsum("hp,hpd->d", normed.reshape(H, P) * w["norm"], w["wo"]))
    return np.stack(outputs)


@pytest.mark.parametrize("limits", [(), (0.4, 0.6)], ids=["no limits", "limits"])
def test_equals_the_definition(limits):
    layer, weights = make_layer(replace(SIZES, dt_limits=limits))
    x = make_input()
    y, state = jax.jit(lambda w, x: layer(w)(x, None, 0))(weights, x)
    assert state is None
    np.testing.assert_allclose(y, by_definition(weights, x, limits or (0, np.inf)), atol=1e-12)


def test_limits_clip_steps_on_both_sides():
    """Else a layer without limits would pass the test of the definition."""
    layer, weights = make_layer(replace(SIZES, dt_limits=(0.4, 0.6)))
    free, _ = make_layer()
    x = jnp.asarray(make_input())
    limited_TH, dt_TH = layer(weights)._step_sizes(x), free(weights)._step_sizes(x)
    assert (dt_TH < 0.4).any()
    assert (dt_TH > 0.6).any()
    np.testing.assert_array_equal(limited_TH, np.clip(dt_TH, 0.4, 0.6))


def test_gradient_equals_the_definition():
    """By central differences of the numpy loop, along a random direction for each weight."""
    layer, weights = make_layer()
    rng, x, step = np.random.default_rng(3), jnp.asarray(make_input()), 1e-5
    cot = rng.normal(size=(T, D))
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(layer(w)(x, None, 0)[0] * cot)))(weights)
    for name, value in weights.items():
        direction = rng.normal(size=value.shape)
        ahead, behind = (
            (by_definition({**weights, name: value + sign * step * direction}, x) * cot).sum()
            for sign in (1, -1)
        )
        derivative = float(jnp.sum(gradient[name] * direction))
        assert derivative == pytest.approx((ahead - behind) / (2 * step), rel=1e-6, abs=1e-7), name


@pytest.mark.parametrize("cuts", [(1,) * T, (3, 1, 6), (7, 3)], ids=["tokens", "mixed", "two"])
def test_any_split_gives_the_same(cuts):
    layer, weights = make_layer()
    empty, x = layer(weights).init_state(T, jnp.float64), jnp.asarray(make_input())
    read = jax.jit(lambda x, state, position: layer(weights)(x, state, position))
    full, last = read(x, empty, 0)
    np.testing.assert_allclose(full, by_definition(weights, x), atol=1e-12)
    state, outputs, start = empty, [], 0
    for size in cuts:
        y, state = read(x[start : start + size], state, jnp.int32(start))
        outputs.append(y)
        start += size
    np.testing.assert_allclose(jnp.concatenate(outputs), full, atol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), state, last)


def test_state_is_float32_and_does_not_grow():
    module = make_mamba2(param_dtype="bfloat16")
    state = module.init_state(10, jnp.bfloat16)
    assert {name: (a.shape, a.dtype.name) for name, a in state.items()} == {
        "ssm": ((H, P, N), "float32"),
        "conv_x": ((J - 1, H, P), "bfloat16"),
        "conv_b": ((J - 1, G, N), "bfloat16"),
        "conv_c": ((J - 1, G, N), "bfloat16"),
    }
    _, after = jax.eval_shape(module, jnp.asarray(make_input(), jnp.bfloat16), state, 0)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, module.init_state(10**6, "f4"))
    assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, state)


def test_bfloat16_is_finite_with_its_gradient():
    layer, weights = make_layer(param_dtype="float32")

    def total(weights, x):
        return jnp.sum(layer(weights)(x, None, 0)[0].astype(jnp.float32))

    step = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    for scale in (0.0, 1.0, 1e4):
        value, gradient = step(weights, jnp.asarray(scale * make_input(), jnp.bfloat16))
        assert jnp.isfinite(value)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_initial_weights():
    """Step sizes within [1e-3, 0.1] and rates within [1, 16], spread over those ranges."""
    wide = make_mamba2(embed_dim=256, mamba2=replace(SIZES, head_dim=1), param_dtype="float32")
    dt, rate = jax.nn.softplus(wide.dt_bias[...]), jnp.exp(wide.a_log[...])
    assert dt.min() > 0.999e-3
    assert dt.max() < 0.1001
    assert 0.008 < float(jnp.median(dt)) < 0.0125  # log-uniform: the geometric mean is 0.01
    assert rate.min() > 0.999
    assert rate.max() < 16.001
    assert 7.5 < float(rate.mean()) < 9.5
    taps = wide.conv_x[...]
    assert 0.49 < float(jnp.abs(taps).max()) <= 0.5
    assert float(wide.wx[...].std()) == pytest.approx(MODEL.init_std, rel=0.01)
    assert (wide.skip[...] == 1).all()
    assert (wide.norm[...] == 1).all()
    assert not wide.conv_x_bias[...].any()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"head_dim": 5}, "not a multiple of model.mamba2.head_dim = 5"),
        ({"groups": 3}, "4 heads .*not a multiple of model.mamba2.groups = 3"),
        ({"dt_limits": (0.1,)}, "smallest and the largest time step"),
        ({"dt_limits": (0.2, 0.1)}, "smallest and the largest time step"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        replace(SIZES, **changes).check(MODEL)
