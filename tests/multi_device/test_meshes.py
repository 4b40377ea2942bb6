"""Training on every mesh: equal steps, one gradient reduction, shardings as declared."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.exhaustive import only
from helpers.small import random_batch, small_config, worst

from tttjax.errors import UserError
from tttjax.ops.cross_entropy.nll import masked_mean
from tttjax.parallel.mesh import make_mesh, spec
from tttjax.training.step import make_gradient, make_trainer
from tttjax.ttt.outer_loss import make_inner_loop

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow]
STEPS = 5


def make_config(model=None, gather="layer", form="fast", learn_lr="weight", **train):
    sizes = {"embed_dim": 16, "mlp_dim": 8, "vocab_size": 16}
    sizes |= {"num_heads": 16, "num_kv_heads": 8, "head_dim": 2}
    return small_config(
        model={**sizes, **(model or {})},
        train={"batch_size": 8, "seq_len": 8, **train},
        mesh={"gather": gather},
        inner={"form": form, "learn_lr": learn_lr},
    )


@functools.cache
def make_on(shape):
    """The trainer of the default configuration."""
    return make(shape)


def make(shape, **changes):
    devices = jax.devices()[: int(np.prod(shape))]
    return make_trainer(make_config(**changes), make_mesh(*shape, devices=devices))


def random_state(trainer):
    """Random weights, the same on every mesh; the rest is zero, as in an initial state."""
    rng = np.random.default_rng(0)
    abstract = trainer.abstract_state
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    params = jax.tree.map(lambda x: 0.4 * rng.normal(size=x.shape), abstract.params)
    return jax.device_put(
        zeros.replace(params=params), jax.tree.map(lambda x: x.sharding, abstract)
    )


def five_steps(trainer, step=None):
    """(losses, final weights as numpy, last state). step: instead of `trainer.step`."""
    state, losses = random_state(trainer), []
    for seed in range(STEPS):
        batch = trainer.put_batch(random_batch(make_config(), seed))
        state, metrics = (step or trainer.step)(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, jax.tree.map(np.asarray, state.params), state


@functools.cache
def compiled_for_data():
    """The compiled step of eight devices along `data`."""
    trainer = make_on((8, 1, 1))
    batch = random_batch(make_config())
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    return trainer.step.lower(trainer.abstract_state, abstract).compile()


@pytest.fixture(scope="module")
def on_one_device(x64):
    return five_steps(make_on((1, 1, 1)))


def assert_same_steps(actual, expected, trainer):
    losses, params, state = actual
    assert np.isfinite(losses).all()
    np.testing.assert_allclose(losses, expected[0], atol=1e-11)
    assert worst(params, expected[1]) < 1e-9
    for array, declared in zip(
        jax.tree.leaves(state), jax.tree.leaves(trainer.abstract_state), strict=True
    ):
        assert array.sharding == declared.sharding
        assert (array.shape, array.dtype) == (declared.shape, declared.dtype)


def test_five_steps_are_the_same_along_data(on_one_device):
    trainer = make_on((8, 1, 1))
    assert_same_steps(five_steps(trainer, compiled_for_data()), on_one_device, trainer)


# Gathering by layer matters to the blocks before the loop over chunks, which both forms share.
@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        pytest.param(
            (1, 2, 4),
            {"form": "reference", "accum_steps": 2, "gather": "layer"},
            marks=pytest.mark.exhaustive,
        ),
        ((1, 4, 1), {"accum_steps": 2, "gather": "step"}),
        ((2, 2, 2), {"gather": "layer", "model": {"remat": "block"}}),
    ],
    ids=[
        "fsdp and tensor, reference form, accumulated, gathered by layer",
        "fsdp, accumulated, gathered by step",
        "all axes, gathered by layer, remat",
    ],
)
def test_five_steps_are_the_same_on_every_mesh(shape, changes, on_one_device):
    trainer = make(shape, **changes)
    assert_same_steps(five_steps(trainer), on_one_device, trainer)
    assert trainer.step._cache_size() == 1, "the step was traced again"


def test_initial_weights_are_the_same_on_a_mesh():
    states = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        trainer = make(shape, model={"num_layers": 1})
        states.append(trainer.init_state(0))
        same = jax.tree.map(
            lambda x, y: x.sharding == y.sharding, states[-1], trainer.abstract_state
        )
        assert all(jax.tree.leaves(same))
    assert worst(*states) < 1e-14


def squared(chunk):
    """A custom inner loss of all that a chunk has."""
    logits_CV = chunk.h_CD @ chunk.head_DV
    return masked_mean(chunk.nll_C**2, chunk.mask_C) + 0.1 * jnp.mean(logits_CV**2)


@pytest.mark.parametrize(
    ("shape", "changes"),
    only(
        [((2, 2, 2), {"accum_steps": 2})],
        [((2, 2, 2), {"accum_steps": 2}), ((1, 1, 1), {"accum_steps": 4}), ((4, 1, 1), {})],
    ),
)
def test_weights_are_normalised_over_all_devices_and_micro_batches(shape, changes):
    """Parts of the batch have different numbers of weighted targets, two sequences none.

    The inner loss is custom, and its rates are learned.
    """
    batch = random_batch(make_config(), masked=0.1)
    weight = (np.random.default_rng(1).random(batch.mask.shape) < 0.4) & batch.mask
    weight[:2] = False
    weight[5, 1:] = False
    batch = batch.replace(weight=weight)
    results = []
    for mesh_shape, train in (((1, 1, 1), {}), (shape, changes)):
        config = make_config(**train)
        trainer = make(mesh_shape, **train)
        gradient = make_gradient(
            trainer.model,
            make_inner_loop(config.inner)._replace(loss=squared),
            trainer.mesh,
            learn=True,
            accum_steps=config.train.accum_steps,
        )
        params = random_state(trainer).params
        results.append(jax.jit(gradient)(params, trainer.put_batch(batch), np.float64(1)))
    for actual, expected in zip(*map(jax.tree.leaves, results[::-1]), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-11)


RECURRENT = {
    "mixers": ("mamba2+gated_deltanet+ttt_mlp",),
    **{"num_layers": 1, "suffix_layers": 0, "fast_mlp": False, "pre_conv": True, "num_kv_heads": 0},
    **{"num_heads": 2, "head_dim": 8},
    "mamba2": {"groups": 2, "head_dim": 8},
    "ttt_layer": {"chunk_size": 3},
}


@pytest.mark.exhaustive
def test_recurrent_mixers_are_the_same_on_a_mesh():
    config, results = make_config(RECURRENT, learn_lr="none"), []
    for shape in ((1, 1, 1), (2, 2, 2)):
        trainer = make(shape, model=RECURRENT, learn_lr="none")
        inner = make_inner_loop(config.inner)
        gradient = jax.jit(make_gradient(trainer.model, inner, trainer.mesh, learn=False))
        batch = trainer.put_batch(random_batch(config))
        results.append(gradient(random_state(trainer).params, batch, np.float64(1)))
    for actual, expected in zip(*map(jax.tree.leaves, results[::-1]), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


def computations(hlo):
    """Name -> lines of every computation of a compiled program's text."""
    lines_by_computation, name = {}, None
    for line in hlo.splitlines():
        if match := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            name = match[1]
            lines_by_computation[name] = []
        elif name:
            lines_by_computation[name].append(line)
    return lines_by_computation


def called_by_loops(lines_by_computation):
    """Every computation that runs inside some while loop."""
    calls = re.compile(r"(?:body|condition|to_apply|calls|branch_computations)=\{?%?([\w.-]+)")
    pending = [
        name
        for lines in lines_by_computation.values()
        for line in lines
        if " while(" in line
        for name in re.findall(r"body=%?([\w.-]+)", line)
    ]
    assert pending, "a step has loops: over chunks, and back over them"
    in_loops = set()
    while pending:
        name = pending.pop()
        if name not in in_loops:
            in_loops.add(name)
            pending += [
                n for line in lines_by_computation.get(name, []) for n in calls.findall(line)
            ]
    return in_loops


def test_the_gradient_is_reduced_outside_loops():
    lines_by_computation = computations(compiled_for_data().as_text())
    in_loops = called_by_loops(lines_by_computation)
    collective = re.compile(r" (all-reduce|reduce-scatter|all-gather|all-to-all)(-start)?\(")
    reduced_in = [
        name for name, lines in lines_by_computation.items() for x in lines if collective.search(x)
    ]
    assert reduced_in, "eight devices must exchange their gradients"
    assert not in_loops & set(reduced_in)


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"data 3 x fsdp 1 x tensor 1 = 3 devices does not fit"):
        make_mesh(3, 1, 1)
    config = small_config(model={"num_heads": 2})
    with pytest.raises(UserError, match=r"the mesh does not fit the model: .* 8 devices"):
        make_trainer(config, make_mesh(1, 1, 8))


def test_a_misspelt_axis_name_is_refused():
    mesh = make_mesh(2, 2, 2)
    assert spec(mesh, ["batch"]) == jax.sharding.PartitionSpec(("data", "fsdp"))
    with pytest.raises(KeyError):
        spec(mesh, ["embde"])
    with pytest.raises(ValueError, match="map to one mesh axis"):
        spec(mesh, ["mlp", "heads"])


def test_weights_are_sharded_as_declared():
    trainer = make((2, 2, 2))
    state = trainer.abstract_state
    w1 = state.params.fast["suffix"]["stage0"]["block0"]["fast_mlp"]["w1"]
    assert w1.sharding.shard_shape(w1.shape) == (1, 8, 4)
    assert state.step.sharding.is_fully_replicated
    assert jnp.issubdtype(state.step.dtype, jnp.integer)
