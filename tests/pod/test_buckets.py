"""Runs of several processes whose data and work directory are in a bucket, without a shared disk.

Against emulators (`helpers/bucket_emulators.py`); every process has an empty folder of its own.
"""

import json
import signal

import jax
import numpy as np
import pytest
from helpers.paths import TINY
from helpers.pod import PodServer

from tttjax.cli import main
from tttjax.config import load_config
from tttjax.data.preparation import prepare
from tttjax.exit_codes import DONE, LOST
from tttjax.io import buckets as io_buckets
from tttjax.io.paths import file_sizes, storage_path
from tttjax.parallel.mesh import make_mesh
from tttjax.training import checkpoint_format, checkpoints
from tttjax.training.metrics_file import deterministic_records
from tttjax.training.step import make_trainer

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

STEPS = ["--config.train.steps=24", "--config.train.checkpoint_every=4"]
LONG = 200  # seconds, on a busy machine


@pytest.fixture(scope="module")
def server(tmp_path_factory, buckets):
    with PodServer(tmp_path_factory.mktemp("compiled")) as server:
        yield server


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """The current folder, which stays empty."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert not any(folder.rglob("*"))


def start(pod, workdir, empty):
    for rank in range(pod.count):
        own = empty.parent / f"host{rank}"
        own.mkdir(exist_ok=True)
        cache = str(empty.parent / f"cache{rank}" / "data")
        pod.start([rank], words=STEPS, workdir=workdir, cwd=own, TTTJAX_DATA_CACHE=cache)


def final_weights(workdir, step=24):
    config = load_config(f"{TINY}:static", STEPS)
    trainer = make_trainer(config, make_mesh(devices=jax.devices()[:1]))
    path = checkpoints.absolute(workdir) / "checkpoints" / str(step)
    state = checkpoint_format.read_train_state(path, trainer.abstract_state)
    return jax.tree.map(np.asarray, jax.device_get(state))


def test_a_killed_run_in_a_bucket_resumes_identically(bucket, server, empty, tmp_path, capsys):
    """The reference is a run on a disk that nobody stops."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in range(12):
        (texts / f"{name}.txt").write_text(" ".join(map(str, range(name, 400))))
    options = {"num_workers": 0, "shard_tokens": 5_000}
    local = prepare([texts], tmp_path / "data", **options)
    remote = prepare([texts], f"{bucket}/data", **options)
    assert remote.manifest["splits"] == local.manifest["splits"]

    reference = server.pod(tmp_path / "reference", local.folder)
    reference.folder.mkdir()
    reference.start(words=STEPS)
    assert reference.wait(LONG) == [DONE, DONE]

    pod = server.pod(tmp_path, f"{bucket}/data", heartbeat=8)
    start(pod, f"{bucket}/run", empty)
    pod.wait_for_line(0, "12/24", LONG)
    pod.signal(1)
    assert pod.wait(LONG) == [LOST, -signal.SIGKILL]

    again = server.pod(tmp_path / "again", f"{bucket}/data")
    again.folder.mkdir()
    start(again, f"{bucket}/run", empty)
    assert again.wait(LONG) == [DONE, DONE], again.report()
    assert "continuing after step" in again.read(0, "out") + again.read(0, "err")
    records = deterministic_records(f"{bucket}/run")
    assert [record["step"] for record in records] == list(range(1, 25))
    assert records == deterministic_records(reference.workdir)
    jax.tree.map(
        np.testing.assert_array_equal,
        final_weights(f"{bucket}/run"),
        final_weights(reference.workdir),
    )
    kept = {
        name.split("/")[1]
        for name in file_sizes(storage_path(bucket) / "run")
        if name.startswith("checkpoints/")
    }
    assert kept == {"20", "24"}
    assert (
        main.main(["evaluate", f"{bucket}/run", "--context-lengths=32", "--num-sequences=8"]) == 0
    )
    assert (storage_path(bucket) / "run" / "eval" / "results.json").exists()
    capsys.readouterr()
    assert main.main(["status", f"{bucket}/run", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["state"], status["step"], status["checkpoint_step"]) == ("finished", 24, 24)
    assert [start["code"] for start in status["starts"]] == [LOST, DONE]
    assert not any(path.name in ("gs:", "s3:") for path in tmp_path.rglob("*"))
    for rank in (0, 1):
        assert not any((tmp_path / f"host{rank}").iterdir())


def test_a_lost_bucket_ends_with_the_saved_step(
    buckets, data, empty, tmp_path, monkeypatch, capsys
):
    import gcsfs.retry
    from helpers.bucket_emulators import Handler

    monkeypatch.setattr(io_buckets, "_DELAYS_S", (0.1,))
    monkeypatch.setattr(gcsfs.retry, "min", lambda *_: 0.01, raising=False)  # seconds between them
    save = checkpoints.Checkpointer.save

    def save_and_lose(self, step, *args, **values):
        save(self, step, *args, **values)
        self.wait()
        if step == 4:
            Handler.is_down.set()

    workdir = f"gs://bkt/{tmp_path.name}"
    words = ["train", f"--config={TINY}:static", f"--config.data.sources={data}", *STEPS]
    words.append(f"--workdir={workdir}")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Checkpointer, "save", save_and_lose)
        try:
            assert main.main(words) == LOST
        finally:
            Handler.is_down.clear()
    error = capsys.readouterr().err
    assert "note: writing gs://" in error
    last = error.splitlines()[-1]
    assert last.startswith("error: gs://")
    assert "cannot be reached" in last
    assert "The run resumes after step 4, which is saved." in last
    (storage_path(workdir) / ".lock").unlink()  # of this process, which still lives
    assert main.main(words) == DONE
    records = deterministic_records(workdir)
    assert [record["step"] for record in records] == list(range(1, 25))
