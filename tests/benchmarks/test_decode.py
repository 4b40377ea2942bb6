"""The decoding benchmark: context lengths, batch sizes, and invalid sizes."""

import json

import pytest
from helpers.small import small_config

from tttjax.benchmarks.decode import bench_decode
from tttjax.cli.main import main
from tttjax.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]


def test_every_context_length_and_batch_size_is_measured():
    config = small_config(model={"mixers": ("window",), "num_layers": 1})
    results = bench_decode([("ttt_e2e", config)], read=[9, 5], batches=[1, 2], rounds=1)
    assert [(r.read, r.batch) for r in results] == [(5, 1), (5, 2), (9, 1), (9, 2)]
    for r in results:
        shortest = next(s for s in results if (s.read, s.batch) == (5, r.batch))
        assert r.ratio == pytest.approx(r.token_seconds / shortest.token_seconds)
        assert r.tokens_per_second == pytest.approx(r.batch / r.token_seconds)
        assert r.step_seconds > 0  # the median step has no update
    with pytest.raises(UserError, match=r"batch=\[0\] must be numbers of at least 1"):
        bench_decode([("ttt_e2e", config)], read=[5], batches=[0])


def test_command_line(capsys):
    small = ["embed_dim=16", "num_layers=1", "num_heads=2", "mlp_dim=16", "vocab_size=32"]
    words = ["bench", "decode", "--config=mid_size:full", "--rounds=1"]
    words += [f"--config.model.{field}" for field in small]
    assert main([*words, "--read=4", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["read"] == 4
    assert main([*words, "--read=4,x"]) == 2
    assert "--read: 'x' must be an integer" in capsys.readouterr().err
