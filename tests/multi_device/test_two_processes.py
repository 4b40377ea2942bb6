"""Two processes train like one: data, gradients, checkpoints, metrics.

The model has no inner loop, to save compile time: it stays within a sequence and so within a
process, and `test_meshes.py` tests it on every mesh.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.paths import ROOT

from tttjax.data.preparation import prepare
from tttjax.training.metrics import deterministic_records

PROGRAM = ROOT / "tests" / "helpers" / "one_of_two.py"
SECONDS = 150


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run_all(folder, count):
    """Starts `count` processes with two devices in total, waits, and kills the remaining ones."""
    port = free_port()
    devices = f"--xla_force_host_platform_device_count={2 // count}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{devices} --xla_backend_optimization_level=0",
        # The second start of the same run need not compile again.
        "JAX_COMPILATION_CACHE_DIR": str(folder / f"compiled_{count}"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    logs = [folder / f"of_{count}.{rank}.log" for rank in range(count)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            words = [sys.executable, PROGRAM, folder, port, rank, count]
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
    assert codes == [0] * count, "\n".join(log.read_text()[-3000:] for log in logs)
    return logs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    text = str(Path(os.__file__).parent / "argparse.py")
    prepare([text], folder / "data", num_workers=0)
    return folder


def test_two_processes_compute_what_one_does(folder):
    run_all(folder, 1)
    logs = run_all(folder, 2)
    one, two = (deterministic_records(folder / f"of_{count}") for count in (1, 2))
    assert [record["step"] for record in two] == [1, 2, 3, 4, 5]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=1e-9, atol=1e-9, err_msg=name)
    with np.load(folder / "of_1.npz") as a, np.load(folder / "of_2.npz") as b:
        assert a.files == b.files
        for name in a.files:
            assert a[name].dtype == np.float64
            np.testing.assert_allclose(b[name], a[name], rtol=0, atol=1e-9)
    assert "at step 5" in logs[0].read_text()
    assert "at step 5" not in logs[1].read_text(), "the first process alone prints"
