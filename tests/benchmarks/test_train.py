"""The train-step benchmark: results, a step that does not fit, invalid rounds."""

import json

import pytest
from helpers.small import small_config

from tttjax.benchmarks import train as bench_module
from tttjax.benchmarks.train import bench_train
from tttjax.cli.main import main
from tttjax.errors import UserError

pytestmark = pytest.mark.slow


def test_results_belong_to_their_configurations():
    train = {"batch_size": 8}  # the tests have eight devices
    meta_trained = small_config(train=train)
    static = small_config(train=train, inner={"meta_gradient": "none"})
    results = bench_train([("meta_trained", meta_trained), ("static", static)], rounds=1)
    assert [result.name for result in results] == ["meta_trained", "static"]
    assert results[1].step_ratio == 1
    assert results[0].step_ratio == results[0].step_seconds / results[1].step_seconds
    for result in results:
        assert result.tokens == meta_trained.train.batch_size * meta_trained.train.seq_len
        # At least the arguments: weights and both moments of Adam.
        assert result.memory_bytes >= 3 * 4 * result.parameters / 8


def test_step_that_does_not_fit_is_left_blank(monkeypatch):
    def too_large(entry):
        if entry.name == "large":
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return step(entry)

    step = bench_module._step
    monkeypatch.setattr(bench_module, "_step", too_large)
    config = small_config(train={"batch_size": 8}, inner={"meta_gradient": "none"})
    large, small = bench_train([("large", config), ("small", config)], rounds=1)
    assert (large.step_seconds, large.step_ratio, small.step_ratio) == (None, None, 1)
    assert large.flops == small.flops
    _, *lines = bench_module.format_table([large, small]).splitlines()
    assert [line.split()[4:6] == ["-", "-"] for line in lines] == [True, False]


def test_rounds_below_one_are_rejected():
    with pytest.raises(UserError, match="rounds=0 must be at least 1"):
        bench_train([("a", small_config())], rounds=0)


def test_command_line(capsys):
    spec = "mid_size:window"
    small = ["embed_dim=16", "num_layers=2", "num_heads=2", "mlp_dim=16", "vocab_size=32"]
    overrides = [f"--config.model.{field}" for field in small]
    overrides += ["--config.train.seq_len=512", "--config.train.batch_size=8"]
    arguments = ["bench", "train", f"--config={spec}", "--rounds=1", *overrides]
    assert main([*arguments, "--json", "--lengths=128,256"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [(r["seq_len"], r["tokens"]) for r in results] == [(128, 128 * 8), (256, 256 * 8)]
    assert main([*arguments, "--lengths=100"]) == 2
    assert "train.seq_len = 100 is not a multiple" in capsys.readouterr().err
