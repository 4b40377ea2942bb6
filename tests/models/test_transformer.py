"""The model as one pure function for any number of tokens; layouts, fast weights, dtypes."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers.exhaustive import only
from helpers.small import random_batch, shaken, small_config, worst

from tttjax.errors import UserError
from tttjax.models.relayout import relayout
from tttjax.models.stacking import combine, path_filter
from tttjax.models.transformer import Transformer, build_model
from tttjax.ttt.outer_loss import make_forward, make_inner_loop

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow]
PATTERNS = {
    "window": ("window",),
    "all": ("window", "full", "local:4", "none"),
    "recurrent": ("gated_deltanet", "mamba2", "ttt_linear", "window+ttt_mlp"),
}
LENGTH = 12


@cache
def built(name):
    """(model, weights, jitted apply) of a pattern, four blocks, the last two with fast MLPs."""
    config = small_config(model={"mixers": PATTERNS[name], "num_layers": 4, "suffix_layers": 2})
    model = build_model(config.model, config.inner)
    return model, shaken(model.init(jax.random.key(0))), jax.jit(model.apply)


TOKENS = np.random.default_rng(3).integers(11, size=LENGTH)


def read_in(name, *lengths):
    """Logits and last state of TOKENS read in calls of these lengths."""
    model, params, apply = built(name)
    state, logits, first = model.init_state(LENGTH), [], 0
    for length in lengths:
        logit_TV, state = apply(params, state, TOKENS[first : first + length])
        logits.append(logit_TV)
        first += length
    return np.concatenate(logits), state


@pytest.mark.parametrize(
    "lengths",
    [
        (5, 1, 5, 1),
        *(
            pytest.param(lengths, marks=pytest.mark.exhaustive)
            for lengths in ((1, 5, 5, 1), (1,) * LENGTH)
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", only([p for p in PATTERNS if p != "recurrent"], PATTERNS))
def test_any_split_gives_the_same_logits_and_state(name, lengths):
    full, full_state = read_in(name, LENGTH)
    logits, state = read_in(name, *lengths)
    np.testing.assert_allclose(logits, full, atol=1e-12)
    assert worst(state, full_state) < 1e-12


@pytest.mark.parametrize("name", PATTERNS)
def test_sequence_without_state_gives_the_same(name):
    model, params, _ = built(name)
    target_T = np.roll(TOKENS, -1)

    @jax.jit
    def losses(params):
        weights = combine(params.slow, params.fast)
        x_TD = model.embed(params.slow, TOKENS)
        for part in ("prefix", "suffix"):
            x_TD, state = model.run_part(part, weights, None, x_TD)
            assert state is None
        return [model.nll(weights, x_TD, target_T, block=block) for block in (None, 5)]

    logit_TV, _ = read_in(name, LENGTH)
    exp_TV = np.exp(logit_TV)
    wanted = -np.log(exp_TV / exp_TV.sum(-1, keepdims=True))[np.arange(LENGTH), target_T]
    for nll_T in losses(params):
        np.testing.assert_allclose(nll_T, wanted, atol=1e-12)


@pytest.mark.parametrize("position", [0, 5, LENGTH - 1])
@pytest.mark.parametrize("name", PATTERNS)
def test_logits_do_not_depend_on_later_tokens(name, position):
    model, params, apply = built(name)
    changed = TOKENS.copy()
    changed[position] = (changed[position] + 1) % 11
    before, _ = read_in(name, LENGTH)
    after, _ = apply(params, model.init_state(LENGTH), changed)
    np.testing.assert_array_equal(before[:position], after[:position])
    assert (np.abs(before[position] - after[position]) > 1e-6).any()


def test_window_attends_to_exactly_its_keys():
    """One block, window 5: a token reaches itself and the 4 after it, no further."""
    config = small_config(model={"num_layers": 1, "suffix_layers": 0, "fast_mlp": False})
    model = build_model(config.model, config.inner)
    params = model.init(jax.random.key(0))
    read = jax.jit(lambda tokens: model.apply(params, model.init_state(LENGTH), tokens)[0])
    changed = TOKENS.copy()
    changed[3] = (changed[3] + 1) % 11
    moved = np.abs(read(TOKENS) - read(changed)).max(-1) > 1e-9
    assert moved.nonzero()[0].tolist() == [3, 4, 5, 6, 7]


def test_state_size_is_constant_except_for_full_attention():
    def sizes(name, length):
        model, _, _ = built(name)
        return sum(x.size for x in jax.tree.leaves(model.init_state(length)))

    assert sizes("window", 100) == sizes("window", 10_000)
    assert sizes("all", 100) < sizes("all", 10_000)


def test_window_longer_than_the_sequence():
    config = small_config(model={"window_size": 500}, train={"seq_len": 8})
    model = build_model(config.model, config.inner)
    params = model.init(jax.random.key(0))
    logits, _ = jax.jit(model.apply)(params, model.init_state(8), TOKENS[:8])
    assert np.isfinite(logits).all()


def test_full_attention_in_suffix_reaches_first_token():
    """The first token reaches the last chunk through attention alone (no learning)."""
    config = small_config(model={"mixers": ("full",), "suffix_layers": 2})
    model = build_model(config.model, config.inner)
    params = model.init(jax.random.key(0))
    read = jax.jit(make_forward(model, make_inner_loop(config.inner), learn=True))
    batch = random_batch(config)
    inputs = batch.inputs.copy()
    inputs[:, 0] = (inputs[:, 0] + 1) % 11
    before, after = (read(params, b, 0.0) for b in (batch, batch.replace(inputs=inputs)))
    assert (np.abs(before.token_nll_T - after.token_nll_T)[:, -4:] > 1e-9).all()


def test_initial_weights_are_normal_and_copies_differ():
    config = small_config(model={"num_layers": 6, "embed_dim": 32, "init_std": 0.02})
    model = build_model(config.model, config.inner)
    flat = flatten_dict(model.init(jax.random.key(0)).slow, sep="/")
    matrix = flat["prefix/stage0/block0/mlp/w1"]
    assert float(matrix.std()) == pytest.approx(0.02, rel=0.1)
    assert worst(matrix[0], matrix[1]) > 1e-3
    norm = flat["prefix/stage0/block0/mlp_norm/weight"]
    np.testing.assert_array_equal(norm, jnp.ones_like(norm))


@pytest.mark.parametrize("name", PATTERNS)
def test_every_weight_names_every_dimension(name):
    model, params, _ = built(name)
    for part in ("slow", "fast"):
        axes = flatten_dict(getattr(model.axes(), part))
        shapes = flatten_dict(getattr(params, part))
        assert axes.keys() == shapes.keys()
        assert all(len(axes[k]) == shapes[k].ndim for k in shapes)


@pytest.mark.parametrize("name", PATTERNS)
def test_abstract_weights_are_those_of_init(name):
    model, _, _ = built(name)
    assert model.abstract_params() == jax.eval_shape(model.init, jax.random.key(0))


def test_fast_weights_are_declared_or_match_patterns():
    model, params, _ = built("window")
    declared = set(flatten_dict(params.fast, sep="/"))
    assert declared == {f"suffix/stage0/block0/fast_mlp/{w}" for w in ("w1", "w2", "w3")}
    chosen = dataclasses.replace(model, fast_patterns=("suffix/**/mlp/w1", "final_norm/*"))
    assert chosen.fast_paths == {"suffix/stage0/block0/mlp/w1", "final_norm/weight"}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "suffix/**/mpl/**",
            "'suffix/\\*\\*/mpl/\\*\\*' matches no weight; the paths nearest to it are",
        ),
        ("prefix/**", "lies before the suffix"),
        ("embedding", "lies before the suffix"),
    ],
)
def test_invalid_patterns_are_refused(pattern, message):
    model, _, _ = built("window")
    with pytest.raises(UserError, match=message):
        _ = dataclasses.replace(model, fast_patterns=(pattern,)).fast_paths


def test_two_stars_match_any_number_of_parts():
    matches = path_filter(["a/**/z", "b/*"])
    assert [p for p in ("a/z", "a/b/z", "a/b/c/z", "a/z/c", "b/c", "b/c/d") if matches(p)] == [
        "a/z",
        "a/b/z",
        "a/b/c/z",
        "b/c",
    ]


def test_relayout_keeps_the_function_and_inverts():
    """A model without suffix, given one for dynamic evaluation: equal logits before any update."""
    plain = small_config(model={"num_layers": 3, "suffix_layers": 0, "fast_mlp": False})
    source = build_model(plain.model, plain.inner)
    model = dataclasses.replace(plain.model, suffix_layers=2)
    target = Transformer(model, ("suffix/**/mlp/**",))
    params = source.init(jax.random.key(0))
    moved = relayout(params, source, target)
    assert set(flatten_dict(moved.fast, sep="/")) == target.fast_paths
    assert worst(relayout(moved, target, source), params) == 0
    results = [
        jax.jit(m.apply)(p, m.init_state(LENGTH), TOKENS)[0]
        for m, p in ((source, params), (target, moved))
    ]
    np.testing.assert_allclose(results[0], results[1], atol=1e-12)


def test_under_bfloat16_losses_and_fast_weights_are_float32():
    dtypes = {"param_dtype": "float32", "compute_dtype": "bfloat16"}
    config = small_config(model=dtypes, inner={"fast_dtype": "float32"})
    model = build_model(config.model, config.inner)
    params, batch = model.init(jax.random.key(0)), random_batch(config)
    inner = make_inner_loop(config.inner)
    reading = jax.jit(make_forward(model, inner, learn=True))(params, batch, 1.0)
    assert {x.dtype for x in jax.tree.leaves(reading.fast)} == {jnp.dtype("float32")}
    assert reading.token_nll_T.dtype == reading.chunk_loss_N.dtype == jnp.float32
    nll = np.asarray(reading.token_nll_T)
    coarse = nll == np.asarray(reading.token_nll_T.astype(jnp.bfloat16).astype(jnp.float32))
    assert coarse.mean() < 0.2
    state = model.init_state(LENGTH)["blocks"]
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("bfloat16")}
    means = nll.reshape(2, -1, 4)
    mask = batch.mask.reshape(2, -1, 4)
    wanted = (means * mask).sum(-1) / np.maximum(mask.sum(-1), 1)
    np.testing.assert_allclose(reading.chunk_loss_N, wanted, rtol=1e-6)
