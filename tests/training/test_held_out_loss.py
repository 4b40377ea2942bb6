"""Held-out losses while training: those of `evaluate`, the same after a resume, and no effect."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.tiny_runs import prepare_texts

from tttjax.errors import UserError
from tttjax.evaluation.compare import compare
from tttjax.runs.run import RunSpec
from tttjax.training.loop import train
from tttjax.training.metrics_file import HELD_OUT, deterministic_records, read_records

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def held_out_data(tmp_path_factory):
    """Five held-out documents, one for training."""
    return prepare_texts(tmp_path_factory.mktemp("texts"), (300, 200, 140, 90, 60, 500)).folder


@pytest.fixture(scope="module")
def config(tiny, held_out_data):
    """Six steps of a tiny TTT-E2E model, evaluated every four and at the end."""
    small = ("model.remat=none", "model.qk_norm=False", "model.post_norm=False")
    schedule = ("inner.lr_init=0.1", "inner.lr_warmup_steps=5", "train.steps=6")
    return tiny(
        *(f"data.sources={held_out_data}", "train.eval_every=4", "eval.num_sequences=8"),
        *("eval.batch_size=8", *small, *schedule),
        arg="ttt_e2e",
    )


@pytest.fixture(scope="module")
def evaluated(config, tmp_path_factory):
    """(work directory, result) of a run with evaluations."""
    workdir = tmp_path_factory.mktemp("evaluated")
    return workdir, train(config, workdir)


def losses(workdir):
    return [{k: v for k, v in r.items() if k != "time"} for r in read_records(workdir, HELD_OUT)]


def test_the_last_losses_are_those_of_evaluate(config, evaluated):
    workdir, _ = evaluated
    records = losses(workdir)
    assert [record["step"] for record in records] == [4, 6]
    assert (records[0]["first_token"], records[0]["last_token"]) == ([1, 17], [16, 32])
    settings = dataclasses.replace(config.eval, context_lengths=(32,))
    comparison = compare([RunSpec(workdir)], settings=settings, window=16)
    for series in comparison.series:
        sums = series.contexts[32]
        mine = records[-1][series.mode]
        assert mine["loss"] == pytest.approx(float(sums.loss().mean), rel=1e-6)
        bins = sums.binned([0, 16, 32]).loss_by_position().mean
        np.testing.assert_allclose(mine["by_position"], bins, rtol=1e-6)
    on, off = (records[-1][mode]["by_position"] for mode in ("on", "off"))
    assert on[1] != off[1]


def test_evaluations_do_not_change_training(config, evaluated, tmp_path):
    workdir, result = evaluated
    without = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_every=0))
    plain = train(without, tmp_path)
    assert deterministic_records(tmp_path) == deterministic_records(workdir)
    for x, y in zip(jax.tree.leaves(plain.state), jax.tree.leaves(result.state), strict=True):
        np.testing.assert_array_equal(x, y)
    assert not (tmp_path / HELD_OUT).exists()


@pytest.mark.exhaustive
def test_a_resumed_run_has_the_same_losses(config, evaluated, tmp_path):
    train(config, tmp_path, stop_after=2)
    train(config, tmp_path, stop_after=5)  # no evaluation at a stop
    train(config, tmp_path)
    assert losses(tmp_path) == losses(evaluated[0])


def test_data_without_held_out_documents_are_refused_before_the_first_step(config, tmp_path):
    for change, message in (
        ({"val_split": "test"}, "train.eval_every"),
        ({}, "No document of the split"),
    ):
        data = dataclasses.replace(config.data, **change)
        longer = dataclasses.replace(config.train, seq_len=480, batch_size=1)
        wrong = dataclasses.replace(config, data=data, train=config.train if change else longer)
        with pytest.raises(UserError, match=message):
            train(wrong, tmp_path / "run")
        assert not (tmp_path / "run" / "config.json").exists()
