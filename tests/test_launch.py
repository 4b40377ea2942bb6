"""The scripts of launch/, with fake cluster programs."""

import os
import re
import subprocess
import sys
from functools import partial

import pytest
import yaml
from helpers.paths import ROOT

LAUNCH = ROOT / "launch"
JOB = {"CONFIG": "paper:125m,ttt_e2e,pretrain", "WORKDIR": "/shared/my runs/a"}
XPK = {"CLUSTER": "c", "ZONE": "z", "TPU_TYPE": "v5p-8", "IMAGE": "i", "NAME": "run"}
TPU = {"TPU_NAME": "t", "ZONE": "z"}


@pytest.fixture
def shell(tmp_path):
    """Runs a script; `programs` are bash bodies of fake programs on PATH."""

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
        ("gke_xpk.sh", XPK | JOB),
        ("gke_gpu.sh", {"NAME": "run", "IMAGE": "i"} | JOB),
        ("tpu_vm.sh", TPU),
    ],
)
def test_a_missing_variable_is_named(shell, script, variables):
    for missing in variables:
        remaining = {name: value for name, value in variables.items() if name != missing}
        result = shell(str(LAUNCH / script), "train", programs={"scontrol": "exit 0"}, **remaining)
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
        "[--config=paper:125m,ttt_e2e,pretrain][--workdir=/shared/my runs/a]"
        "[--config.mesh.fsdp=8]"
    )
    assert result.stdout.splitlines()[1] == "local "
    assert ("scontrol requeue 7" in result.stdout) == requeued


def test_xpk_gets_one_quoted_command(shell):
    result = shell(
        str(LAUNCH / "gke_xpk.sh"), "--config.train.steps=3", programs={"xpk": SHOW}, **XPK, **JOB
    )
    assert "[--command][tttjax train --distributed --config=" in result.stdout
    assert "--workdir=/shared/my\\ runs/a --config.train.steps=3" in result.stdout


def test_tpu_hosts_all_train_in_the_background(shell):
    result = shell(str(LAUNCH / "tpu_vm.sh"), "train", programs={"gcloud": SHOW}, **TPU, **JOB)
    assert "[--worker=all]" in result.stdout
    assert "nohup .venv/bin/tttjax train --distributed --config=" in result.stdout


def test_gpu_benchmarks_end_with_the_ratios(shell, tmp_path):
    body = """
echo "$*" >>"$LOG"
[[ $2 == "$BROKEN" ]] && exit 3
if [[ $2 == meta-gradient ]]; then
    echo '[{"name": "fast", "step_seconds": 3}, {"name": "full", "step_seconds": 2}]'
else
    echo '[{"name": "paper:3b,a", "seconds": 4}, {"name": "b", "seconds": null}]'
fi"""
    python = {"python": f'exec {sys.executable} "$@"'}
    run = partial(shell, str(LAUNCH / "gpu_benchmarks.sh"), programs={"tttjax": body, **python})
    out, log = tmp_path / "out", tmp_path / "log"
    result = run(str(out), "--config.model.remat=none", LOG=str(log), BROKEN="", BATCH="2")
    assert result.returncode == 0, result.stderr
    assert "TTT-E2E / full attention: 1.50; inverse 0.67" in result.stdout
    assert re.search(r"(?m)^  3b,a +4.000 s", result.stdout)
    assert re.search(r"b +does not fit", result.stdout)
    assert result.stdout.count("TTT-E2E / full") == 1
    assert {path.name for path in out.iterdir()} == {"train_step.json", "prefill.json"}
    step, prefill = log.read_text().splitlines()
    assert "125m,ttt_e2e,pretrain --config.train.batch_size=2" in step
    assert "--lengths=131072" in prefill
    assert "3b,full,pretrain --config.model.remat=none" in prefill
    result = run(str(tmp_path / "new"), LOG=str(log), BROKEN="prefill")
    assert result.returncode == 1
    assert "1.50" in result.stdout
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["train_step.json"]


def test_gpu_systems_are_a_sweep_that_stops_in_time(shell, tmp_path):
    out = str(tmp_path / "out")
    script = partial(shell, str(LAUNCH / "gpu_systems.sh"), "my data", out)
    result = script("ttt_e2e", "full", programs={"tttjax": SHOW}, FLAGS="--seeds=2 --plan")
    assert (
        "[sweep][--config=small:6m,ttt_e2e][--config=small:6m,full][--data=my data]"
        in result.stdout
    )
    assert f"[--out={out}][--seeds=2][--plan]" in result.stdout
    body = "trap 'exit 75' TERM; sleep 60 & wait"
    assert script("full", programs={"tttjax": body}, LIMIT="0.2").returncode == 75
    assert script().returncode == 2
    assert shell(str(LAUNCH / "gpu_systems.sh"), "data", "", "full").returncode == 2
    result = script("full", programs={"tttjax": SHOW}, LIMIT="soon")
    assert (result.returncode, "LIMIT=soon must be" in result.stderr) == (2, True)
    assert not os.path.exists(out)


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
        "--config=paper:125m,ttt_e2e,pretrain",
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
        ({}, "no-such-python", "PYTHON=no-such-python is not an executable program"),
        ({"oldpython": OLD}, "oldpython", "is Python 3.9.1, but tttjax needs Python 3.11 or newer"),
        ({"barepython": NO_VENV}, "barepython", "cannot make virtual environments"),
    ],
)
def test_an_unsuitable_python_is_an_error(shell, tmp_path, programs, python, sentence):
    source = f"source {LAUNCH}/_venv.sh && ensure_venv test"
    venv = tmp_path / "new"
    result = shell(f"-c {source}", programs=programs, PYTHON=python, VENV=str(venv))
    assert result.returncode == 2
    assert sentence in result.stderr
    assert not venv.exists()


def test_a_folder_with_other_files_is_not_changed(shell, tmp_path):
    (tmp_path / "precious").write_text("keep")
    source = f"source {LAUNCH}/_venv.sh && ensure_venv test"
    result = shell(f"-c {source}", PYTHON=sys.executable, VENV=str(tmp_path))
    assert result.returncode == 2
    assert "holds other files" in result.stderr
    assert (tmp_path / "precious").read_text() == "keep"


@pytest.fixture
def quickstart(shell, tmp_path):
    """Runs quickstart.sh in a complete environment, with a `tttjax` that prints its arguments."""
    (tmp_path / "v env" / "bin").mkdir(parents=True)
    program = tmp_path / "v env" / "bin" / "tttjax"
    program.write_text(f"#!/usr/bin/env bash\n{SHOW}\n[[ $1 != $FAILING ]]\n")
    # Reports that everything is installed.
    python = tmp_path / "v env" / "bin" / "python"
    python.write_text("#!/usr/bin/env bash\nexit 0\n")
    for path in (program, python):
        path.chmod(0o755)

    def run(*arguments: str, failing: str = "nothing"):
        venv = str(tmp_path / "v env")
        return shell(str(LAUNCH / "quickstart.sh"), *arguments, VENV=venv, FAILING=failing)

    return run


def called(result):
    """The arguments of each call of tttjax."""
    lines = [line for line in result.stdout.splitlines() if line.startswith("[")]
    return [line[1:-1].split("][") for line in lines]


SENTENCEPIECE = ["--tokenizer=sentencepiece", "--vocab-size=1024"]
BYTES = ["--tokenizer=bytes"]
LONG = ["--min-document-tokens=513", "--val-fraction=0.1"]


def test_quickstart_prepares_trains_both_and_compares(quickstart):
    result = quickstart()
    assert result.returncode == 0, result.stderr
    experiment = "--config=quickstart"
    data = "--config.data.sources=quickstart/data"
    assert called(result) == [
        ["prepare", "stdlib", "--out=quickstart/data", *SENTENCEPIECE, *LONG],
        ["train", f"{experiment}:ttt_e2e", "--workdir=quickstart/ttt_e2e", data],
        ["train", f"{experiment}:window", "--workdir=quickstart/window", data],
        ["evaluate", "quickstart/ttt_e2e", "quickstart/window", "--out=quickstart/results"],
    ]
    assert "The plot: quickstart/results/loss_by_position.png" in result.stdout


def test_quickstart_passes_options_on(quickstart, tmp_path):
    (tmp_path / "my text").mkdir()
    (tmp_path / "my text" / "a.txt").write_text("x" * 120_000)
    (tmp_path / "my text" / "b.txt").write_text("x" * 120_000)
    words = ["--text", f"{tmp_path}/my text", f"--out={tmp_path}/o p", "--steps", "3"]
    result = quickstart(*words)
    prepare, *trains, evaluate = called(result)
    assert prepare == ["prepare", words[1], f"--out={tmp_path}/o p/data", *SENTENCEPIECE, *LONG]
    assert [words[-1] for words in trains] == ["--config.train.steps=3"] * 2
    assert evaluate[-1] == f"--out={tmp_path}/o p/results"


@pytest.mark.parametrize(
    ("out", "words"), [("quickstart", []), ("it's o p", ["--text", "a text.txt"])]
)
def test_quickstart_ends_with_a_command_to_paste(quickstart, tmp_path, out, words):
    (tmp_path / "a text.txt").write_text("some words")
    words = [word.replace("a text", f"{tmp_path}/a text") for word in words]
    result = quickstart("--out", out, *words)
    assert result.returncode == 0, result.stderr
    command = result.stdout.splitlines()[-1]
    pasted = subprocess.run(
        ["bash", "-euc", command], env={"FAILING": ""}, capture_output=True, text=True, cwd=ROOT
    )
    assert pasted.returncode == 0, pasted.stderr
    prompt = "--prompt=The" if words else "--prompt=def __init__(self"
    assert called(pasted) == [["generate", f"{out}/ttt_e2e", prompt]]


@pytest.mark.parametrize("arguments", [[], ["--tokenizer=bytes"], ["--tokenizer", "sentencepiece"]])
def test_quickstart_uses_bytes_for_a_small_text(quickstart, tmp_path, arguments):
    (tmp_path / "small.txt").write_text("x" * 199_999)
    prepare = called(quickstart("--text", str(tmp_path / "small.txt"), *arguments))[0]
    assert prepare[3:] == [*(SENTENCEPIECE if "sentencepiece" in arguments else BYTES), *LONG]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--text", "/nowhere"], "--text /nowhere: no such file or folder"),
        (["--text"], "--text needs a value; see bash .*quickstart.sh --help"),
        (["--steps="], "--steps needs a value"),
        (["--txet=a"], "unknown option --txet=a; see bash .*quickstart.sh --help"),
    ],
)
def test_quickstart_rejects_invalid_options(quickstart, arguments, sentence):
    result = quickstart(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(f"error: .*{sentence}.*\n", result.stderr)


@pytest.mark.parametrize(("failing", "calls"), [("prepare", 1), ("train", 2), ("evaluate", 4)])
def test_quickstart_stops_at_the_first_failure(quickstart, failing, calls):
    result = quickstart(failing=failing)
    assert result.returncode == 1
    assert len(called(result)) == calls
    assert "Done in" not in result.stdout
    assert "Next" not in result.stdout


def test_quickstart_has_help(quickstart):
    result = quickstart("--help")
    assert result.returncode == 0
    for option in ("--text PATH", "--out DIR", "--steps N", "--tokenizer KIND"):
        assert f" {option} " in result.stdout
    assert "#" not in result.stdout
    assert "set -euo" not in result.stdout


def test_quickstart_has_no_unguarded_list():
    """Under `set -u`, bash 3.2 of macOS takes "${LIST[@]}" of an empty list for unset."""
    script = (LAUNCH / "quickstart.sh").read_text()
    assert "[@]+" in script
    assert not re.search(r'(?<!\+)"\$\{\w+\[@\]\}"', script)
