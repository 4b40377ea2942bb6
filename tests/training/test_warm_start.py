"""Starting from a model without an inner loop, and extending it by one."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers.small import random_batch, small_config, worst

from tttjax.errors import UserError
from tttjax.models.transformer import build_model
from tttjax.parallel.mesh import make_mesh
from tttjax.training import checkpoints
from tttjax.training.step import make_trainer
from tttjax.training.warm_start import load_initial_weights

pytestmark = pytest.mark.slow

SIZES = {"num_layers": 3, "num_kv_heads": 1}
STATIC = {**SIZES, "suffix_layers": 0, "fast_mlp": False}
EXTENDED = {**SIZES, "suffix_layers": 2, "fast_mlp_init": "zero"}


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    """(work directory of a static run, its model, its weights)"""
    return save(tmp_path_factory.mktemp("static"), STATIC)


def save(folder, sizes):
    """Saves a run of a model with these sizes; (folder, model, weights)"""
    config = small_config(model=sizes)
    model = build_model(config.model, config.inner)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (0.4 * rng.normal(size=x.shape)).astype(x.dtype), model.abstract_params()
    )
    saver = checkpoints.Checkpointer(folder / checkpoints.CHECKPOINT_DIR)
    saver.save(1, {"params": params}, config=dataclasses.asdict(config))
    saver.close()
    return folder, model, params


def make(devices=1, **model):
    config = small_config(model=model)
    mesh = make_mesh(1, devices, 1, devices=jax.devices()[:devices])
    return config, make_trainer(config, mesh)


def logits(model, params):
    token_T = np.arange(12, dtype=np.int32) % model.config.vocab_size
    return jax.jit(model.apply)(params, model.init_state(12), token_T)[0]


@pytest.mark.exhaustive
def test_zero_fast_mlps_keep_logits_until_trained(static, capsys):
    folder, model, params = static
    config, trainer = make(devices=2, **EXTENDED)
    weights = load_initial_weights(str(folder), trainer, seed=0)
    assert "the last 2 blocks are the suffix; their fast MLPs are new" in capsys.readouterr().err
    expected = trainer.abstract_state.params
    same = jax.tree.map(
        lambda x, y: (x.dtype, x.sharding) == (y.dtype, y.sharding), weights, expected
    )
    assert all(jax.tree.leaves(same))
    fast = flatten_dict(weights.fast, sep="/")
    assert {path.rpartition("/")[2] for path, x in fast.items() if not np.any(x)} == {"w2"}
    host_weights = jax.tree.map(np.asarray, weights)
    np.testing.assert_allclose(
        logits(trainer.model, host_weights), logits(model, params), atol=1e-6
    )
    # The MLP's zeros go through the block's last RMSNorm, whose gradient there is 1 / sqrt(eps).
    state = trainer.start_from(weights)
    for seed in range(2):
        state, metrics = trainer.step(state, trainer.put_batch(random_batch(config, seed)))
        assert not bool(metrics["nonfinite"])
        assert np.isfinite([float(metrics[name]) for name in ("loss", "grad_norm")]).all()
        assert float(metrics["grad_norm_fast"]) > 0
    w2 = state.params.fast["suffix"]["stage0"]["block0"]["fast_mlp"]["w2"]
    assert float(np.abs(np.asarray(w2)).max()) > 0


def test_same_model_loads_unchanged(static):
    folder, _, params = static
    _, trainer = make(**STATIC)
    assert worst(load_initial_weights(str(folder), trainer, seed=0), params) == 0


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({**EXTENDED, "qk_norm": False}, "q_norm/weight"),
        ({**EXTENDED, "num_kv_heads": 2}, r"mixer/wk"),
        ({**EXTENDED, "num_layers": 4}, "does not fit this model"),
    ],
)
def test_other_differences_are_refused(static, model, sentence):
    _, trainer = make(**model)
    with pytest.raises(UserError, match=sentence):
        load_initial_weights(str(static[0]), trainer, seed=0)


def test_fast_mlps_of_other_sizes_are_refused(tmp_path):
    """One block has a fast MLP already; that of the other would have another size."""
    save(tmp_path, {"fast_mlp": True, "suffix_layers": 1})
    _, trainer = make(fast_mlp=True, suffix_layers=2, mlp_dim=8)
    with pytest.raises(UserError, match="does not fit this model"):
        load_initial_weights(str(tmp_path), trainer, seed=0)
