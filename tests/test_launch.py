"""The shell scripts of launch/, run against stand-ins for the programs of a cluster."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
JOB = {"CONFIG": "experiments/paper.py:125m,ttt_e2e,pretrain", "WORKDIR": "/shared/my runs/a"}
PLACE = {"CLUSTER": "c", "ZONE": "z", "TPU_TYPE": "v5p-8", "IMAGE": "i", "NAME": "run"}
TPU = {"TPU_NAME": "t", "ZONE": "z"}


@pytest.fixture
def shell(tmp_path):
    """Runs a script; `programs` are bodies of bash that stand in for real ones on PATH."""

    def run(script: str, *arguments: str, programs=(), **variables: str):
        programs = dict(programs)
        for name, body in programs.items():
            (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (tmp_path / name).chmod(0o755)
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **variables}
        command = ["bash", *script.split(" ", 1)] if script.startswith("-c") else ["bash", script]
        return subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, cwd=ROOT
        )

    return run


SHOW = "printf '[%s]' \"$@\"; echo"


SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize(
    ("script", "variables"),
    [
        ("slurm.sh", JOB | {"SLURM_JOB_ID": "7"}),
        ("gke_xpk.sh", PLACE | JOB),
        ("gke_gpu.sh", {"NAME": "run", "IMAGE": "i"} | JOB),
        ("tpu_vm.sh", TPU),
    ],
)
def test_a_missing_variable_is_named(shell, script, variables):
    for missing in variables:
        rest = {name: value for name, value in variables.items() if name != missing}
        result = shell(str(LAUNCH / script), "train", programs={"scontrol": "exit 0"}, **rest)
        assert result.returncode != 0
        assert missing in result.stderr


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (1, False)])
def test_slurm_starts_one_process_per_host_and_requeues(shell, tmp_path, code, requeued):
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "tttjax"
    program.write_text(
        f'#!/usr/bin/env bash\n{SHOW}; echo "local ${{SLURM_LOCALID-}}"; exit {code}'
    )
    program.chmod(0o755)
    programs = {
        "srun": 'SLURM_NTASKS=2 SLURM_PROCID=1 SLURM_LOCALID=0 exec "$@"',
        "scontrol": '[[ $1 == show ]] && printf "node1\\nnode2\\n" || echo "scontrol $*"',
    }
    result = shell(
        str(LAUNCH / "slurm.sh"),
        "--config.mesh.fsdp=8",
        programs=programs,
        SLURM_JOB_ID="7",
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_JOB_NODELIST="node[1-2]",
        VENV=str(tmp_path),
        **JOB,
    )
    assert result.returncode == code, result.stderr
    assert result.stdout.splitlines()[0] == (
        "[train][--coordinator][node1:20007][--process-count][2][--process-id][1]"
        "[--config=experiments/paper.py:125m,ttt_e2e,pretrain][--workdir=/shared/my runs/a]"
        "[--config.mesh.fsdp=8]"
    )
    assert result.stdout.splitlines()[1] == "local "
    assert ("scontrol requeue 7" in result.stdout) == requeued


def test_xpk_gets_one_quoted_command(shell):
    result = shell(
        str(LAUNCH / "gke_xpk.sh"), "--config.train.steps=3", programs={"xpk": SHOW}, **PLACE, **JOB
    )
    assert "[--command][tttjax train --distributed --config=" in result.stdout
    assert "--workdir=/shared/my\\ runs/a --config.train.steps=3" in result.stdout


def test_tpu_hosts_all_train_in_the_background(shell):
    result = shell(str(LAUNCH / "tpu_vm.sh"), "train", programs={"gcloud": SHOW}, **TPU, **JOB)
    assert "[--worker=all]" in result.stdout
    assert "nohup .venv/bin/tttjax train --distributed --config=" in result.stdout


def test_the_gpu_job_is_valid_yaml(shell):
    result = shell(
        str(LAUNCH / "gke_gpu.sh"),
        "--config.data.sources=it's",
        NAME="run",
        IMAGE="i",
        HOSTS="4",
        CLAIM="disk",
        **JOB,
    )
    service, job = yaml.safe_load_all(result.stdout)
    assert service["spec"]["selector"] == {"job-name": "run"}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 4
    pod = job["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"][2:] == [
        "--coordinator=run-0.run:8476",
        "--process-count=4",
        "--process-id=$(JOB_COMPLETION_INDEX)",
        "--config=experiments/paper.py:125m,ttt_e2e,pretrain",
        "--workdir=/shared/my runs/a",
        "--config.data.sources=it's",
    ]
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]} == {"memory", "shared"}


OLD = 'if [[ "$1" == --version ]]; then echo "Python 3.9.1"; else exit 1; fi'
NO_VENV = f'case "$2" in *ensurepip*) exit 1 ;; *) exec {sys.executable} "$@" ;; esac'


@pytest.mark.parametrize(
    ("programs", "python", "sentence"),
    [
        ({}, "no-such-python", "PYTHON=no-such-python is not a program"),
        ({"oldpython": OLD}, "oldpython", "is Python 3.9.1, but tttjax needs Python 3.11 or newer"),
        ({"barepython": NO_VENV}, "barepython", "cannot make virtual environments"),
    ],
)
def test_an_unfit_python_is_refused_in_one_sentence(shell, tmp_path, programs, python, sentence):
    source = f"source {LAUNCH}/_venv.sh && ensure_venv test"
    venv = tmp_path / "new"
    result = shell(f"-c {source}", programs=programs, PYTHON=python, VENV=str(venv))
    assert result.returncode == 2
    assert sentence in result.stderr
    assert not venv.exists()


def test_a_folder_with_other_files_is_left_alone(shell, tmp_path):
    (tmp_path / "precious").write_text("keep")
    source = f"source {LAUNCH}/_venv.sh && ensure_venv test"
    result = shell(f"-c {source}", PYTHON=sys.executable, VENV=str(tmp_path))
    assert result.returncode == 2
    assert "holds other files" in result.stderr
    assert (tmp_path / "precious").read_text() == "keep"
