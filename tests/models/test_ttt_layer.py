"""The TTT layer: its definition, weights, state, and the output rule "key"."""

from dataclasses import replace
from functools import cache

import helpers.ttt_reference as by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.small import shaken, worst

from tttjax.config import ModelConfig
from tttjax.errors import UserError
from tttjax.models.ttt_layer.config import TTTLayerConfig
from tttjax.models.ttt_layer.layer import TTTLayer

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow]
WIDTH, HEADS, CHUNK, LENGTH = 8, 2, 4, 11
BASE = TTTLayerConfig(heads=HEADS, chunk_size=CHUNK, lr=2.0, rope_theta=100.0)
MODEL = ModelConfig(embed_dim=WIDTH, conv_size=3, init_std=0.5)
KINDS = [
    ("linear", "mamba", "query"),
    ("mlp", "plain", "query"),
    ("mlp", "mamba", "key"),
    ("linear", "plain", "key"),
]


def layer(inner="linear", dtype="float64", embed_dim=WIDTH, conv_size=3, std=0.5, **changes):
    model = replace(MODEL, embed_dim=embed_dim, conv_size=conv_size, init_std=std)
    model = replace(model, param_dtype=dtype, ttt_layer=replace(BASE, **changes))
    return TTTLayer(f"ttt_{inner}", model, nnx.Rngs(0))


@cache
def built(inner, backbone, output):
    """(graph, weights, jitted call) of a layer with noise on every weight."""
    graph, state = nnx.split(layer(inner=inner, backbone=backbone, output=output))
    call = jax.jit(lambda weights, *args: nnx.merge(graph, weights)(*args))
    return graph, shaken(nnx.to_pure_dict(state)), call


def inputs(length=LENGTH, dtype=jnp.float64):
    return np.asarray(np.random.default_rng(3).normal(size=(length, WIDTH)), dtype)


def read_in(kind, *lengths):
    """Outputs, last state and last inner weights of the inputs read in calls of these lengths."""
    graph, weights, call = built(*kind)
    module = nnx.merge(graph, weights)
    x_TD, out, first = inputs(), [], 0
    state = module.init_state(LENGTH, jnp.float64)
    for length in lengths:
        y_TD, state = call(weights, x_TD[first : first + length], state, jnp.int32(first))
        out.append(y_TD)
        first += length
    return np.concatenate(out), state, jax.jit(module.final_weights)(state, first)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_equals_the_definition(kind):
    _, weights, call = built(*kind)
    x_TD = inputs()
    wanted, wanted_last = by_hand.layer(
        np.asarray(x_TD),
        jax.tree.map(np.asarray, weights),
        **{"base_lr": BASE.lr, "theta": BASE.rope_theta, "eps": MODEL.norm_eps},
    )
    y_TD, state = call(weights, x_TD, None, jnp.int32(0))
    assert state is None
    np.testing.assert_allclose(y_TD, wanted, atol=1e-11)
    y_TD, _, last = read_in(kind, LENGTH)
    np.testing.assert_allclose(y_TD, wanted, atol=1e-11)
    assert worst(last, wanted_last) < 1e-11


@pytest.mark.parametrize("lengths", [(6, 5), (2, 1, 7, 1)], ids=str)
def test_any_split_gives_the_same_outputs_and_state(lengths):
    """The convolutions' states as well as the inner model's, within mini-batches."""
    for kind in (KINDS[0], KINDS[2]):
        assert worst(read_in(kind, *lengths), read_in(kind, LENGTH)) < 1e-11


def test_every_weight_is_used():
    always = {"wv", "wo", "wlr", "lr_bias", "token_idx", "norm_scale", "norm_bias"}
    always |= {"w1", "b1", "post_norm_scale", "post_norm_bias"}
    gated = {"wq", "wg", "conv_k", "conv_k_bias"}
    own = {
        ("linear", "mamba", "query"): gated | {"conv_q", "conv_q_bias"},
        ("mlp", "plain", "query"): {"wq", "wk", "w2", "b2"},
        ("mlp", "mamba", "key"): gated | {"w2", "b2"},
        ("linear", "plain", "key"): {"wk"},
    }
    for kind in KINDS:
        assert set(built(*kind)[1]) == always | own[kind]


def test_key_rule_uses_weights_before_the_update():
    """A change within a mini-batch affects only the next one."""
    _, weights, call = built("mlp", "plain", "key")
    before, _ = call(weights, inputs(), None, 0)
    after, _ = call(weights, inputs() + np.eye(1, LENGTH, 1).T, None, 0)
    moved = np.abs(before - after).max(-1) > 1e-6
    assert moved.tolist() == [False, True, False, False] + [True] * (LENGTH - CHUNK)


def test_states_are_float32_and_outputs_as_inputs():
    module = layer(dtype="bfloat16")
    state = module.init_state(100, jnp.bfloat16)
    assert {name: x.shape for name, x in state.items()} == {
        **{"w1": (2, 4, 4), "g_w1": (2, 4, 4), "b1": (2, 4), "g_b1": (2, 4)},
        **{"conv_q": (2, 2, 4), "conv_k": (2, 2, 4)},
    }
    graph, weights = nnx.split(module)
    call = jax.jit(lambda weights, *args: nnx.merge(graph, weights)(*args))
    y_TD, new_state = call(weights, inputs(5, jnp.bfloat16), state, jnp.int32(0))
    assert y_TD.dtype == jnp.bfloat16
    for state_of in (state, new_state):
        dtypes = {name: str(x.dtype) for name, x in state_of.items()}
        assert {dtypes.pop(name) for name in ("conv_q", "conv_k")} == {"bfloat16"}
        assert set(dtypes.values()) == {"float32"}


def test_initial_weights():
    module = layer(embed_dim=256, inner="mlp", conv_size=4, std=0.02)
    ones = {"norm_scale", "post_norm_scale"}
    zeros = {"norm_bias", "post_norm_bias", "lr_bias", "token_idx", "b1", "b2"}
    zeros |= {"conv_q_bias", "conv_k_bias"}
    for name, weight in nnx.to_pure_dict(nnx.state(module)).items():
        if name in ones | zeros:
            assert (weight == (name in ones)).all()
        elif name in ("conv_q", "conv_k"):
            assert float(weight.std()) == pytest.approx(0.5, rel=0.1)  # 1 / sqrt(4 taps)
            assert float(np.abs(weight).max()) < 1.2  # truncated at two standard deviations
        else:
            assert float(weight.std()) == pytest.approx(0.02, rel=0.1), name


@pytest.mark.parametrize("heads", [3, 8])
def test_heads_that_do_not_fit_are_refused(heads):
    with pytest.raises(UserError, match=f"A TTT layer of {heads} heads"):
        replace(BASE, heads=heads).check(MODEL)
