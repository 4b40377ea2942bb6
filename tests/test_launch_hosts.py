"""Scripts of launch/ for several hosts obey the exit codes of `tttjax train`: fake programs."""

import re
import signal
import subprocess

import pytest
from helpers.paths import ROOT
from helpers.scripts import LAUNCH, SHOW, write_program

JOB = {"CONFIG": "paper:125m,ttt_e2e,pretrain", "WORKDIR": "/shared/my runs/a"}
XPK = {"CLUSTER": "c", "ZONE": "z", "TPU_TYPE": "v5p-8", "IMAGE": "i", "NAME": "run"}
TPU = {"TPU_NAME": "t", "ZONE": "z"}
AGAIN = (75, 76, 134, 137, 143, 1)  # codes after which a run starts again


@pytest.mark.parametrize(
    ("script", "variables"),
    [
        ("slurm.sh", JOB | {"SLURM_JOB_ID": "7"}),
        ("gke_xpk.sh", XPK | JOB),
        ("jobset.sh", {"NAME": "run", "IMAGE": "i"} | JOB),
        ("tpu_vm.sh train", TPU | JOB),
        ("tpu_vm.sh run", TPU | JOB | {"TPU_TYPE": "v5p-8"}),
    ],
)
def test_a_missing_variable_is_named(shell, script, variables):
    script, *arguments = script.split()
    for missing in variables:
        remaining = {name: value for name, value in variables.items() if name != missing}
        result = shell(
            str(LAUNCH / script), *arguments, programs={"scontrol": "exit 0"}, **remaining
        )
        assert result.returncode != 0
        assert missing in result.stderr


# Slurm -------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(shell, tmp_path):
    """Runs slurm.sh with a program of the given exit code, by an srun of the given body."""

    def run(code, *arguments, srun='exec "$@"', **variables):
        write_program(
            tmp_path / "bin" / "tttjax", f'{SHOW}; echo "local ${{SLURM_LOCALID-}}"; exit {code}'
        )
        programs = {
            "srun": f"""
while [[ $1 == -* ]]; do echo "option $1"; shift; done
export SLURM_NTASKS=2 SLURM_PROCID=1 SLURM_LOCALID=0
{srun}""",
            "scontrol": '[[ $1 == show ]] && printf "node1\\nnode2\\n" || echo "scontrol $*"',
        }
        job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT)}
        job |= {"SLURM_JOB_NODELIST": "node[1-2]", "VENV": str(tmp_path)}
        return shell(
            str(LAUNCH / "slurm.sh"), *arguments, programs=programs, **(job | JOB | variables)
        )

    return run


@pytest.mark.parametrize("code", [0, 2, *AGAIN])
def test_slurm_requeues_after_any_loss(slurm, code):
    result = slurm(code)
    assert result.returncode == code, result.stderr
    assert ("scontrol requeue 7" in result.stdout) == (code in AGAIN)
    for limits in ({"REQUEUE": "no"}, {"MAX_RESTARTS": "9", "SLURM_RESTART_COUNT": "9"}):
        result = slurm(code, **limits)
        assert result.returncode == code
        assert "scontrol requeue" not in result.stdout


def test_slurm_sees_the_refusal_of_one_task(slurm):
    """srun then ends the other task, and exits with the code of that."""
    result = slurm(2, srun='"$@"; exit 137')
    assert result.returncode == 2
    assert "scontrol requeue" not in result.stdout


def test_slurm_starts_one_process_per_host(slurm):
    option, started, local = slurm(0, "--config.mesh.fsdp=8").stdout.splitlines()
    assert option == "option --kill-on-bad-exit=1"
    assert started == (
        "[train][--coordinator][node1:20007][--process-count][2][--process-id][1]"
        "[--config=paper:125m,ttt_e2e,pretrain][--workdir=/shared/my runs/a]"
        "[--config.mesh.fsdp=8]"
    )
    assert local == "local "


def test_slurm_takes_a_container(slurm, tmp_path):
    write_program(tmp_path / "tttjax", SHOW)  # on the PATH of the image
    output = slurm(0, IMAGE="org/image", VENV="/nowhere").stdout
    assert "option --container-image=org/image\n" in output
    assert "option --container-mounts=/shared/my runs:/shared/my runs\n" in output
    assert "[train][--coordinator]" in output
    assert "option --container-mounts=/data" in slurm(0, IMAGE="i", MOUNTS="/data").stdout


# XPK ---------------------------------------------------------------------------------------------


def xpk_options(shell, *arguments, **variables):
    output = shell(
        str(LAUNCH / "gke_xpk.sh"), *arguments, programs={"xpk": SHOW}, **XPK, **JOB, **variables
    ).stdout
    words = output.strip()[1:-1].split("][")
    assert words[:2] == ["workload", "create"]
    return words[2:]


def value_of(words, option):
    return next(
        word.partition("=")[2] or words[index + 1]
        for index, word in enumerate(words)
        if word.partition("=")[0] == option
    )


def test_xpk_restarts_after_any_code_but_2(shell):
    words = xpk_options(shell, XPK_FLAGS="--priority=high --storage=disk")
    codes = {42, *range(127, 256)}  # XPK's own
    for part in value_of(words, "--restart-on-exit-codes").split(","):
        first, _, last = part.partition("-")
        codes |= set(range(int(first), int(last or first) + 1))
    assert codes == set(range(256)) - {0, 2}
    assert int(value_of(words, "--max-restarts")) >= 100
    assert value_of(words, "--termination-grace-period-seconds") == "300"
    assert value_of(words, "--env") == "TTTJAX_COMPILATION_CACHE=/shared/my runs/compiled"
    assert {"--priority=high", "--storage=disk"} <= set(words)


def test_signals_and_exit_codes_pass_the_shell_of_xpk(shell, tmp_path):
    """XPK runs the command in a subshell, sends SIGTERM to that one, and waits for its code."""
    command = value_of(xpk_options(shell, "--config.train.steps=3"), "--command")
    write_program(tmp_path / "tttjax", f"trap 'exit 75' TERM; {SHOW}; while :; do sleep 0.05; done")
    wrapper = f"trap 'kill -TERM $!' TERM; ({command}) & wait $!; wait $!; exit $?"
    with subprocess.Popen(
        ["bash", "-c", wrapper], stdout=subprocess.PIPE, text=True, env={"PATH": f"{tmp_path}:/bin"}
    ) as process:
        words = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 75
    assert words.startswith("[train][--distributed][--config=paper:125m,ttt_e2e,pretrain]")
    assert words.endswith("[--workdir=/shared/my runs/a][--config.train.steps=3]\n")


# TPU VMs -----------------------------------------------------------------------------------------


GCLOUD = r"""
case "$*" in
    *"queued-resources describe"*)
        cat "$CLOUD/state" 2>/dev/null || { echo "NOT_FOUND: no such resource" >&2; exit 1; } ;;
    *"queued-resources create"*)
        echo "$*" >>"$CLOUD/calls"
        [[ -z "${REFUSED:-}" ]] || exit 1
        mkdir -p "$CLOUD/host0" "$CLOUD/host1"
        echo ACTIVE >"$CLOUD/state" ;;
    *"queued-resources delete"*) echo deleted >>"$CLOUD/calls"; rm "$CLOUD/state" ;;
    *" scp "*) for host in "$CLOUD"/host?; do cp "$5" "$host/tttjax.tar.gz"; done ;;
    *" ssh "*)
        [[ "$(cat "$CLOUD/state")" == ACTIVE ]] || exit 255
        command="${!#}"
        for host in "$CLOUD"/host?; do (cd "$host" && bash -c "${command#--command=}"); done ;;
esac
"""
# An archive with an environment that is complete.
GIT = r"""
mkdir -p "$CLOUD/checkout/launch" "$CLOUD/checkout/.venv/bin"
echo 'ensure_venv() { :; }' >"$CLOUD/checkout/launch/_venv.sh"
cp "$CLOUD/tttjax" "$CLOUD/checkout/.venv/bin/tttjax"
tar -czf "${3#--output=}" -C "$CLOUD/checkout" .
"""
# Of PLAN, the words for this start, one of each host: an exit code; `wait` for SIGTERM;
# `preempted`: the slice goes away.
TTTJAX = r"""
host="${PWD%/tttjax}" plan=($PLAN)
echo "$*" >>"$CLOUD/starts.${host: -1}"
start=$(wc -l <"$CLOUD/starts.${host: -1}")
word="${plan[2 * (start - 1) + ${host: -1}]}"
trap 'exit 75' TERM
case "$word" in
    wait) for _ in {1..1200}; do sleep 0.05; done ;;  # a minute
    preempted)
        sleep 1  # until both have started
        echo SUSPENDED >"$CLOUD/state"
        rm -r "$CLOUD"/host? ;;
    *) exit "$word" ;;
esac
"""


@pytest.fixture
def tpu(shell, tmp_path):
    """Runs tpu_vm.sh on a cloud of two hosts that follows the plan."""
    write_program(tmp_path / "cloud" / "tttjax", TTTJAX)

    def run(action, plan="", **variables):
        return shell(
            str(LAUNCH / "tpu_vm.sh"),
            action,
            "--config.mesh.fsdp=4",
            programs={"gcloud": GCLOUD, "git": GIT},
            **(TPU | JOB | {"TPU_TYPE": "v6e-8", "POLL": "0.1", "PLAN": plan}),
            CLOUD=str(tmp_path / "cloud"),
            **variables,
        )

    return run


def lines(path):
    return path.read_text().splitlines()


def test_a_tpu_slice_is_kept_at_work_until_the_run_is_complete(tpu, tmp_path):
    result = tpu("run", "75 75 wait 76 134 wait preempted wait 137 wait 1 wait 0 0")
    assert result.returncode == 0, result.stderr
    ended = re.findall("training ended with ([0-9]+)", result.stdout)
    assert (ended[0], ended[2], ended[-1], len(ended)) == ("75", "134", "0", 7)
    cloud = tmp_path / "cloud"
    created, deleted, created_again = lines(cloud / "calls")
    assert "--accelerator-type=v6e-8 --runtime-version=v2-alpha-tpuv6e --spot" in created
    assert (deleted, created_again) == ("deleted", created)
    assert lines(cloud / "starts.1") == 7 * [
        "train --distributed --config=paper:125m,ttt_e2e,pretrain --workdir=/shared/my runs/a "
        "--config.mesh.fsdp=4"
    ]


@pytest.mark.parametrize("plan", ["2 2", "wait 2", "76 76 2 wait"])
def test_a_tpu_slice_is_left_alone_at_a_user_error(tpu, tmp_path, plan):
    assert tpu("run", plan).returncode == 2
    assert len(lines(tmp_path / "cloud" / "starts.0")) == len(plan.split()) // 2


def test_restarts_of_a_tpu_slice_are_bounded(tpu, tmp_path):
    assert tpu("run", "1 1 " * 5, MAX_RESTARTS="2").returncode == 1
    assert len(lines(tmp_path / "cloud" / "starts.0")) == 3
    (tmp_path / "cloud" / "state").unlink()
    (tmp_path / "cloud" / "calls").unlink()
    result = tpu("run", REFUSED="yes")
    assert (result.returncode, "no start in 5 tries" in result.stderr) == (2, True)
    assert len(lines(tmp_path / "cloud" / "calls")) == 5


def test_training_on_a_tpu_slice_is_started_once_and_stopped(tpu, tmp_path):
    cloud = tmp_path / "cloud"
    for host in "01":
        (cloud / f"host{host}").mkdir()
    (cloud / "state").write_text("ACTIVE")
    assert tpu("install").returncode == 0
    assert tpu("train", "wait wait").returncode == 0
    result = tpu("train", "wait wait")
    assert "training is already running" in result.stderr
    assert tpu("stop").returncode == 0
    assert tpu("run", "- - 0 0").returncode == 0
    assert len(lines(cloud / "starts.0")) == 2
