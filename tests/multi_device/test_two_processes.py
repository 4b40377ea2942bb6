"""Two processes train like one: data, gradients, checkpoints, metrics.

The model has no inner loop, to save compile time: it stays within a sequence and so within a
process, and `test_meshes.py` tests it on every mesh.
"""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import one_of_two
from helpers.paths import ROOT

from tttjax.config.placement import choose_placement
from tttjax.data.preparation import prepare
from tttjax.parallel.mesh import make_mesh
from tttjax.training import loop, train_run
from tttjax.training.metrics_file import deterministic_records

pytestmark = pytest.mark.slow

HELPERS = ROOT / "tests" / "helpers"
SECONDS = 600  # for a machine that is busy


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run_two(folder, program="one_of_two.py"):
    """Starts two processes with a device each, waits, and kills the remaining ones."""
    port = free_port()
    one_device = re.sub(r"(device_count)=\d+", r"\1=1", os.environ["XLA_FLAGS"])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": one_device}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # processes write it without a lock
    logs = [folder / f"of_two.{rank}.log" for rank in range(2)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            words = [sys.executable, HELPERS / program, folder, port, rank]
            with log.open("w") as out:
                processes.append(
                    subprocess.Popen(
                        [str(word) for word in words],
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        env=environment,
                    )
                )
        codes = [process.wait(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return logs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    text = str(Path(os.__file__).parent / "argparse.py")
    prepare([text], folder / "data", num_workers=0)
    return folder


@pytest.mark.exhaustive
def test_two_processes_compute_what_one_does(folder, monkeypatch):
    mesh = make_mesh(1, 2, 1, devices=jax.devices()[:2])
    monkeypatch.setattr(
        train_run, "_choose_mesh", lambda *arguments: (choose_placement(*arguments, 2, 1), mesh)
    )
    weights = loop.train(
        one_of_two.make_config(folder), folder / "of_one", stop_after=5
    ).state.params
    logs = run_two(folder)
    one, two = (deterministic_records(folder / f"of_{count}") for count in ("one", "two"))
    assert [record["step"] for record in two] == [1, 2, 3, 4, 5]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=1e-9, atol=1e-9, err_msg=name)
    with np.load(folder / "of_two.npz") as saved:
        for expected, actual in zip(jax.tree.leaves(weights), saved.values(), strict=True):
            assert expected.dtype == actual.dtype == np.float64
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-9)
    assert "at step 5" in logs[0].read_text()
    assert "at step 5" not in logs[1].read_text(), "the first process alone prints"


def test_two_processes_save_and_restore_alike(tmp_path):
    run_two(tmp_path, "one_of_two_savers.py")
    zero, one = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    files = {
        path.relative_to(tmp_path / "shared" / "2").as_posix()
        for item in ("params", "train", "meta")
        for path in (tmp_path / "shared" / "2" / item).rglob("*")
        if path.is_file()
    }

    # Saving: each process hashes its own files, process 0 also those that it merged.
    def final(names):
        return {re.sub(r"^(\w+)\.orbax-checkpoint-tmp[^/]*", r"\1", name) for name in names}

    own = {name for name in files if re.search(r"(^|[./])process_1(/|$)", name)}
    assert any(name.startswith("params/ocdbt.process_1/d/") for name in own)
    assert final(one["hashed to save"]) == own
    assert final(zero["hashed to save"]) == files - own

    # Restoring: each process hashes a share, and both restore the same step.
    assert set(zero["hashed to restore"]) | set(one["hashed to restore"]) == files
    assert not set(zero["hashed to restore"]) & set(one["hashed to restore"])
    assert (zero["shared"], one["shared"]) == ("2: 2", "2: 34")
    assert (zero["add_newer"], one["add_newer"]) == ("2: 2", "2: 34")
    for seen in (zero, one):
        assert "process 1 does not see checkpoints" in seen["remove_newest"]
        assert "processes see different files in the checkpoint" in seen["truncate_newest"]

    assert zero["due"] == one["due"] == [3, 4, 5, 6], "process 0's clock decides"
