"""launch/slurm.sh on a real Slurm of two nodes, both on this machine.

Needs root and the packages slurm-wlm and munge.
"""

import os
import secrets
import shutil
import socket
import subprocess
import time

import pytest
from helpers.scripts import LAUNCH, write_program

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "srun")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MISSING = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.exhaustive,
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} (slurm-wlm, munge)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons need root here"),
]

CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SchedulerParameters=sched_interval=2
SelectType=select/cons_tres
KillWait=5
SwitchType=switch/none
MpiDefault=none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
NodeName=a NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=b NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=main Nodes=ALL Default=YES State=UP
"""
# Of PLAN, the words for this start, one of each process: an exit code; `kill` by SIGKILL; `wait`
# for SIGTERM; `hang`.
TTTJAX = """
plan=($PLAN)
word="${plan[2 * ${SLURM_RESTART_COUNT:-0} + SLURM_PROCID]}"
echo "start ${SLURM_RESTART_COUNT:-0}: $word"
trap 'exit 75' TERM
case "$word" in
    kill) kill -9 $$ ;;
    wait) while :; do sleep 0.1; done ;;
    hang) trap '' TERM; while :; do sleep 0.1; done ;;
    *) sleep 1; exit "$word" ;;
esac
"""


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment of the commands of a running Slurm."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool-a", "spool-b"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, ports=free_ports(3)))
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o400)
    files = ("key-file", "key"), ("socket", "socket"), ("pid-file", "pid")
    files = *files, ("log-file", "log"), ("seed-file", "seed")
    munged = [f"--{option}={folder}/munge.{ending}" for option, ending in files]
    environment = {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    commands = [
        ["munged", "--foreground", "--force", *munged],
        ["slurmctld", "-D"],
        *(["slurmd", "-D", "-N", node] for node in "ab"),
    ]
    daemons = []
    try:
        for command in commands:
            with (folder / "daemons.log").open("a") as log:
                daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            time.sleep(1)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


@pytest.mark.parametrize(
    ("plan", "state", "restarts"),
    [
        ("wait 75 kill wait 134 hang 76 76 0 0", "COMPLETED ExitCode=0:0", 4),
        ("76 hang hang 2", "FAILED ExitCode=2:0", 1),
    ],
)
def test_a_job_is_requeued_until_it_is_complete_or_refused(slurm, tmp_path, plan, state, restarts):
    environment = slurm
    write_program(tmp_path / "bin" / "tttjax", TTTJAX)
    variables = {"PLAN": plan, "CONFIG": "c", "WORKDIR": str(tmp_path / "run")}
    variables |= {"REPOSITORY": str(tmp_path), "VENV": str(tmp_path)}
    log = tmp_path / "log"
    command = ["sbatch", "--parsable", "--nodes=2", f"--output={log}", str(LAUNCH / "slurm.sh")]
    job = subprocess.run(
        command, env=environment | variables, check=True, capture_output=True, text=True
    ).stdout.strip()
    end = time.monotonic() + 300
    while time.monotonic() < end:
        time.sleep(1)
        shown = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", job],
            env=environment,
            capture_output=True,
            text=True,
        ).stdout
        fields = dict(word.partition("=")[::2] for word in shown.split())
        if fields.get("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL"):
            break
    assert f"{fields['JobState']} ExitCode={fields['ExitCode']}" == state, log.read_text()
    assert int(fields["Restarts"]) == restarts
