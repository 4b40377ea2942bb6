"""The attention benchmark: all forms compute the same and are measured."""

import json

import jax
import numpy as np
import pytest

from tttjax.benchmarks import attention
from tttjax.benchmarks.attention import AttentionSizes, bench_attention
from tttjax.cli.bench import attention as command
from tttjax.cli.main import main
from tttjax.errors import UserError

pytestmark = pytest.mark.slow

SMALL = AttentionSizes(heads=2, head_dim=8, chunk=8, window=16, seq_len=32)


def test_forms_of_a_task_give_the_same_results():
    outputs: dict[str, list] = {}
    for task, _, function, arguments in (
        *attention._chunk_tasks(SMALL),
        *attention._sequence_tasks(SMALL),
    ):
        outputs.setdefault(task, []).append(jax.tree.leaves(jax.jit(function)(*arguments)))
    assert {task: len(results) for task, results in outputs.items()} == {
        "chunk gradient": 2,
        "chunk pair": 2,
        "sequence, full": 1,
        "sequence, window": 1,
    }
    for first, *others in outputs.values():
        for other in others:
            for a, b in zip(first, other, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-5)


def test_results_are_by_task_and_form(measure_once):
    results = measure_once(command, "bench_attention")(SMALL, 1)
    assert [(r.task, r.form) for r in results][:2] == [
        ("chunk gradient", "dense"),
        ("chunk gradient", "xla"),
    ]
    seconds = {(r.task, r.form): r.seconds for r in results}
    for r in results:
        first = "dense" if r.task.startswith("chunk") else "xla"
        assert r.speedup == seconds[r.task, first] / r.seconds


def test_command_line(measure_once, capsys):
    measure_once(command, "bench_attention")
    words = ["bench", "attention", "--chunk=8", "--window=16", "--seq-len=32", "--rounds=1"]
    assert main([*words, "--heads=2", "--head-dim=8", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 6
    assert main([*words, "--heads=0"]) == 2
    assert "heads=0 must be at least 1" in capsys.readouterr().err
    with pytest.raises(UserError, match="dtype='int8'"):
        bench_attention(AttentionSizes(dtype="int8"))
