"""The cross-entropy benchmark: memory of the forms, and invalid sizes."""

import json

import pytest

from tttjax.benchmarks.cross_entropy import CrossEntropySizes, bench_cross_entropy
from tttjax.cli.bench import cross_entropy as command_module
from tttjax.cli.main import main
from tttjax.errors import UserError

pytestmark = pytest.mark.slow


def test_only_the_dense_form_stores_all_logits():
    sizes = CrossEntropySizes(rows=64, embed_dim=4, vocab=512, rows_block=8)
    results = {(r.task, r.form): r for r in bench_cross_entropy(sizes, rounds=1)}
    assert set(results) == {
        (task, form) for task in ("gradient", "second") for form in ("dense", "blocked")
    }
    logits = 64 * 512 * 4
    for (task, form), result in results.items():
        assert result.speedup == results[task, "dense"].seconds / result.seconds
        assert (result.memory_bytes >= logits) == (form == "dense")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 0}, "rounds=0 must be at least 1"),
        ({"sizes": CrossEntropySizes(rows_block=0)}, "rows_block=0 must be at least 1"),
        ({"sizes": CrossEntropySizes(vocab_block=-1)}, "vocab_block=-1 must be at least"),
        (
            {"sizes": CrossEntropySizes(dtype="int8")},
            "dtype='int8' must be one of float32, bfloat16",
        ),
    ],
)
def test_invalid_sizes_and_dtypes_are_rejected(arguments, message):
    with pytest.raises(UserError, match=message):
        bench_cross_entropy(**arguments)


def test_command_line(measure_once, capsys):
    measure_once(command_module, "bench_cross_entropy")
    small = ["--rows=6", "--embed-dim=2", "--vocab=8", "--rows-block=4", "--vocab-block=4"]
    command = ["bench", "cross-entropy", *small, "--dtype=bfloat16", "--rounds=1"]
    assert main([*command, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [result["task"] for result in results] == ["gradient"] * 2 + ["second"] * 2
    assert main(command) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
