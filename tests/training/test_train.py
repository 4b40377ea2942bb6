"""The training loop: outputs, compile count, invalid input, requests to stop."""

import dataclasses
import hashlib
import io
import json
import logging
import math
import os
import signal
import sys
import threading
import time

import jax
import numpy as np
import pytest
from absl import logging as absl_logging
from helpers.paths import TINY

from tttjax.cli.main import main
from tttjax.errors import UserError
from tttjax.parallel.distributed import start_distributed
from tttjax.training import records, train_run
from tttjax.training.loop import train
from tttjax.training.metrics_file import deterministic_records, read_records
from tttjax.training.stopping import StopRequest
from tttjax.types import Batch

pytestmark = pytest.mark.slow


class TraceCounter(logging.Handler):
    """Collects the names of the programs that JAX compiles, from its compile log."""

    def __init__(self):
        super().__init__()
        self.names = []

    def emit(self, record):
        text = record.getMessage()
        if text.startswith("Compiling"):
            self.names.append(text)


@pytest.fixture(scope="module")
def complete_run(tiny, trainers, tmp_path_factory):
    """(work directory, result, names of compiled programs) of a complete run."""
    trainers.clear()
    workdir = tmp_path_factory.mktemp("run")
    counter = TraceCounter()
    logging.getLogger("jax").addHandler(counter)
    with jax.log_compiles():
        result = train(tiny("train.profile_steps=(6, 7)"), workdir)
    logging.getLogger("jax").removeHandler(counter)
    return workdir, result, counter.names


def test_run_writes_its_results(complete_run):
    workdir, result, _ = complete_run
    records = read_records(workdir)
    assert [r["step"] for r in records] == list(range(1, 13))
    assert records[-1]["loss"] == result.loss < records[0]["loss"]
    expected = {"grad_norm", "inner_grad_norm", "inner_clip_rate", "fast_drift", "inner_lr", "lr"}
    assert expected <= records[0].keys()
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["step"] == 12
    assert summary["first_step_seconds"] > summary["step_seconds"] > 0
    assert summary["peak_memory_bytes"] > 1e7
    for name in ("config.json", "environment.json", "loss.png", "tensorboard", "profile"):
        assert (workdir / name).exists()
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["12", "8"]


def test_first_step_has_nonzero_learning_rate(complete_run):
    first, second = read_records(complete_run[0])[:2]
    assert first["lr"] == pytest.approx(1e-2 / 4)
    assert first["param_norm"] != second["param_norm"]


def test_step_is_compiled_once_per_run(complete_run):
    steps = [name for name in complete_run[2] if "jit(step)" in name]
    assert len(steps) == 1


def poison_at(monkeypatch, done):
    """Weights become infinite after `done` steps, so that all later steps are skipped."""
    make_trainer = train_run.make_trainer

    def make_poisoned(*arguments):
        trainer = make_trainer(*arguments)

        def step(state, batch):
            if int(state.step) == done:
                poison = jax.tree.map(lambda x: np.full(x.shape, np.inf, x.dtype), state.params)
                params = jax.device_put(poison, jax.tree.map(lambda x: x.sharding, state.params))
                state = state.replace(params=params)
            return trainer.step(state, batch)

        return dataclasses.replace(trainer, step=step)

    monkeypatch.setattr(train_run, "make_trainer", make_poisoned)


def test_stops_when_too_many_steps_are_not_finite(tiny, tmp_path, capsys, monkeypatch):
    poison_at(monkeypatch, 2)
    with pytest.raises(UserError, match=r"3 steps in a row.*batch [0-9a-f]{16}.*grad_norm="):
        train(tiny("train.max_skipped_steps=3"), tmp_path)
    text = (tmp_path / "nonfinite.json").read_text()
    report = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    last = read_records(tmp_path)[-1]
    assert report["step"] == last["step"]
    assert last["skipped_in_row"] == 3
    assert report["batch"]["data_state"]["step"] == last["step"] - 1
    assert report["values"]["skipped_in_row"] == 3
    assert "not finite, skipped" in capsys.readouterr().out


def test_skipped_steps_are_not_saved_and_the_good_checkpoint_goes_on(
    tiny, complete_run, tmp_path, capsys, monkeypatch
):
    with monkeypatch.context() as patch:
        poison_at(patch, 6)
        stopped = train(tiny(), tmp_path, stop_after=9)  # a checkpoint is due at step 8
    assert (stopped.step, stopped.interrupted, stopped.skipped_steps) == (9, True, 3)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4"]
    assert "not saved, because its last steps were skipped" in capsys.readouterr().out
    assert train(tiny(), tmp_path).skipped_steps == 0
    assert deterministic_records(tmp_path) == deterministic_records(complete_run[0])


def test_final_state_that_is_not_finite_is_refused(tiny, tmp_path, monkeypatch):
    poison_at(monkeypatch, 6)
    with pytest.raises(UserError, match=r"step 12 is not finite .*step 4 is intact"):
        train(tiny(), tmp_path)


def test_summary_is_json_with_nonfinite_loss(complete_run):
    result = dataclasses.replace(complete_run[1], loss=math.nan)
    summary = json.loads(json.dumps(result.summary(), allow_nan=False))
    assert summary["loss"] == "nan"


def test_command_line(data, tmp_path, capsys):
    command = ["train", f"--config={TINY}", f"--workdir={tmp_path}", "--stop-after=1"]
    verbosity = absl_logging.get_verbosity()
    try:
        assert main([*command, f"--config.data.sources={data}"]) == 75
    finally:
        absl_logging.set_verbosity(verbosity)
    assert "the same command resumes" in capsys.readouterr().out
    assert (tmp_path / "checkpoints" / "1").exists()


def test_vocabulary_smaller_than_data_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match=r"model\.vocab_size=100 is smaller .*264"):
        train(tiny("model.vocab_size=100"), tmp_path)
    assert not any(tmp_path.iterdir())


def test_stop_after_must_be_a_step(tiny, tmp_path):
    with pytest.raises(UserError, match="--stop-after=0"):
        train(tiny(), tmp_path, stop_after=0)


@pytest.mark.parametrize("inside", ["", "new/run"])
def test_work_directory_that_is_a_file_is_refused(tiny, tmp_path, inside):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"--workdir=.* cannot be a folder, because .*file is a f"):
        train(tiny(), tmp_path / "file" / inside)
    assert (tmp_path / "file").read_text() == "mine"


def test_float64_is_float64_and_resumes(tiny, tmp_path):
    config = tiny("model.param_dtype=float64", "model.compute_dtype=float64", "train.steps=4")
    train(config, tmp_path, stop_after=1)
    state = train(config, tmp_path, stop_after=2).state
    assert not jax.config.jax_enable_x64
    assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {"float64"}
    loss = read_records(tmp_path)[-1]["loss"]
    assert float(np.float32(loss)) != loss


def test_invalid_mesh_writes_nothing(tiny, tmp_path):
    with pytest.raises(UserError, match=r"mesh\.fsdp"):
        train(tiny("mesh.fsdp=3"), tmp_path)
    assert not any(tmp_path.iterdir())


# Signals and fingerprints ------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_and_handlers_are_restored(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.after(1)
        os.kill(os.getpid(), number)
        assert stop.after(2)
    assert signal.getsignal(number) is before


def test_signal_is_reported_while_interpreter_is_blocked(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    blocked, reported = threading.Event(), threading.Event()

    def interrupt():
        blocked.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        while blocked.is_set():
            if "stopping after this step\n" in stderr.getvalue():
                reported.set()
                return
            time.sleep(0.01)

    thread = threading.Thread(target=interrupt)
    with StopRequest() as stop:
        thread.start()
        blocked.set()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)  # blocks the interpreter like compiling
        blocked.clear()
        thread.join()
        assert stop.after(1)
    assert reported.is_set()


def test_second_sigint_raises_keyboard_interrupt():
    with StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_stop_requests_work_outside_the_main_thread():
    results = []

    def request():
        with StopRequest() as stop:
            results.append(stop.after(1))

    thread = threading.Thread(target=request)
    thread.start()
    thread.join()
    assert results == [False]


def test_batch_fingerprints_differ_between_batches():
    tokens = np.arange(6, dtype=np.int32).reshape(2, 3)
    batch = Batch(inputs=tokens, targets=tokens + 1, mask=np.ones((2, 3), bool))
    other = batch.replace(mask=~batch.mask)
    assert records.batch_fingerprint(batch) == records.batch_fingerprint(batch)
    assert records.batch_fingerprint(batch) != records.batch_fingerprint(other)


def test_incomplete_distributed_flags_are_refused():
    with (
        pytest.raises(UserError, match="--process-id, --process-count is missing"),
        start_distributed("localhost:1234"),
    ):
        pass
