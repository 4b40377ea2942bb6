"""Properties that every mixer must have. Add a new mixer to MIXERS."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small import small_config, worst

from tttjax.config.model import MIXERS as CONFIGS
from tttjax.models.block import Block
from tttjax.models.stacking import Stack

pytestmark = pytest.mark.slow

LONG = tuple(kind for config in CONFIGS for kind in config.kinds if kind != "local")
KINDS = (*LONG, "none")
# name: (kind, fields of the model's configuration)
MIXERS = {
    "full": ("full", {}),
    "window": ("window", {}),
    "local": ("local:4", {}),
    "none": ("none", {}),
    "mamba2": ("mamba2", {}),
    "mamba2, groups and limits": ("mamba2", {"mamba2": {"groups": 2, "dt_limits": (0.01, 2.0)}}),
    "gated_deltanet": ("gated_deltanet", {}),
    "gated_deltanet, grouped values": (
        "gated_deltanet",
        {"gated_deltanet": {"key_heads": 1, "value_heads": 2, "negative_eigenvalues": True}},
    ),
    "kda": ("kda", {}),
    "ttt_linear": ("ttt_linear", {}),
    "ttt_linear, plain": ("ttt_linear", {"ttt_layer": {"backbone": "plain"}}),
    "ttt_mlp": ("ttt_mlp", {}),
    "ttt_mlp, plain": ("ttt_mlp", {"ttt_layer": {"backbone": "plain"}}),
    "window+ttt_mlp, read with keys, grouped queries": (
        "window+ttt_mlp",
        {"ttt_layer": {"output": "key", "backbone": "plain"}, "num_kv_heads": 1},
    ),
    "mamba2+full, convolution first, grouped queries": (
        "mamba2+full",
        {"pre_conv": True, "num_kv_heads": 1, "rope_scaling": (4.0, 1.0, 4.0, 64.0)},
    ),
}
# Mixers whose state grows with the sequence.
GROWS = ("full", "mamba2+full, convolution first, grouped queries")
EXTREME = (  # every kind, and the variants with other ranges
    *KINDS,
    *("mamba2, groups and limits", "gated_deltanet, grouped values"),
    "window+ttt_mlp, read with keys, grouped queries",
)
SMALL_SIZES = {
    **{"num_layers": 1, "suffix_layers": 0, "fast_mlp": False, "mlp_dim": 0},
    **{"scan_chunk": 6, "conv_size": 3, "gated_deltanet": {"value_dim": 6}},
}
LENGTH, WIDTH = 23, 8

every_mixer = pytest.mark.parametrize("name", MIXERS)


def block_of(kind, **changes) -> Stack:
    """One block with only the mixer, its norms and residual."""
    model = small_config(model={**SMALL_SIZES, **changes}).model
    return Stack(Block, 1, (kind, False, model))


def weights_of(block, scale=1.0, dtype=None):
    """Random weights with noise on every one, so that none has its initial value."""
    rng = np.random.default_rng(1)

    def shake(w):
        w = np.asarray(w[0])
        noise = 0.1 * rng.normal(size=w.shape)
        return jnp.asarray(scale * (w + noise), dtype or w.dtype)

    return jax.tree.map(shake, block.init(jax.random.key(1)))


@cache
def built(name):
    """(block, weights, jitted reading over a state) in float64."""
    kind, changes = MIXERS[name]
    block = block_of(kind, **changes)
    return block, weights_of(block), jax.jit(block.apply)


def inputs(length=LENGTH, seed=0, dtype=jnp.float64):
    x_TD = np.random.default_rng(seed).normal(size=(length, WIDTH))
    return np.asarray(x_TD, dtype)


def read(name, x_TD, *lengths):
    """Outputs and last state of x read in calls of these lengths."""
    block, weights, apply = built(name)
    state, out, first = block.module().init_state(LENGTH, x_TD.dtype), [], 0
    for length in lengths:
        y_TD, state = apply(weights, x_TD[first : first + length], state, jnp.asarray(first))
        out.append(y_TD)
        first += length
    return np.concatenate(out), state


def train_form(name, x_TD):
    """Outputs of the training form: all tokens, no state."""
    _, weights, apply = built(name)
    y_TD, state = apply(weights, x_TD, None, jnp.zeros((), jnp.int32))
    assert state is None
    return y_TD


def loss_and_gradients(block, dtype):
    """f(weights, x) -> (loss, gradients in both) of the training form, jitted."""

    def loss(weights, x_TD):
        y_TD, _ = block.apply(weights, x_TD, None, jnp.zeros((), jnp.int32))
        cotangent = np.random.default_rng(5).normal(size=y_TD.shape)
        return jnp.sum(y_TD.astype(jnp.promote_types(dtype, jnp.float32)) * cotangent)

    compute = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return jax.default_matmul_precision("highest")(compute)


@cache
def compiled(name, dtype):
    """(block, its loss and gradients) of a mixer."""
    kind, changes = MIXERS[name]
    block = block_of(kind, **changes)
    return block, loss_and_gradients(block, dtype)


def finite(tree) -> bool:
    return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(tree))


def test_every_mixer_is_tested():
    tested = {kind for joined, _ in MIXERS.values() for kind in joined.split("+")}
    assert tested == {*KINDS, "local:4"}


@every_mixer
@pytest.mark.parametrize(
    "lengths",
    [
        (1, 7, 1, 7, 7),
        *(
            pytest.param(lengths, marks=pytest.mark.exhaustive)
            for lengths in ((7, 7, 7, 1, 1), (1,) * LENGTH)
        ),
    ],
    ids=str,
)
def test_any_split_gives_the_same_outputs_and_state(x64, name, lengths):
    x_TD = inputs()
    y_TD, state = read(name, x_TD, LENGTH)
    split_TD, split_state = read(name, x_TD, *lengths)
    np.testing.assert_allclose(split_TD, y_TD, atol=1e-10)
    assert worst(split_state, state) < 1e-10


@every_mixer
def test_training_form_and_state_form_agree(x64, name):
    x_TD = inputs()
    np.testing.assert_allclose(train_form(name, x_TD), read(name, x_TD, LENGTH)[0], atol=1e-10)


@every_mixer
@pytest.mark.parametrize("position", [0, 9, LENGTH - 1])
def test_outputs_do_not_depend_on_later_tokens(x64, name, position):
    x_TD = inputs()
    changed = train_form(name, x_TD + np.eye(1, LENGTH, position).T)
    change_T = np.abs(changed - train_form(name, x_TD)).max(-1)
    assert change_T[:position].max(initial=0) < 1e-12
    assert change_T[position] > 1e-6


@every_mixer
def test_sequences_of_a_batch_are_independent(x64, name):
    block, weights, _ = built(name)
    apply = partial(block.apply, weights)
    batch = jax.jit(jax.vmap(lambda x: apply(x, None, jnp.zeros((), jnp.int32))[0]))
    x_BTD = np.stack([inputs(seed=seed) for seed in range(3)])
    before = batch(x_BTD)
    after = batch(x_BTD + np.eye(1, 3, 1).reshape(3, 1, 1))
    np.testing.assert_array_equal(before[::2], after[::2])
    np.testing.assert_allclose(before[2], train_form(name, x_BTD[2]), atol=1e-10)


@every_mixer
def test_state_size_is_constant(name):
    kind, changes = MIXERS[name]
    stack = block_of(kind, **changes)
    block = stack.module()
    sizes = [
        sum(x.size for x in jax.tree.leaves(block.init_state(length, jnp.float32)))
        for length in (100, 10_000)
    ]
    assert (sizes[0] < sizes[1]) if name in GROWS else (sizes[0] == sizes[1])
    weights = jax.eval_shape(lambda: jax.tree.map(lambda w: w[0], stack.init(jax.random.key(0))))
    before = jax.eval_shape(lambda: block.init_state(100, jnp.bfloat16))
    for length in (1, 7, 23):
        x_TD = jax.ShapeDtypeStruct((length, WIDTH), jnp.bfloat16)
        position = jax.ShapeDtypeStruct((), jnp.int32)
        _, after = jax.eval_shape(stack.apply, weights, x_TD, before, position)
        shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), state) for state in (before, after)]
        assert shapes[0] == shapes[1]


@every_mixer
def test_gradients_in_float32_match_float64(name):
    with jax.enable_x64(True):
        block, compute = compiled(name, "float64")
        weights = weights_of(block)
        exact = compute(weights, inputs())[1]
    _, compute = compiled(name, "float32")
    narrow = jax.tree.map(lambda w: np.asarray(w, np.float32), weights)
    got = compute(narrow, inputs(dtype=jnp.float32))[1]
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
        assert np.linalg.norm(x - y) <= 2e-4 * np.linalg.norm(y) + 1e-6


@pytest.mark.parametrize("name", EXTREME)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["zero input", "large input", "extreme weights"])
def test_extremes_stay_finite(name, dtype, case):
    """Gates that saturate both ways: weights thirty times too large, inputs up to hundreds."""
    block, compute = compiled(name, dtype)
    weights = weights_of(block, scale=30.0 if case == "extreme weights" else 1.0)
    x_TD = inputs(dtype=dtype) * {"zero input": 0, "large input": 300}.get(case, 1)
    assert finite(compute(weights, x_TD))


@pytest.mark.parametrize("kind", LONG)
def test_long_sequences_stay_finite_in_bfloat16(kind):
    block = block_of(kind, scan_chunk=64, ttt_layer={"chunk_size": 16})
    length = 1024 * (4 if kind == "full" else 16)
    x_TD = inputs(length, dtype=jnp.bfloat16)
    assert finite(loss_and_gradients(block, jnp.bfloat16)(weights_of(block), x_TD))


@pytest.mark.parametrize("name", sorted({*LONG} - {"full"}))
def test_cast_weights_are_used_in_compute_dtype(name):
    """So they can be gathered and cast before they are used."""
    kind, changes = MIXERS[name]
    block = block_of(kind, **changes)
    weights = weights_of(block, dtype=jnp.float32)
    narrow = block.cast_params(weights, jnp.dtype(jnp.bfloat16), arrays=True)
    matrices = [w for w in jax.tree.leaves(narrow) if w.ndim > 1 and w.dtype == jnp.bfloat16]
    assert len(matrices) >= 4  # into the heads, and out of them

    @jax.jit
    def outputs(weights, x_TD):
        return block.apply(weights, x_TD, None, jnp.zeros((), jnp.int32))[0]

    x_TD = inputs(dtype=jnp.bfloat16)
    np.testing.assert_array_equal(outputs(weights, x_TD), outputs(narrow, x_TD))
