"""The prefill benchmark: state size, programs that do not fit, invalid sizes."""

import json

import pytest
from helpers.small import small_config

from tttjax.benchmarks import prefill
from tttjax.benchmarks.prefill import bench_prefill
from tttjax.cli.main import main
from tttjax.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]


def test_only_the_state_of_full_attention_grows():
    static = {"fast_mlp": False, "suffix_layers": 0}
    configs = [
        ("ttt_e2e", small_config(model={"mixers": ("window",), "num_layers": 1})),
        ("full", small_config(model={"mixers": ("full",), **static})),
    ]
    short, long = (bench_prefill(configs, length, batch=2, rounds=1) for length in (6, 12))
    assert [r.name for r in short] == ["ttt_e2e", "full"]
    assert short[0].state_bytes == long[0].state_bytes
    assert long[1].state_bytes - short[1].state_bytes == 6 * 2 * 2 * 8 * 4  # layers, k and v, D
    for r in (*short, *long):
        assert r.tokens_per_second == pytest.approx(2 * r.length / r.seconds)
    assert long[1].ratio == 1


def test_programs_that_do_not_fit_are_left_blank(monkeypatch, capsys):
    def too_large(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    def compile_some(config, length, batch):
        if length == 9:
            too_large()  # for the compiler
        program, arguments = compile_all(config, length, batch)
        return (program if config.model.mixers == ("window",) else TooLarge(program)), arguments

    class TooLarge:
        def __init__(self, program):
            self.memory_analysis = program.memory_analysis

        __call__ = too_large

    compile_all = prefill._compile
    monkeypatch.setattr(prefill, "_compile", compile_some)
    results = {}

    def measure_once(*arguments):
        key = repr(arguments)
        if key not in results:
            results[key] = bench_prefill(*arguments)
        return results[key]

    monkeypatch.setattr(prefill, "bench_prefill", measure_once)
    small = ["embed_dim=16", "num_layers=1", "num_heads=2", "mlp_dim=0", "vocab_size=32"]
    words = ["bench", "prefill", "--config=mid_size:w*", "--rounds=1"]
    words += ["--config=mid_size:full", "--lengths=5,9"]
    words += [f"--config.model.{field}" for field in small]
    assert main(words) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0].rpartition(":")[2] for line in lines if "tokens/s" not in line] == [
        *("window", "full"),
        *("window", "full"),
    ]
    window, full, *long = (line for line in lines if "tokens/s" not in line)
    assert float(window[2]) >= 0
    assert window[4] == "-"  # there is nothing to compare it with
    assert full[2:5] == ["-"] * 3
    assert all(line[2:5] == ["-"] * 3 for line in long)
    assert main([*words, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [r["seconds"] is None for r in results] == [False, True, True, True]


def test_other_errors_are_raised(monkeypatch):
    def broken(*_):
        raise RuntimeError("INTERNAL: something else")

    monkeypatch.setattr(prefill, "_compile", broken)
    with pytest.raises(RuntimeError, match="something else"):
        bench_prefill([("a", small_config())], 8, rounds=1)


def test_sizes_below_one_are_rejected():
    with pytest.raises(UserError, match="batch=0 must be at least 1"):
        bench_prefill([("a", small_config())], 8, batch=0)


def test_command_line(capsys):
    small = ["embed_dim=16", "num_layers=1", "num_heads=2", "mlp_dim=16", "vocab_size=32"]
    words = ["bench", "prefill", "--config=mid_size:window", "--rounds=1"]
    words += [f"--config.model.{field}" for field in small]
    assert main([*words, "--lengths=5,9", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [r["length"] for r in results] == [5, 9]
    assert main([*words, "--lengths=0"]) == 2
    assert "length=0" in capsys.readouterr().err
