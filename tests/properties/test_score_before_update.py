"""With inner updates: no token profits from its own update, and the model is causal."""

import jax
import numpy as np
import pytest
from helpers.small import random_batch, shaken, small_config

from tttjax.models.transformer import build_model
from tttjax.ttt.outer_loss import make_forward, make_inner_loop

pytestmark = pytest.mark.usefixtures("x64")
CHUNK, LENGTH = 4, 12


@pytest.fixture(scope="module")
def read(x64):
    """read(batch, lr) -> ForwardOutput, jitted once; two of three blocks in the suffix."""
    config = small_config(model={"num_layers": 3, "suffix_layers": 2})
    model = build_model(config.model, config.inner)
    params = shaken(model.init(jax.random.key(0)))
    forward = jax.jit(make_forward(model, make_inner_loop(config.inner), learn=True))
    return lambda batch, lr: forward(params, batch, lr)


@pytest.fixture(scope="module")
def batch(x64):
    return random_batch(small_config(), masked=0.0)


def changed(x, position):
    x = np.array(x)
    x[:, position] = (x[:, position] + 1) % 11
    return x


@pytest.mark.parametrize("position", range(LENGTH))
def test_target_changes_own_loss_and_later_chunks_only(read, batch, position):
    """A target affects later tokens only through the update of its chunk."""
    before = read(batch, 1.0).token_nll_T
    after = read(batch.replace(targets=changed(batch.targets, position)), 1.0).token_nll_T
    differs = np.asarray(before != after).any(0)
    end_of_chunk = (position // CHUNK + 1) * CHUNK
    assert differs[:end_of_chunk].nonzero()[0].tolist() == [position]
    assert differs[end_of_chunk:].all()


@pytest.mark.parametrize("position", range(LENGTH))
def test_input_affects_own_chunk_through_attention_alone(read, batch, position):
    """Within its chunk the effect of a token is the same with and without updates."""
    other = batch.replace(inputs=changed(batch.inputs, position))
    before, after = read(batch, 1.0).token_nll_T, read(other, 1.0).token_nll_T
    np.testing.assert_array_equal(before[:, :position], after[:, :position])
    assert (np.asarray(before != after)).any(0)[position]


def test_first_chunk_is_scored_with_initial_weights(read, batch):
    on, off = read(batch, 1.0).token_nll_T, read(batch, 0.0).token_nll_T
    np.testing.assert_array_equal(on[:, :CHUNK], off[:, :CHUNK])
    assert (np.asarray(on != off)[:, CHUNK:]).all()


def test_masked_chunk_changes_only_later_chunks(read, batch):
    """The NLL of masked tokens is reported too; only their update is missing."""
    mask = np.array(batch.mask)
    mask[:, CHUNK : 2 * CHUNK] = False
    before, after = read(batch, 1.0), read(batch.replace(mask=mask), 1.0)
    end = 2 * CHUNK
    np.testing.assert_array_equal(before.token_nll_T[:, :end], after.token_nll_T[:, :end])
    assert (np.asarray(before.token_nll_T != after.token_nll_T)[:, end:]).all()


def test_last_update_changes_no_loss(read, batch):
    """The weights change, but no token follows."""
    targets = changed(batch.targets, LENGTH - 1)
    before, after = read(batch, 1.0), read(batch.replace(targets=targets), 1.0)
    np.testing.assert_array_equal(before.token_nll_T[:, :-1], after.token_nll_T[:, :-1])
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before.fast, after.fast)
    assert all(jax.tree.leaves(moved))
