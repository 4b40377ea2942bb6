"""A run whose second host is slow and that is killed three times, as its files show it."""

import json
import re
import time

import pytest
from helpers.pod import PodServer

from tttjax.cli.main import main
from tttjax.exit_codes import DONE, LOST
from tttjax.runs.status import run_status
from tttjax.training.metrics_file import last_record
from tttjax.training.profiler import PROFILE_DIR, REQUEST

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

STEPS = 700
WORDS = [f"--config.train.steps={STEPS}", "--config.train.checkpoint_every=40"]
WORDS += ["--config.train.checkpoint_minutes=0", "--config.train.log_every=10"]
SOON = 240  # seconds for a start and the steps after it, on a busy machine


def test_a_slow_host_and_three_kills(data, tmp_path, capsys):
    lost, restarts = 0, 3
    with PodServer(tmp_path / "compiled") as server:
        began = time.time()
        for start in range(restarts + 1):
            pod = server.pod(tmp_path, data, heartbeat=20)
            pod.start([0], words=WORDS)
            pod.start([1], words=WORDS, fault="slow")
            if start == restarts:
                break
            reach(pod, last_record(pod.workdir).get("step", 0) + 50)
            if start == 0:
                check_first_start(pod)
            pod.signal(start % 2)
            codes = pod.wait(SOON)
            assert codes[1 - start % 2] == LOST, pod.report()
            status = run_status(pod.workdir)
            assert (status.state, status.phase) == (("failed" if start % 2 else "killed"), None)
            lost += last_record(pod.workdir)["step"] - status.checkpoint_step
        assert pod.wait(SOON) == [DONE, DONE], pod.report()
        wall = time.time() - began
    assert main(["status", str(pod.workdir), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["state"], status["step"], status["steps"]) == ("finished", STEPS, STEPS)
    assert lost > 0
    assert status["lost_steps"] == lost
    assert [start["code"] for start in status["starts"]] == [None, LOST, None, DONE]
    assert sum(status["goodput"].values()) == pytest.approx(wall, rel=0.02)
    for use in ("start", "compile", "restore", "input", "steps", "lost", "save", "down"):
        assert status["goodput"][use] > 0, use


def reach(pod, step):
    """Waits for a step's record."""
    pod.wait_until(lambda: pod.codes or last_record(pod.workdir).get("step", 0) >= step, SOON)
    assert not pod.codes, pod.report()


def check_first_start(pod):
    """What process 0 prints, what `status` says while it runs, and a profile on request."""
    output = pod.read(0, "out")
    assert re.search(r"host 0 \(.+\): 1 x cpu; tttjax .+, jax .+\nhost 1 \(", output), output
    pod.wait_for_line(0, "% (host 1)", SOON)
    pod.wait_for_line(0, "holds up the others: ", SOON)
    shares = re.findall(r"input (\d+)% \(host 1\)", pod.read(0, "out"))
    assert int(shares[-1]) > 50
    assert set(re.findall(r"host (\d) \(.+\) holds up the others: ", pod.read(0, "out"))) == {"1"}
    pod.wait_until(lambda: "input" in run_status(pod.workdir).hosts[1], SOON)
    status = run_status(pod.workdir)
    assert (status.state, status.starts[0].code) == ("running", None)
    first, second = status.hosts
    assert second["input"] > 0.5 > first["input"]
    (pod.workdir / REQUEST).touch()
    pod.wait_for_line(0, "profiling steps ", SOON)
    profiled = re.search(r"profiling steps (\d+) to (\d+)", pod.read(0, "out"))
    reach(pod, int(profiled[2]) + 2)
    assert not (pod.workdir / REQUEST).exists()
    assert list((pod.workdir / PROFILE_DIR).rglob("*.xplane.pb"))
