"""The commands that submit a run for a topology, by the scripts of launch/ in the checkout.

The scripts take their options as environment variables. The topology sets those that count hosts
and chips.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tttjax
from tttjax.config import Config, check_mesh
from tttjax.errors import UserError
from tttjax.io.paths import is_bucket
from tttjax.planning.topologies import Topology, console_name

CHECKOUT = Path(tttjax.__file__).parents[1]
CHIPS_PER_HOST = 4  # at most, of a slice of several hosts

# GKE's label cloud.google.com/gke-tpu-accelerator.
_GKE_TPUS = {
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "v7x": "tpu7x",
}


@dataclass(frozen=True)
class Launcher:
    """A script, its arguments, the program it needs, and the variables that only a user knows.

    platforms: of `Topology.platform`.
    """

    script: str
    program: str
    platforms: tuple[str, ...]
    required: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()


LAUNCHERS = {
    "slurm": Launcher("slurm.sh", "sbatch", ("cuda",)),
    "xpk": Launcher("gke_xpk.sh", "xpk", ("tpu",), ("CLUSTER", "ZONE", "IMAGE", "NAME")),
    "jobset": Launcher("jobset.sh", "kubectl", ("cuda", "tpu"), ("IMAGE", "NAME")),
    "tpu-vm": Launcher("tpu_vm.sh", "gcloud", ("tpu",), ("TPU_NAME", "ZONE"), ("run",)),
}


@dataclass(frozen=True)
class Launch:
    """A command to run in the checkout. pipe_to: the command that takes what it prints."""

    program: str
    script: Path
    words: tuple[str, ...]
    variables: Mapping[str, str]
    pipe_to: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The command line, for a shell in the checkout."""
        pairs = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        pipe = f" | {shlex.join(self.pipe_to)}" if self.pipe_to else ""
        return f"{' '.join(pairs)} {shlex.join(self.words)}{pipe}"

    def environment(self) -> dict[str, str]:
        """The variables that the script sees."""
        return {**os.environ, **self.variables}

    def submitted(self) -> str:
        """The manifest, or else the script, that the command submits."""
        if not self.pipe_to:
            return self.script.read_text()
        result = self._run(capture_output=True, text=True)
        if result.returncode:
            raise UserError(result.stderr.strip().rpartition("\n")[2])
        return result.stdout

    def submit(self) -> int:
        """Runs the command; returns its exit code. Raises UserError if its program is missing."""
        if shutil.which(self.program) is None:
            raise UserError(
                f"`{self.program}` is not on PATH: install it, or copy the command of --dry-run to "
                "a machine that has it"
            )
        if not self.pipe_to:
            return self._run().returncode
        return subprocess.run(self.pipe_to, input=self.submitted(), text=True).returncode

    def _run(self, **options) -> subprocess.CompletedProcess:
        return subprocess.run(self.words, env=self.environment(), cwd=CHECKOUT, **options)


def make_launch(
    name: str,
    topology: Topology,
    config: Config,
    *,
    recipe: str,
    workdir: str,
    variables: Mapping[str, str],
    overrides: Sequence[str],
) -> Launch:
    """The command of the launcher `name`.

    variables: of its script, as its first lines describe them; they replace those of the topology.
    overrides: arguments of `tttjax train`.
    Raises UserError if launcher and topology, or mesh and topology, do not go together, a variable
    is missing or unknown, no host would find the data or keep the run, or this is no checkout.
    """
    launcher = LAUNCHERS[name]
    script = CHECKOUT / "launch" / launcher.script
    if not script.exists() or Path.cwd() != CHECKOUT:
        where = f"cd {CHECKOUT}" if script.exists() else "a wheel has no scripts"
        raise UserError(f"tttjax launch runs in the checkout of tttjax ({where})")
    if topology.platform not in launcher.platforms:
        raise UserError(
            f"--topology={topology.name} is not for `tttjax launch {name}`; choose "
            f"{' or '.join(_EXAMPLES[platform] for platform in launcher.platforms)}"
        )
    text = script.read_text()
    for variable in variables:
        if not (re.search(rf"\b{variable}\b", text) or variable.startswith("SBATCH_")):
            raise UserError(
                f"--set={variable}: launch/{launcher.script} has no such variable; its first lines "
                "list them"
            )
    variables = _variables(name, topology) | dict(variables)
    is_gpu = topology.platform == "cuda"
    check_mesh(config, topology.devices, topology.shape[1] if is_gpu else 1)
    _check_data(config.data.sources)
    for variable in launcher.required:
        if not (variables.get(variable) or os.environ.get(variable)):
            raise UserError(
                f"give --set={variable}=...; the first lines of launch/{launcher.script} say what "
                "it is"
            )
    if name == "jobset" and not is_bucket(workdir):
        claim = variables.get("CLAIM") or os.environ.get("CLAIM")
        if not (claim and workdir.startswith("/shared/")):
            raise UserError(
                f"--workdir={workdir} would end with its pod: give a bucket (gs://, s3://), or "
                "--set=CLAIM=... and a folder in /shared, where the claim is mounted"
            )
    words = [f"launch/{launcher.script}", *launcher.arguments, *overrides]
    if name == "slurm":
        per_host, hosts = topology.shape
        words = ["sbatch", f"--nodes={hosts}", f"--gpus-per-node={per_host}", *words]
    return Launch(
        program=launcher.program,
        script=script,
        words=tuple(words),
        variables={"CONFIG": recipe, "WORKDIR": workdir, **variables},
        pipe_to=("kubectl", "apply", "-f", "-") if name == "jobset" else (),
    )


def _check_data(sources: Sequence[str]) -> None:
    """Refuses data that no host would find."""
    if not sources:
        raise UserError("the run has no data: add --config.data.sources=DIR, with prepared data")
    for source in sources:
        if not (is_bucket(source) or os.path.isabs(source)):
            raise UserError(
                f"data.sources={source} must be an absolute path, the same on all hosts, or in a "
                "bucket"
            )


_EXAMPLES = {"cuda": "GPUs, as in gpu:h100:8x4", "tpu": "a TPU slice, as in v5e:4x4"}


def _variables(name: str, topology: Topology) -> dict[str, str]:
    """The variables that say how many hosts and chips there are."""
    if name == "slurm":
        return {}
    if topology.platform == "cuda":
        per_host, hosts = topology.shape
        return {"HOSTS": str(hosts), "GPUS": str(per_host)}
    assert topology.accelerator is not None
    if name == "jobset":
        chips = min(topology.num_chips, CHIPS_PER_HOST)
        shape = "x".join(map(str, topology.shape))
        label = _GKE_TPUS[topology.accelerator.name]
        return {"TPU": label, "TOPOLOGY": shape, "CHIPS": str(chips)}
    return {"TPU_TYPE": console_name(topology)}
