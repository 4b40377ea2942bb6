"""The short convolution against numpy, split over calls, with several channel axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tttjax.ops.short_conv import short_conv

pytestmark = pytest.mark.usefixtures("x64")

LENGTH, TAPS, CHANNELS = 9, 4, (2, 3)


@pytest.fixture
def arrays():
    """x [T, 2, 3], kernel [J, 2, 3], bias [2, 3]"""
    rng = np.random.default_rng(0)
    return tuple(
        rng.normal(size=size) for size in ((LENGTH, *CHANNELS), (TAPS, *CHANNELS), CHANNELS)
    )


def by_channel(x, kernel, bias, previous):
    """numpy's own convolution, which flips the kernel, channel by channel."""
    x = np.concatenate([previous, x])
    out = np.empty((len(x) - len(previous), *CHANNELS))
    for channel in np.ndindex(*CHANNELS):
        index = (slice(None), *channel)
        out[index] = np.convolve(x[index], kernel[::-1][index], "valid") + bias[channel]
    return out


def test_equals_causal_convolution_in_numpy(arrays):
    x, kernel, bias = arrays
    y, state = short_conv(*map(jnp.asarray, arrays), None)
    np.testing.assert_allclose(
        y, by_channel(x, kernel, bias, np.zeros((TAPS - 1, *CHANNELS))), atol=1e-12
    )
    assert state is None
    only_last = np.zeros_like(kernel)
    only_last[-1] = 1
    np.testing.assert_array_equal(short_conv(jnp.asarray(x), only_last, None, None)[0], x)


@pytest.mark.parametrize("lengths", [(1, 1, 1, 6), (2, 0, 7), (5, 4), (9,)], ids=str)
def test_any_split_gives_the_same(arrays, lengths):
    x, kernel, bias = map(jnp.asarray, arrays)
    previous = np.random.default_rng(1).normal(size=(TAPS - 1, *CHANNELS))
    state, outputs, start = jnp.asarray(previous), [], 0
    for size in lengths:
        y, state = short_conv(x[start : start + size], kernel, bias, state)
        outputs.append(y)
        start += size
    np.testing.assert_allclose(jnp.concatenate(outputs), by_channel(*arrays, previous), atol=1e-12)
    np.testing.assert_array_equal(state, np.concatenate([previous, arrays[0]])[-(TAPS - 1) :])


def test_gradient_is_the_transposed_convolution(arrays):
    x, kernel, bias = map(jnp.asarray, arrays)
    cot = np.random.default_rng(2).normal(size=x.shape)

    def total(x, kernel, bias):
        return jnp.sum(short_conv(x, kernel, bias, None)[0] * cot)

    dx, dkernel, dbias = jax.grad(total, argnums=(0, 1, 2))(x, kernel, bias)
    padded_x = np.concatenate([np.zeros((TAPS - 1, *CHANNELS)), arrays[0]])
    padded_cot = np.concatenate([cot, np.zeros((TAPS - 1, *CHANNELS))])
    for tap in range(TAPS):
        np.testing.assert_allclose(
            dkernel[tap], np.sum(padded_x[tap : tap + LENGTH] * cot, axis=0), atol=1e-12
        )
    expected_dx = sum(
        arrays[1][TAPS - 1 - back] * padded_cot[back : back + LENGTH] for back in range(TAPS)
    )
    np.testing.assert_allclose(dx, expected_dx, atol=1e-12)
    np.testing.assert_allclose(dbias, cot.sum(0), atol=1e-12)


def test_bfloat16_sums_in_float32_and_keeps_each_dtype(arrays):
    """1 + 2^-8 + 2^-8 is 1 when every partial sum is rounded to bfloat16."""
    x = jnp.asarray([[1.0], [2**-8], [2**-8]], jnp.bfloat16)
    kernel, state = jnp.ones((3, 1), jnp.bfloat16), jnp.zeros((2, 1), jnp.float32)
    y, state = short_conv(x, kernel, None, state)
    assert y.dtype == jnp.bfloat16
    assert float(y[-1, 0]) == 1 + 2**-7
    assert state.dtype == jnp.float32


def test_one_tap_has_an_empty_state(arrays):
    x, kernel, _ = map(jnp.asarray, arrays)
    y, state = short_conv(x, kernel[:1], None, jnp.zeros((0, *CHANNELS)))
    np.testing.assert_allclose(y, x * kernel[0])
    assert state.shape == (0, *CHANNELS)
