"""Metrics files, their repair after a kill, rates, the progress line."""

import io
import json
import math
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tttjax.errors import UserError
from tttjax.planning import flops
from tttjax.training import metrics, metrics_file
from tttjax.training.hosts import Hosts
from tttjax.training.metrics import AsyncMetrics, MetricLogger
from tttjax.training.plot import smooth, write_plot
from tttjax.training.progress import Throughput
from tttjax.training.start_account import StartAccount

RATES = Throughput(tokens_per_step=100, flops_per_token=1e6, peak=flops.Peak(1e9, "test"))
ALONE = Hosts(StartAccount())
HELD_OUT_LOSSES = {
    **{"first_token": [1, 5], "last_token": [4, 8]},
    "on": {"loss": 1.5, "by_position": [1.75, 1.25]},
    "off": {"loss": 2.0, "by_position": [2.0, 2.0]},
}
MASKED_LOSSES = {  # of data without targets at the first positions
    **{"first_token": [1, 5], "last_token": [4, 8]},
    "on": {"loss": 1.25, "by_position": [None, 1.25]},
    "off": {"loss": 2.0, "by_position": [None, 2.0]},
}


def logger(path, start=0, stream=None, **kwargs):
    return MetricLogger(
        path, RATES, ALONE, 20, start_step=start, stream=stream or io.StringIO(), **kwargs
    )


def log_steps(log, first, last):
    for step in range(first, last + 1):
        log.log(step, {"loss": 1 / step, "skipped": 0}, seconds=0.5, input_seconds=0.1)


def test_metrics_are_returned_one_step_late():
    async_metrics = AsyncMetrics(StartAccount())
    assert async_metrics.swap(1, {"loss": jnp.float32(3.5)}, "a") is None
    assert async_metrics.swap(2, {"loss": jnp.float32(2.5)}, "b") == (1, {"loss": 3.5}, "a")
    assert async_metrics.flush() == (2, {"loss": 2.5}, "b")
    assert async_metrics.flush() is None


def test_dispatched_step_is_never_read(monkeypatch):
    fetched = []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(float(x["loss"])) or get(x))
    async_metrics = AsyncMetrics(StartAccount())
    for step in range(1, 4):
        async_metrics.swap(step, {"loss": jnp.float32(step)})
        assert fetched == [float(n) for n in range(1, step)]


def test_records_hold_exact_values_and_rates(tmp_path):
    log = logger(tmp_path)
    loss = float(np.float32(0.1))
    log.log(1, {"loss": loss, "nonfinite": False}, seconds=0.5, input_seconds=0.1)
    log.close()
    (record,) = metrics_file.read_records(tmp_path)
    assert record["loss"] == loss
    assert record["time"]["tokens_per_second"] == 200
    assert record["time"]["mfu"] == pytest.approx(200 * 1e6 / 1e9)
    assert record["time"]["input_share"] == pytest.approx(0.2)
    assert record["time"]["memory_bytes"] > 1e6
    assert metrics_file.deterministic_records(tmp_path) == [
        {"step": 1, "loss": loss, "nonfinite": False}
    ]


def test_resume_removes_later_records_and_truncated_line(tmp_path):
    log = logger(tmp_path / "uninterrupted")
    log_steps(log, 1, 8)
    log.close()

    log = logger(tmp_path / "resumed")
    log_steps(log, 1, 6)
    log.close()
    with (tmp_path / "resumed" / metrics_file.JSONL).open("a") as file:
        file.write('{"step": 7, "lo')
    log = logger(tmp_path / "resumed", start=4)
    log_steps(log, 5, 8)
    log.close()
    assert metrics_file.deterministic_records(
        tmp_path / "resumed"
    ) == metrics_file.deterministic_records(tmp_path / "uninterrupted")


def test_resume_may_add_metric_keys(tmp_path):
    log = logger(tmp_path)
    log_steps(log, 1, 3)
    log.close()
    log = logger(tmp_path, start=2)
    log.log(3, {"loss": 0.25, "first_chunk_loss": 0.5}, seconds=1.0)
    log.close()
    existing = [{"step": step, "loss": 1 / step, "skipped": 0} for step in (1, 2)]
    added = {"step": 3, "loss": 0.25, "first_chunk_loss": 0.5}
    assert metrics_file.deterministic_records(tmp_path) == [*existing, added]


def test_nonfinite_values_are_valid_json(tmp_path):
    log = logger(tmp_path)
    log.log(1, {"loss": math.nan, "grad_norm": math.inf}, seconds=1.0)
    log.close()
    text = (tmp_path / metrics_file.JSONL).read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert (record["loss"], record["grad_norm"]) == ("nan", "inf")


def test_tensorboard_gets_points(tmp_path):
    log = logger(tmp_path, log_every=2)
    log_steps(log, 1, 4)
    log.log_held_out(4, MASKED_LOSSES, 0.5)
    log.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    content = file.read_bytes()
    tags = ["loss/train", "time/mfu", *(f"loss/held_out_{x}" for x in ("on", "off", "gain"))]
    tags += [f"loss_by_position/held_out_{x}_tokens_5_8" for x in ("on", "off")]
    assert all(tag.encode() in content for tag in tags)
    assert b"tokens_1_4" not in content


def test_progress_on_terminal_and_in_file(tmp_path):
    plain = io.StringIO()
    log = logger(tmp_path / "a", stream=plain, log_every=2)
    log_steps(log, 1, 4)
    log.close()
    lines = plain.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["2/20", "4/20"]
    assert "loss 0.2500  200 tok/s  mfu 20.0%  input 20%  eta 0:08" in lines[1]

    terminal = io.StringIO()
    terminal.isatty = lambda: True
    log = logger(tmp_path / "b", stream=terminal, log_every=2)
    log_steps(log, 1, 4)
    log.print_line("saved")
    log.close()
    assert terminal.getvalue().count("\r") == 4
    assert terminal.getvalue().endswith("\nsaved\n")


def test_progress_counts_skipped_steps(tmp_path):
    stream = io.StringIO()
    log = logger(tmp_path, stream=stream, log_every=1)
    log.log(1, {"loss": 1.0, "skipped": 0}, seconds=0.5)
    log.log(2, {"loss": math.nan, "skipped": 3}, seconds=0.5)
    log.close()
    first, second = stream.getvalue().splitlines()
    assert "skipped" not in first
    assert "loss nan  skipped 3  200 tok/s" in second


def test_averages_exclude_the_compiled_step(tmp_path):
    stream = io.StringIO()
    log = logger(tmp_path, stream=stream, log_every=2)
    log.log(1, {"loss": 1.0}, seconds=100.0, steady=False)
    log.log(2, {"loss": 1.0}, seconds=0.5)
    log.close()
    assert "200 tok/s" in stream.getvalue()


def test_eta_excludes_compilation(tmp_path):
    stream = io.StringIO()
    log = logger(tmp_path, stream=stream, log_every=1)
    log.log(1, {"loss": 1.0}, seconds=100.0, steady=False)
    log.log(2, {"loss": 1.0}, seconds=0.5)
    log.close()
    first, second = stream.getvalue().splitlines()
    assert "eta" not in first
    assert "compiled and done in 100.0 s" in first
    assert second.endswith("eta 0:09")


def test_missing_wandb_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb_project='mine'.*not installed"):
        logger(tmp_path, wandb_project="mine")


def test_wandb_run_continues_over_restarts(tmp_path, monkeypatch):
    started, points = [], []
    run = SimpleNamespace(log=lambda v, step: points.append((step, v["loss"])), finish=lambda: None)
    fake = SimpleNamespace(init=lambda **kwargs: started.append(kwargs) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for first, last in ((1, 2), (3, 4)):
        log = logger(tmp_path, start=first - 1, wandb_project="mine", log_every=2)
        log_steps(log, first, last)
        log.close()
    assert points == [(2, 0.5), (4, 0.25)]
    assert started[0]["id"] == started[1]["id"]
    assert (started[0]["project"], started[0]["resume"]) == ("mine", "allow")


def test_tensorboard_shows_losses_first():
    tags = [metrics.tag(name) for name in ("loss", "held_out_on", "last_chunk_loss")]
    assert tags == ["loss/train", "loss/held_out_on", "loss/last_chunk_loss"]
    assert metrics.tag("held_out_on_tokens_1_64") > "loss/"
    others = ("grad_norm_slow", "fast_drift", "inner_grad_norm", "lr", "skipped", "time/mfu")
    assert all(metrics.tag(name) > "loss/" for name in others)


def test_held_out_losses_are_kept_and_cut_on_resuming(tmp_path, monkeypatch):
    points = []
    run = SimpleNamespace(log=lambda v, step: points.append((step, v)), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **kwargs: run))
    stream = io.StringIO()
    log = logger(tmp_path, stream=stream, wandb_project="mine")
    for step in (2, 4):
        log.log_held_out(step, HELD_OUT_LOSSES, 0.5)
    log.close()
    assert "step 4: held-out loss 1.5000 with TTT, 2.0000 without (0.5 s)" in stream.getvalue()
    assert [step for step, _ in points] == [2, 4]
    assert points[0][1] == {
        **{"held_out_on": 1.5, "held_out_off": 2.0, "held_out_gain": 0.5},
        **{"held_out_on_tokens_1_4": 1.75, "held_out_on_tokens_5_8": 1.25},
        **{"held_out_off_tokens_1_4": 2.0, "held_out_off_tokens_5_8": 2.0},
    }
    logger(tmp_path, start=3).close()
    (record,) = metrics_file.read_records(tmp_path, metrics_file.HELD_OUT)
    assert (record["step"], record["on"]["loss"]) == (2, 1.5)


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("with_held_out", [False, True])
@pytest.mark.parametrize("drift", [0.0, 0.1])
def test_the_plot_has_panels_for_what_there_is(tmp_path, drift, with_held_out, steps):
    log = logger(tmp_path)
    for step in range(1, steps + 1):
        values = {"loss": 1 / step, "inner_lr": 1.0, "fast_drift": drift, "inner_grad_norm": 1.0}
        chunks = {"first_chunk_loss": 1.0, "last_chunk_loss": 0.5}
        layers = {f"fast_drift_layer{i}": drift for i in range(12)} if step > 1 else {}
        log.log(step, values | chunks | layers, seconds=0.5)
    log.log(steps + 1, {"loss": math.nan, "fast_drift": math.nan, "nonfinite": True}, seconds=0.5)
    if with_held_out:
        off = {**HELD_OUT_LOSSES["off"], "loss": math.nan}
        log.log_held_out(1, {**HELD_OUT_LOSSES, "off": off}, 0.5)
        log.log_held_out(1, MASKED_LOSSES, 0.5)
        losses = MASKED_LOSSES if steps == 1 else HELD_OUT_LOSSES
        losses = losses if drift else {**losses, "on": None}
        log.log_held_out(2, {k: v for k, v in losses.items() if v}, 0.5)
    log.close()
    image = write_plot(tmp_path).read_bytes()
    assert image.startswith(b"\x89PNG")
    columns = 2 + with_held_out if drift else 1 + with_held_out
    assert int.from_bytes(image[16:20]) == 120 * (1.5 + 4 * columns)


def test_the_plot_of_a_run_without_finite_steps(tmp_path):
    log = logger(tmp_path)
    log.log(1, {"loss": math.nan, "nonfinite": True}, seconds=0.5)
    log.close()
    assert write_plot(tmp_path).exists()


def test_smoothing_has_no_bias_at_the_start():
    assert np.allclose(smooth([3.0] * 400), 3.0)
    assert smooth([1.0, 2.0])[-1] == 2.0  # a short run is drawn as it is
    noisy = np.random.default_rng(0).normal(5, 1, 2000)
    assert np.std(smooth(noisy)[500:]) < 0.3
