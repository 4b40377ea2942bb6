"""More than a hundred generated command lines: each is rejected with one error line, or can run.

For an accepted line the model is built and its loss traced, which checks shapes. Only one step is
compiled, of a run with all values at their limits.
"""

import dataclasses
import functools
import json
import shutil
from decimal import Decimal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.fuzz_lines import REFUSED, WORKS, lines
from helpers.paths import TINY

from tttjax.cli import main
from tttjax.config import load_config
from tttjax.config.fields import get_value
from tttjax.config.schema import all_fields
from tttjax.training import loop, train_run
from tttjax.ttt.outer_loss import learns, make_inner_loop, make_outer_loss
from tttjax.types import Batch

pytestmark = pytest.mark.slow

START = ["train", f"--config={TINY}", "--workdir=run", "--config.data.sources=data"]
SMALL = ["--config.model.num_layers=1", "--config.train.steps=12", "--stop-after=1"]


@pytest.fixture
def workspace(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("data").symlink_to(data)


@pytest.fixture
def call(workspace, monkeypatch, capsys):
    """call(line) -> (exit code, stderr); accepted lines are traced, not compiled."""
    traced, trainers = set(), {}
    make_trainer, per_token = train_run.make_trainer, train_run.flops.train_flops_per_token

    def make(config, mesh):
        key = config.model, config.inner, config.optim, config.train.steps, config.train.accum_steps
        if (key, mesh) not in trainers:
            trainer = make_trainer(config, mesh)
            state = trainer.abstract_state.replace(skipped=0)
            trainers[key, mesh] = dataclasses.replace(trainer, init_state=lambda seed: state)
        return trainers[key, mesh]

    def first_step(run, state, last):
        config = run.config
        learn = learns(run.trainer.model, config.inner.meta_gradient)
        key = config.model, config.inner if learn else None, config.train.seq_len
        if key not in traced:
            traced.add(key)
            token_BT = np.zeros((2, config.train.seq_len), np.int32)
            loss = make_outer_loss(run.trainer.model, make_inner_loop(config.inner), learn=learn)
            batch = Batch(token_BT, token_BT, token_BT == 0)
            jax.eval_shape(loss, state.params, batch, jnp.float32(1))
        return state, run.start

    monkeypatch.setattr(train_run, "make_trainer", make)
    monkeypatch.setattr(loop, "_loop", first_step)
    monkeypatch.setattr(train_run.flops, "device_peak", lambda: None)
    monkeypatch.setattr(train_run.flops, "train_flops_per_token", functools.cache(per_token))

    def run(line):
        shutil.rmtree("run", ignore_errors=True)
        try:
            code = main.main([*START, *SMALL, *line])
        except Exception as error:
            raise AssertionError(f"{line} ended in {type(error).__name__}: {error}") from error
        return code, capsys.readouterr().err

    return run


def check_rejected(line, err):
    last = err.splitlines()[-1]
    assert last.startswith("error: "), (line, err)
    assert err.count("error: ") == 1, (line, err)
    assert len(last) < 700, (line, err)


def check_numbers(line):
    """The configuration has exactly the numbers of the line, and they fit float32 or int32."""
    joined = [word for word in line if word.startswith("--config.") and "=" in word]
    config = load_config(str(TINY), ["data.sources=data", *SMALL[:2], *joined])
    last = {name: text for name, _, text in (word[9:].partition("=") for word in joined)}
    for name, text in last.items():
        value, kind = get_value(config, name), all_fields()[name].type
        assert text.isascii() or kind is str, line
        if kind is int:
            assert value == Decimal(text), line
            assert value < 2**32, line
        if kind is float:
            assert value == float(text), line
            assert np.isfinite(np.float32(value)), line
            assert (np.float32(value) == 0) == (Decimal(text) == 0), line


def test_fixed_lines(call):
    for line in WORKS:
        code, err = call(line if line != ["--config=5"] else [f"--config={TINY}:5"])
        assert code in (0, 75), (line, err)
    for line in REFUSED:
        code, err = call(line)
        assert code == 2, line
        check_rejected(line, err)


def test_lines_generated_from_the_schema(call):
    codes = []
    number = 120
    assert number >= len(all_fields())
    for line in lines(number):
        code, err = call(line)
        codes.append(code)
        if code == 2:
            check_rejected(line, err)
        else:
            check_numbers(line)
    assert set(codes) <= {0, 2, 75}
    assert 20 < sum(code == 2 for code in codes) < 100


@pytest.mark.exhaustive
def test_a_run_at_its_limits_takes_a_step(workspace):
    int_max = 2**31 - 1
    words = [f"--config.{name}={2**32 - 1}" for name in ("train.seed", "data.seed", "eval.seed")]
    words += [f"--config.{name}={int_max}" for name in ("train.steps", "train.checkpoint_every")]
    words += [
        f"--config.optim.warmup_steps={int_max - 1}",
        f"--config.inner.lr_warmup_steps={int_max}",
    ]
    words += ["--config.optim.weight_decay=1.2e-38", "--config.inner.clip=3.4e38"]
    words += ["--config.train.log_every=2147483647", "--config.train.keep_checkpoints=2147483647"]
    assert main.main([*START, "--stop-after=1", "--config.model.num_layers=1", *words]) == 75
    (record,) = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(record["loss"])
    assert record["nonfinite"] == 0
