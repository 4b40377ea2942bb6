"""Trials on a cluster: submitit's own local executor, and the manifest of an indexed Job."""

import json
import subprocess
import sys
import time

import pytest
from helpers.paths import ROOT

from tttjax.cli.main import main
from tttjax.errors import UserError
from tttjax.sweeps import cluster
from tttjax.sweeps.design import write_design
from tttjax.sweeps.make_design import make_design

TINY = str(ROOT / "tests" / "helpers" / "tiny_run.py")


@pytest.fixture
def out(tmp_path):
    """A sweep of three trials that nobody has started."""
    changes = {"eval.context_lengths": (32,)}
    rows = [{"optim.peak_lr": rate} for rate in (1.0, 2.0, 3.0)]
    folder = tmp_path / "my sweep"
    write_design(make_design([TINY], rows, 1, changes=changes), folder)
    return folder


def test_every_index_of_the_job_is_one_trial(out, capsys):
    arguments = ["sweep", f"--out={out}", "--on=kubernetes", "--image=img", "--volume-claim=disk"]
    assert main(arguments) == 0
    job = json.loads(capsys.readouterr().out)
    spec = job["spec"]
    assert (job["kind"], spec["completionMode"], spec["completions"]) == ("Job", "Indexed", 3)
    container = spec["template"]["spec"]["containers"][0]
    shell, flag, script = container["command"]
    assert container["volumeMounts"][0]["mountPath"] == str(out)
    echo = script.replace("exec tttjax", "printf '%s|'")
    commands = [
        subprocess_output([shell, flag, echo], {"JOB_COMPLETION_INDEX": str(i)}) for i in range(3)
    ]
    assert commands == [
        f"sweep|--out={out}|--trial=tiny_run,peak_lr={i}.0,seed=0|" for i in (1, 2, 3)
    ]


def subprocess_output(command, environment):
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_a_user_error_is_not_retried_and_a_preemption_is(out):
    spec = cluster.kubernetes_manifest(out, ["a", "b"], "img", "disk", 2)["spec"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailIndex"
    assert rule["onExitCodes"]["values"] == [2]
    assert spec["backoffLimitPerIndex"] > 1


def test_pods_ask_for_gpus(out, capsys):
    arguments = ["sweep", f"--out={out}", "--on=kubernetes", "--image=img", "--volume-claim=disk"]
    for gpus, limits in ((2, {"nvidia.com/gpu": 2}), (0, None)):
        assert main([*arguments, f"--gpus={gpus}"]) == 0
        spec = json.loads(capsys.readouterr().out)["spec"]["template"]["spec"]
        assert spec["containers"][0].get("resources", {}).get("limits") == limits
    assert main(["sweep", f"--out={out}", "--gpus=1"]) == 2


def test_the_job_needs_an_image_and_a_disk(out):
    assert main(["sweep", f"--out={out}", "--on=kubernetes"]) == 2


def test_submitit_runs_the_commands(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    script = "import sys; open(sys.argv[1], 'w').write(sys.argv[2])"
    monkeypatch.setattr(
        cluster,
        "trial_command",
        lambda out, name: [sys.executable, "-c", script, str(out / f"ran{name}"), "done"],
    )
    jobs = cluster.submit_to_slurm(tmp_path, ["3", "5"], {"timeout_min": 1}, cluster="local")
    deadline = time.monotonic() + 120
    while not all(job.done(force_check=True) for job in jobs) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [job.exception() for job in jobs] == [None, None]
    assert [(tmp_path / f"ran{n}").read_text() for n in (3, 5)] == ["done", "done"]


def test_a_failed_command_fails_its_job():
    with pytest.raises(RuntimeError, match="exit code 3"):
        cluster.SlurmTrial([sys.executable, "-c", "raise SystemExit(3)"])()


def test_the_signal_of_a_preemption_leaves_the_trial_running():
    """It goes to all processes of a job, of which submitit's has the trial save."""
    script = "import os, signal; os.kill(os.getpid(), signal.SIGUSR2)"
    cluster.SlurmTrial([sys.executable, "-c", script])()


def test_a_preempted_trial_queues_again():
    pytest.importorskip("submitit")
    command = [sys.executable, "-c", "pass"]
    assert cluster.SlurmTrial(command).checkpoint().function.command == command


def test_without_slurm_there_is_one_sentence(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="submitit"):
        cluster.submit_to_slurm(tmp_path, ["a"], {})


def test_without_submitit_the_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="pip install submitit"):
        cluster.submit_to_slurm(tmp_path, ["a"], {})
