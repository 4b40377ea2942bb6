"""Trials of a sweep on a cluster: a Slurm array through submitit, an indexed Kubernetes Job.

Both run `tttjax sweep --out=DIR --trial=NAME` for every trial that has not ended. The folder must
be on a disk that all nodes mount at the same path; `tttjax sweep --out=DIR --report` reads what is
there.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tttjax.errors import UserError

SLURM_LOGS = "slurm"
RETRIES = 20  # starts of a trial after preemptions


def trial_command(out: Path, name: str, flags: Sequence[str] = ()) -> list[str]:
    """The command of one trial, with this Python."""
    command = [sys.executable, "-m", "tttjax", "sweep", f"--out={out.absolute()}", *flags]
    return [*command, f"--trial={name}"]


class SlurmTrial:
    """What submitit runs in a job; when the job is preempted or times out, it queues again."""

    def __init__(self, command: Sequence[str]):
        self.command = list(command)
        self._popen: subprocess.Popen | None = None

    def __call__(self) -> None:
        # Slurm sends submitit's signal to all processes of a job; it would end the trial unsaved.
        ignore = ["sh", "-c", 'trap "" USR1 USR2; exec "$@"', "sh"]
        self._popen = subprocess.Popen([*ignore, *self.command])
        if code := self._popen.wait():
            raise RuntimeError(f"{shlex.join(self.command)} ended with exit code {code}")

    def checkpoint(self) -> Any:
        """Has the trial save, and queues the same command."""
        from submitit.helpers import DelayedSubmission

        if self._popen is not None:
            self._popen.terminate()
            self._popen.wait()
        return DelayedSubmission(SlurmTrial(self.command))


def submit_to_slurm(
    out: Path,
    names: Sequence[str],
    options: Mapping[str, Any],
    cluster: str | None = None,
    flags: Sequence[str] = (),
) -> list[Any]:
    """Submits an array of trials; returns submitit's jobs.

    options: of submitit, such as timeout_min, gpus_per_node, slurm_partition. cluster: "local" runs
    them as processes here, to try it without Slurm. flags: more of a trial's command.
    Raises UserError without submitit, without Slurm, and for options it does not know.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError("--on=slurm needs submitit: pip install submitit") from error
    try:
        executor = submitit.AutoExecutor(folder=out / SLURM_LOGS, cluster=cluster or "slurm")
        executor.update_parameters(name=f"sweep-{out.name}", **options)
        with executor.batch():
            jobs = [executor.submit(SlurmTrial(trial_command(out, name, flags))) for name in names]
    except (RuntimeError, NameError, TypeError, AssertionError) as error:
        raise UserError(f"submitit refuses the jobs: {error}") from error
    return jobs


def kubernetes_manifest(
    out: Path,
    names: Sequence[str],
    image: str,
    volume_claim: str,
    parallelism: int,
    gpus: int = 0,
    flags: Sequence[str] = (),
) -> dict[str, Any]:
    """An indexed Job, one index a trial, as `kubectl apply -f` takes it.

    image: has tttjax installed. volume_claim: of the shared disk, mounted at the path of `out`.
    gpus: NVIDIA GPUs of a trial. flags: more of a trial's command.
    Exit code 75 (saved, to be continued) starts an index again; 2 (user error) fails it at once.
    """
    command = shlex.join(["tttjax", "sweep", f"--out={out.absolute()}", *flags])
    script = (
        f'set -- {shlex.join(names)}; shift "$JOB_COMPLETION_INDEX"; exec {command} --trial="$1"'
    )
    mount = {"name": "sweep", "mountPath": str(out.absolute())}
    container: dict[str, Any] = {
        "name": "trial",
        "image": image,
        "command": ["sh", "-c", script],
        "volumeMounts": [mount],
    }
    if gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": gpus}}
    label = re.sub("[^a-z0-9]", "-", out.name.lower()).strip("-") or "sweep"
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        # Pods are called after the job, with the index and a suffix, in 63 characters.
        "metadata": {"name": f"sweep-{label}"[:50].rstrip("-")},
        "spec": {
            "completionMode": "Indexed",
            "completions": len(names),
            "parallelism": parallelism,
            "backoffLimitPerIndex": RETRIES,
            "maxFailedIndexes": len(names),
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "FailIndex",
                        "onExitCodes": {
                            "containerName": "trial",
                            "operator": "In",
                            "values": [2],
                        },
                    }
                ]
            },
            "template": {
                "spec": {
                    "restartPolicy": "Never",
                    "containers": [container],
                    "volumes": [
                        {"name": "sweep", "persistentVolumeClaim": {"claimName": volume_claim}}
                    ],
                }
            },
        },
    }
