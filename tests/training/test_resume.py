"""A run that is stopped and resumed is bit-identical to one that is not."""

import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers.paths import TINY

from tttjax.errors import UserError
from tttjax.training.loop import train
from tttjax.training.metrics_file import deterministic_records, read_records

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    """(work directory, result) of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return workdir, train(tiny(), workdir)


def assert_same_run(workdir, result, uninterrupted):
    expected_dir, expected_result = uninterrupted
    assert deterministic_records(workdir) == deterministic_records(expected_dir)
    a, b = jax.tree.leaves(result.state), jax.tree.leaves(expected_result.state)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.exhaustive
def test_two_stops(tiny, uninterrupted, tmp_path):
    cfg = tiny()
    assert train(cfg, tmp_path, stop_after=3).interrupted
    second = train(cfg, tmp_path, stop_after=7)
    assert (second.step, second.interrupted) == (7, True)
    last = train(cfg, tmp_path)
    assert (last.step, last.interrupted) == (12, False)
    assert_same_run(tmp_path, last, uninterrupted)


@pytest.mark.exhaustive
def test_two_stops_with_an_inner_loop(tiny, tmp_path):
    small = (
        "inner.remat=False",
        "model.remat=none",
        "model.qk_norm=False",
        "model.post_norm=False",
    )
    cfg = tiny("train.steps=6", *small, arg="ttt_e2e")
    uninterrupted = train(cfg, tmp_path / "uninterrupted")
    train(cfg, tmp_path / "resumed", stop_after=2)
    train(cfg, tmp_path / "resumed", stop_after=5)
    last = train(cfg, tmp_path / "resumed")
    assert_same_run(tmp_path / "resumed", last, (tmp_path / "uninterrupted", uninterrupted))


def test_completed_run_stays_unchanged(tiny, uninterrupted, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(uninterrupted[0], workdir)
    before = (workdir / "summary.json").read_text()
    again = train(tiny(), workdir)
    assert_same_run(workdir, again, uninterrupted)
    assert (workdir / "summary.json").read_text() == before


def test_damaged_newest_checkpoint(tiny, uninterrupted, tmp_path, capfd):
    cfg = tiny()
    train(cfg, tmp_path, stop_after=8)
    biggest = max(
        (tmp_path / "checkpoints" / "8").rglob("d/*"), key=lambda file: file.stat().st_size
    )
    biggest.write_bytes(biggest.read_bytes()[:-1])
    last = train(cfg, tmp_path)
    assert "checkpoint of step 8 is damaged" in capfd.readouterr().err
    assert_same_run(tmp_path, last, uninterrupted)


def test_resumes_on_another_mesh_and_with_other_logging(tiny, uninterrupted, tmp_path):
    train(tiny(), tmp_path, stop_after=4)
    changed = ("mesh.fsdp=2", "mesh.tensor=2", "train.log_every=1", "train.checkpoint_every=100")
    last = train(tiny(*changed), tmp_path)
    actual, expected = (
        [record["loss"] for record in deterministic_records(workdir)]
        for workdir in (tmp_path, uninterrupted[0])
    )
    assert actual[:4] == expected[:4]
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
    assert last.step == 12


def test_going_back_trains_again_from_that_step(tiny, uninterrupted, tmp_path):
    workdir = shutil.copytree(uninterrupted[0], tmp_path / "run")
    with pytest.raises(UserError, match=r"--from-step=5: .* it has 8, 12"):
        train(tiny(), workdir, from_step=5)
    assert_same_run(workdir, train(tiny(), workdir, from_step=8), uninterrupted)
    kept = workdir / "checkpoints" / "abandoned-12"
    assert deterministic_records(kept) == deterministic_records(uninterrupted[0])
    assert train(tiny(), workdir, from_step=8).step == 12  # repeated: nothing to do
    assert len(list(kept.parent.glob("abandoned-*"))) == 1


def test_work_directory_of_other_configuration_is_refused(tiny, uninterrupted):
    with pytest.raises(UserError, match=r"train\.seed"):
        train(tiny("train.seed=1"), uninterrupted[0])


def test_extension_loads_weights_only(tiny, uninterrupted, tmp_path):
    changed = ("train.steps=2", "train.seq_len=64", f"train.init_from={uninterrupted[0]}")
    cfg = tiny(*changed, "optim.warmup_steps=0", "optim.peak_lr=0.0", "optim.end_lr=0.0")
    result = train(cfg, tmp_path)
    for x, y in zip(
        jax.tree.leaves(result.state.params),
        jax.tree.leaves(uninterrupted[1].state.params),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)
    assert int(result.state.step) == 2
    assert read_records(tmp_path)[0]["lr"] == 0.0


def test_extension_from_other_architecture_is_refused(tiny, uninterrupted, tmp_path):
    cfg = tiny(f"train.init_from={uninterrupted[0]}", "model.mlp_dim=32")
    with pytest.raises(UserError, match=r"mlp/w1 is float32.*16.* and .*32"):
        train(cfg, tmp_path)


def start(data, workdir, *overrides):
    command = [sys.executable, "-m", "tttjax", "train", f"--config={TINY}", f"--workdir={workdir}"]
    command += [f"--config.data.sources={data}", *(f"--config.{o}" for o in overrides)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


def test_sigterm_saves_and_the_restart_continues(one_device, tiny, data, tmp_path):
    many = ("train.steps=100000", "train.checkpoint_every=100000", "optim.decay_steps=12")
    process = start(data, tmp_path, *many)
    deadline = time.monotonic() + 120
    while len(read_records(tmp_path)) < 5 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err[-2000:]
    assert "the same command resumes" in out
    stopped = len(deterministic_records(tmp_path))
    steps = [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    assert steps == [str(stopped)]

    # The schedule has its own length, so the run may be made shorter: two more steps.
    cfg = tiny(f"train.steps={stopped + 2}", *many[1:])
    train(cfg, tmp_path)
    train(cfg, tmp_path / "uninterrupted")
    assert deterministic_records(tmp_path) == deterministic_records(tmp_path / "uninterrupted")
