"""`tttjax bench data` with prepared and with synthetic data."""

import argparse
import json

import numpy as np
import pytest

from tttjax.benchmarks import data as bench_module
from tttjax.cli import bench
from tttjax.data.preparation import prepare
from tttjax.errors import UserError


@pytest.fixture
def data_dir(tmp_path):
    (tmp_path / "t").mkdir()
    for i in range(3):
        letters = np.random.default_rng(i).integers(97, 120, 20_000, dtype=np.uint8)
        (tmp_path / "t" / f"{i}.txt").write_bytes(letters.tobytes())
    return str(prepare([tmp_path / "t"], tmp_path / "d").folder)


def test_the_rate_is_that_of_the_batches_drawn(data_dir):
    result = bench_module.bench_data(data_dir, seq_len=128, batch_size=4, seconds=0.1)
    assert result.batches > 5
    assert result.latency_ms * result.batches >= 100
    rate = 128 * 4 / (result.latency_ms / 1e3)
    assert result.tokens_per_second == pytest.approx(rate)


def test_synthetic_text_and_command_line(data_dir, monkeypatch, capsys):
    make = bench_module._synthetic
    monkeypatch.setattr(bench_module, "_synthetic", lambda folder: make(folder, 2, 9999))
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    common = ["data", "--seconds=0.05", "--seq-len=64", "--batch-size=2"]
    assert bench.run(parser.parse_args(common)) == 0
    assert "synthetic, layout stream" in capsys.readouterr().out
    assert bench.run(parser.parse_args([*common, f"--data={data_dir}", "--json"])) == 0
    assert json.loads(capsys.readouterr().out)["source"] == data_dir
    with pytest.raises(UserError, match=r"seconds=-1\.0"):
        bench.run(parser.parse_args(["data", "--seconds=-1"]))
