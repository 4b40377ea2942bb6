"""A run goes on with fewer or more processes."""

import os
import signal
import time

import numpy as np
import pytest
from helpers.pod import PodServer

from tttjax.exit_codes import DONE, LOST, USER_ERROR
from tttjax.training.metrics_file import deterministic_records, last_record

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

SOON = 180  # seconds for the slowest start or end, on a busy machine
STEPS = 30
KILLED = -signal.SIGKILL
WORDS = [
    *(f"--config.train.steps={STEPS}", "--config.train.batch_size=12"),
    *("--config.train.checkpoint_every=3", "--config.model.num_layers=1"),
]


def losses(folder):
    return [record["loss"] for record in deterministic_records(folder / "run")]


def changes(pod):
    lines = pod.read(0, "out").splitlines()
    return [line for line in lines if " instead of " in line][-1:]


def test_processes_come_and_go_between_kills(data, tmp_path):
    """4, 2, 3, 4 of them: the losses are those of four, to the rounding of float32."""
    for name in ("alone", "killed"):
        (tmp_path / name).mkdir()
    with PodServer(tmp_path / "compiled") as server:
        alone = server.pod(tmp_path / "alone", data, 4)
        alone.start(words=WORDS)
        assert alone.wait(SOON) == [DONE] * 4

        reached, said = 0, []
        for count in (4, 2, 3):
            pod = server.pod(tmp_path / "killed", data, count, heartbeat=10)
            pod.start(words=WORDS, fault="slow")
            target = reached + 5
            while not pod.codes and last_record(pod.workdir).get("step", 0) < target:
                time.sleep(0.05)  # the watchdog of each process ends a start that hangs
            pod.signal(count - 1)
            assert pod.wait(SOON) == [LOST] * (count - 1) + [KILLED], pod.report()
            reached = last_record(pod.workdir)["step"]
            said.append(changes(pod))

        refused = server.pod(tmp_path / "killed", data, 5)
        before = sorted(os.listdir(refused.workdir))
        for rank in range(5):
            (refused.folder / f"{rank}.err").unlink(missing_ok=True)
        refused.start(words=WORDS)
        assert refused.wait(SOON) == [USER_ERROR] * 5
        refused.check_sentence("12 sequences", "= 5;", "4 or 6 processes would fit")
        assert sorted(os.listdir(refused.workdir)) == before

        last = server.pod(tmp_path / "killed", data, 4)
        last.start(words=WORDS)
        assert last.wait(SOON) == [DONE] * 4
        said.append(changes(last))

    stays = "; batch and order of the data stay"
    assert said[0] == []
    assert [line for (line,) in said[1:]] == [
        "continuing on 2 hosts instead of 4, 2 devices instead of 4, mesh.data = 2 instead of 4, "
        f"train.accum_steps = 2 instead of 1{stays}",
        "continuing on 3 hosts instead of 2, 3 devices instead of 2, mesh.data = 3 instead of 2"
        f"{stays}",
        "continuing on 4 hosts instead of 3, 4 devices instead of 3, mesh.data = 4 instead of 3, "
        f"train.accum_steps = 1 instead of 2{stays}",
    ]
    assert len(losses(tmp_path / "killed")) == STEPS
    np.testing.assert_allclose(*map(losses, [tmp_path / "killed", tmp_path / "alone"]), rtol=1e-6)
