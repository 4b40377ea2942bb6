"""The TTT dual-form benchmark: memory of the forms, and invalid sizes."""

import json

import pytest

from tttjax.benchmarks.ttt_dual import DualSizes, bench_ttt_dual
from tttjax.cli.bench import ttt_dual as command
from tttjax.cli.main import main
from tttjax.errors import UserError

pytestmark = pytest.mark.slow


def test_the_dual_form_stores_no_weights_per_token(measure_once):
    bench = measure_once(command, "bench_ttt_dual")
    results = bench([32], DualSizes(heads=1, head_dim=16, chunk=16), 1)
    kinds = [(result.inner, result.task) for result in results]
    assert kinds == [(i, t) for i in ("linear", "mlp") for t in ("forward", "gradient")]
    for result in results:
        assert result.speedup == result.primal_seconds / result.dual_seconds
        per_token = 16 * 16 * 4 * (8 if result.inner == "mlp" else 1)
        assert result.primal_memory_bytes > 16 * per_token
        assert result.dual_memory_bytes < result.primal_memory_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 0}, "rounds=0 must be at least 1"),
        ({"sizes": DualSizes(heads=0)}, "heads=0 must be at least 1"),
        ({"seq_lens": [16, 0]}, r"seq_len=\[16, 0\] must be lengths"),
    ],
)
def test_sizes_below_one_are_rejected(arguments, message):
    with pytest.raises(UserError, match=message):
        bench_ttt_dual(**arguments)


def test_command_line(measure_once, capsys):
    measure_once(command, "bench_ttt_dual")
    small = ["--seq-len=32", "--heads=1", "--head-dim=16", "--chunk=16", "--rounds=1"]
    assert main(["bench", "ttt-dual", *small, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [result["seq_len"] for result in results] == [32] * 4
    assert main(["bench", "ttt-dual", *small]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
