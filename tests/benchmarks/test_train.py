"""The train-step benchmark: results, a step that does not fit, invalid rounds."""

import functools
import json

import pytest
from helpers.small import small_config

from tttjax.benchmarks import train as bench_module
from tttjax.benchmarks.train import bench_train
from tttjax.cli.main import main
from tttjax.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]


@pytest.fixture(scope="module")
def results():
    """Results of three configurations, by name; the device has no memory for `large`."""
    train = {"batch_size": 8}  # the tests have eight devices
    meta_trained = small_config(model={"num_layers": 1}, train=train)
    static = small_config(model={"num_layers": 1}, train=train, inner={"meta_gradient": "none"})
    configs = [("meta_trained", meta_trained), ("large", static), ("static", static)]

    def step(entry):
        if entry.name == "large":
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return measured_step(entry)

    measured_step = bench_module._step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_module, "_step", step)
        patch.setattr(bench_module, "make_trainer", functools.cache(bench_module.make_trainer))
        measured = bench_train(configs, rounds=1)
    assert [result.name for result in measured] == [name for name, _ in configs]
    return {result.name: result for result in measured}


def test_results_belong_to_their_configurations(results):
    meta_trained, static = results["meta_trained"], results["static"]
    assert static.step_ratio == 1
    assert meta_trained.step_ratio == meta_trained.step_seconds / static.step_seconds
    for result in (meta_trained, static):
        assert (result.seq_len, result.tokens) == (12, 8 * 12)
        # At least the arguments: weights and both moments of Adam.
        assert result.memory_bytes >= 3 * 4 * result.parameters / 8


def test_step_that_does_not_fit_is_left_blank(results):
    large, static = results["large"], results["static"]
    assert (large.step_seconds, large.step_ratio, static.step_ratio) == (None, None, 1)
    assert large.flops == static.flops
    _, *lines = bench_module.format_table([large, static]).splitlines()
    assert [line.split()[4:6] == ["-", "-"] for line in lines] == [True, False]


def test_rounds_below_one_are_rejected():
    with pytest.raises(UserError, match="rounds=0 must be at least 1"):
        bench_train([("a", small_config())], rounds=0)


def test_command_line(zero_weights, capsys):
    spec = "mid_size:window"
    small = ["embed_dim=16", "num_layers=1", "num_heads=2", "mlp_dim=16", "vocab_size=32"]
    overrides = [f"--config.model.{field}" for field in small]
    overrides += ["--config.train.seq_len=512", "--config.train.batch_size=8"]
    arguments = ["bench", "train", f"--config={spec}", "--rounds=1", *overrides]
    assert main([*arguments, "--json", "--lengths=128,256"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [(r["seq_len"], r["tokens"]) for r in results] == [(128, 128 * 8), (256, 256 * 8)]
    assert main([*arguments, "--lengths=100"]) == 2
    assert "train.seq_len = 100 is not a multiple" in capsys.readouterr().err
