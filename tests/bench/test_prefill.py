"""The benchmark of prefill reads, compares and refuses."""

import json

import pytest
from small import small_config

from tttjax.bench.prefill import bench_prefill
from tttjax.cli import main
from tttjax.errors import UserError


def test_the_state_grows_with_the_context_only_for_full_attention():
    static = {"fast_mlp": False, "suffix_layers": 0}
    configs = [
        ("ttt_e2e", small_config(model={"mixers": ("window",)})),
        ("full", small_config(model={"mixers": ("full",), **static})),
    ]
    short, long = (bench_prefill(configs, length, batch=2, rounds=1) for length in (6, 12))
    assert [r.name for r in short] == ["ttt_e2e", "full"]
    assert short[0].state_bytes == long[0].state_bytes
    assert long[1].state_bytes - short[1].state_bytes == 6 * 2 * 2 * 8 * 4  # layers, k and v, D
    for r in (*short, *long):
        assert r.tokens_per_second == pytest.approx(2 * r.length / r.seconds)
    assert long[1].ratio == 1


def test_sizes_below_one_are_refused():
    with pytest.raises(UserError, match="batch=0 must be at least 1"):
        bench_prefill([("a", small_config())], 8, batch=0)


def test_command_line(capsys):
    small = ["embed_dim=16", "num_layers=2", "num_heads=2", "mlp_dim=16", "vocab_size=32"]
    words = ["bench", "prefill", "--config=experiments/mid_size.py:window", "--rounds=1"]
    words += [f"--config.model.{field}" for field in small]
    assert main([*words, "--lengths=5,9", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [r["length"] for r in results] == [5, 9]
    assert main([*words, "--lengths=0"]) == 2
    assert "train.seq_len" in capsys.readouterr().err
