"""RoPE, RMSNorm and cross-entropy against their formulas; precision and range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tttjax.ops.cross_entropy.nll import masked_mean, token_nll, token_nll_in_blocks
from tttjax.ops.norms import layer_norm, rms_norm
from tttjax.ops.rope import apply_rope, frequencies

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow]
RNG = np.random.default_rng(0)


def test_rope_is_complex_multiplication_of_neighbouring_pairs():
    x, theta = RNG.normal(size=(3, 2, 6)), 100.0
    position = np.array([0, 5, 1000])
    z = x[..., 0::2] + 1j * x[..., 1::2]
    z = z * np.exp(1j * position[:, None, None] * theta ** (-2 * np.arange(3) / 6))
    expected = np.stack([z.real, z.imag], axis=-1).reshape(x.shape)
    np.testing.assert_allclose(apply_rope(jnp.asarray(x), position, theta), expected, atol=1e-12)


def test_rope_depends_on_relative_positions():
    q, k = RNG.normal(size=(2, 1, 1, 8))

    def product(i, j):
        a, b = apply_rope(q, jnp.array([i]), 1e4), apply_rope(k, jnp.array([j]), 1e4)
        return float(jnp.sum(a * b))

    assert product(7, 3) == pytest.approx(product(1007, 1003), abs=1e-10)


def test_llama_3_scaling_slows_long_wavelengths_only():
    theta, length = 500000.0, 8192
    plain = theta ** (-np.arange(0, 128, 2) / 128)
    wavelength = 2 * np.pi / plain
    scaled = frequencies(128, theta, (8.0, 1.0, 4.0, length), jnp.float64)
    short, long = wavelength < length / 4, wavelength > length
    assert short.sum() > 20 < long.sum()
    np.testing.assert_allclose(scaled[short], plain[short], rtol=1e-12)
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-12)
    between = ~short & ~long
    share = (length / wavelength[between] - 1) / 3
    expected = (1 - share) * plain[between] / 8 + share * plain[between]
    np.testing.assert_allclose(scaled[between], expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("scaling", "names"),
    [
        ((8.0, 1.0, 4.0, 512.0), {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}),
        ((3.0,), {"rope_type": "linear", "factor": 3.0}),
    ],
)
def test_scaled_frequencies_are_those_of_transformers(scaling, names):
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    names |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 512}
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=4096,
        rope_parameters={"rope_theta": 1e4, **names},
    )
    expected, factor = rope.ROPE_INIT_FUNCTIONS[names["rope_type"]](config, "cpu")
    assert factor == 1.0
    np.testing.assert_allclose(frequencies(32, 1e4, scaling), expected.numpy(), rtol=2e-6)


def test_rope_has_no_position_limit():
    """At position 10^6 and beyond the result is finite and norm-preserving."""
    x = jnp.asarray(RNG.normal(size=(2, 1, 4)), jnp.float32)
    y = apply_rope(x, jnp.array([10**6, 2**30]), 5e5)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


def test_rms_norm_has_its_epsilon_inside_the_root():
    x, w = RNG.normal(size=(2, 5)), RNG.normal(size=5)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * w
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(w), 0.1), expected, atol=1e-12)
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), None, 0.1), expected / w, atol=1e-12)


def test_rms_norm_of_bfloat16_computes_in_float32():
    x, w = (jnp.asarray(RNG.normal(size=64), jnp.bfloat16) for _ in range(2))
    got = rms_norm(x, w, 1e-6)
    wide = rms_norm(x.astype(jnp.float32), w.astype(jnp.float32), 1e-6)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, wide.astype(jnp.bfloat16))


def make_nll_inputs(dtype, length=7):
    h, head = RNG.normal(size=(length, 6)), 3 * RNG.normal(size=(6, 9))
    target = RNG.integers(9, size=length)
    return jnp.asarray(h, dtype), jnp.asarray(head, dtype), jnp.asarray(target)


def test_nll_is_minus_the_log_of_the_softmax():
    h, head, target = make_nll_inputs("float64")
    p = np.exp(np.asarray(h) @ np.asarray(head))
    expected = -np.log(p[np.arange(7), target] / p.sum(-1))
    np.testing.assert_allclose(token_nll(h, head, target), expected, atol=1e-12)


def test_nll_of_bfloat16_is_not_rounded_to_bfloat16():
    nll = token_nll(*make_nll_inputs("bfloat16", 50))
    assert nll.dtype == jnp.float32
    on_grid = nll == nll.astype(jnp.bfloat16).astype(jnp.float32)
    assert int(on_grid.sum()) < 5


@pytest.mark.parametrize("block", [2, 3, 7, 100])
def test_nll_in_blocks_is_same_with_its_gradient(block):
    h, head, target = make_nll_inputs("float64")

    def loss(f, *args):
        return jnp.sum(jnp.sin(f(h, head, target, *args)))

    got = jax.value_and_grad(lambda h: jnp.sum(token_nll_in_blocks(h, head, target, block) ** 2))(h)
    expected = jax.value_and_grad(lambda h: jnp.sum(token_nll(h, head, target) ** 2))(h)
    assert float(loss(token_nll_in_blocks, block)) == pytest.approx(float(loss(token_nll)))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-12)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-11)


def test_masked_mean_ignores_masked_and_empty_is_zero():
    nll = jnp.array([[1.0, 2.0, 6.0], [np.inf, 3.0, 4.0], [1.0, 1.0, 1.0]])
    mask = jnp.array([[True, True, False], [False, True, True], [False, False, False]])
    np.testing.assert_allclose(masked_mean(nll, mask), [1.5, 3.5, 0.0])
    assert np.isfinite(jax.grad(lambda x: masked_mean(x, mask[2]))(nll[2])).all()


def test_layer_norm_over_one_and_over_two_axes():
    x = np.random.default_rng(0).normal(size=(3, 2, 4))
    flat = layer_norm(jnp.asarray(x).reshape(3, 8), jnp.ones(8), jnp.zeros(8), 1e-6)
    both = layer_norm(jnp.asarray(x), jnp.ones((2, 4)), jnp.zeros((2, 4)), 1e-6, axis=(-2, -1))
    np.testing.assert_allclose(both.reshape(3, 8), flat, atol=1e-14)
    np.testing.assert_allclose(flat.mean(-1), 0, atol=1e-14)
    np.testing.assert_allclose(flat.std(-1), 1, atol=1e-5)
