"""State-space duality: both forms against the definition; extreme decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tttjax.ops.ssd import ssd, ssd_recurrent

pytestmark = pytest.mark.usefixtures("x64")

T, H, P, G, N = 11, 4, 3, 2, 5


def make_inputs(seed: int = 0) -> tuple[np.ndarray, ...]:
    """x [T, H, P], dt [T, H], a [H], b and c [T, G, N], skip [H], state [H, P, N] in float64."""
    rng = np.random.default_rng(seed)
    dt = rng.uniform(0.01, 1.0, size=(T, H))
    a = -rng.uniform(0.1, 3.0, size=H)
    x, b, c, skip, state = (
        rng.normal(size=size) for size in ((T, H, P), (T, G, N), (T, G, N), (H,), (H, P, N))
    )
    return x, dt, a, b, c, skip, state


def by_definition(x, dt, a, b, c, skip, state):
    """The recurrence, one head and one token at a time."""
    y, state = np.empty_like(x), state.copy()
    for t in range(len(x)):
        for h in range(H):
            group = h // (H // G)
            state[h] = np.exp(dt[t, h] * a[h]) * state[h] + dt[t, h] * np.outer(
                x[t, h], b[t, group]
            )
            y[t, h] = state[h] @ c[t, group] + skip[h] * x[t, h]
    return y, state


# Chunks that divide T and do not, one token, and one chunk for all; parallel and sequential.
FORMS = {
    "chunks of 4": lambda *args: ssd(*args, 4),
    "chunks of 4, two at once": lambda *args: ssd(*args, 4, chunks_per_segment=2),
    "chunks of 3, all at once": lambda *args: ssd(*args, 3, chunks_per_segment=100),
    "chunks of 1": lambda *args: ssd(*args, 1),
    "one chunk": lambda *args: ssd(*args, 100),
    "recurrent": ssd_recurrent,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_is_the_definition(form):
    inputs = make_inputs()
    for got, expected in zip(jax.jit(form)(*inputs), by_definition(*inputs), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-12)


def weighted(form):
    """A scalar function of both results with random weights."""
    rng = np.random.default_rng(1)
    cot_y, cot_state = rng.normal(size=(T, H, P)), rng.normal(size=(H, P, N))

    def total(inputs):
        y, state = form(*inputs)
        return (y * cot_y).sum() + (state * cot_state).sum()

    return total


@pytest.mark.parametrize("name", ["chunks of 4", "chunks of 4, two at once", "recurrent"])
def test_gradient_is_that_of_the_definition(name):
    """Against central differences of the numpy loop, along a random direction per input."""
    inputs = make_inputs()
    gradient = jax.jit(jax.grad(weighted(FORMS[name])))(inputs)
    loop, rng, step = weighted(by_definition), np.random.default_rng(2), 1e-5
    for index, value in enumerate(inputs):
        direction = rng.normal(size=value.shape)
        ahead, behind = (
            loop((*inputs[:index], value + sign * step * direction, *inputs[index + 1 :]))
            for sign in (1, -1)
        )
        derivative = float(jnp.sum(gradient[index] * direction))
        assert derivative == pytest.approx((ahead - behind) / (2 * step), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("form", [FORMS["chunks of 4"], ssd_recurrent], ids=["chunks", "tokens"])
def test_extreme_steps_leave_everything_finite(form):
    """dt of 0 and 1e8 side by side: decays of one and of zero, no inf and no nan."""
    x, dt, *rest = (jnp.asarray(value, jnp.float32) for value in make_inputs())
    dt = dt.at[2].set(1e8).at[3].set(0.0).at[9:].set(1e8)
    total, gradient = jax.jit(jax.value_and_grad(weighted(form)))((x, dt, *rest))
    assert jnp.isfinite(total)
    assert all(jnp.isfinite(leaf).all() for leaf in gradient)


def test_a_full_decay_preserves_later_precision():
    """In float32 a running sum of 1e6 has no digits left for the decays of 0.01 that follow."""
    x, dt, *rest = make_inputs()
    dt = np.full_like(dt, 0.01)
    dt[1] = 1e6
    x[1] = 0
    expected, _ = by_definition(x, dt, *rest)
    got, _ = jax.jit(FORMS["one chunk"])(*(jnp.float32(value) for value in (x, dt, *rest)))
    np.testing.assert_allclose(got[2:], expected[2:], atol=2e-5)


def test_bfloat16_is_near_float64_with_float32_state():
    inputs = make_inputs()
    x, dt, a, b, c, skip, state = (jnp.asarray(value, jnp.bfloat16) for value in inputs)
    args = x, dt.astype(jnp.float32), a, b, c, skip, state.astype(jnp.float32)
    expected, _ = by_definition(*(np.asarray(value, np.float64) for value in args))
    for form in (FORMS["chunks of 4"], ssd_recurrent):
        y, last = jax.jit(form)(*args)
        assert (y.dtype, last.dtype) == (jnp.bfloat16, jnp.float32)
        assert np.abs(np.asarray(y, np.float64) - expected).max() < 0.02 * np.abs(expected).max()


def test_no_tokens_change_nothing():
    x, dt, a, b, c, skip, state = map(jnp.asarray, make_inputs())
    y, last = ssd(x[:0], dt[:0], a, b[:0], c[:0], skip, state, 4)
    assert y.shape == (0, H, P)
    np.testing.assert_array_equal(last, state)
