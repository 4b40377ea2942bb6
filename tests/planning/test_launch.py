"""`tttjax launch`: what it submits, by fake programs of the clusters, and what it refuses."""

import dataclasses
import os
import shlex

import pytest
import yaml
from helpers.paths import ROOT, TINY
from helpers.scripts import LAUNCH, SHOW, write_program

from tttjax.cli import launch as cli_launch
from tttjax.cli.main import main
from tttjax.config import load_config
from tttjax.errors import UserError
from tttjax.planning import launch
from tttjax.planning import make as make_module
from tttjax.planning.make import make_plan
from tttjax.planning.topologies import console_name, parse_topology

DATA = "--config.data.sources=/shared/data"
JOB = [f"--config={TINY}", "--workdir=/shared/my runs/a", DATA]
NAMES = {
    "slurm": [],
    "jobset": ["--set=NAME=run", "--set=IMAGE=i", "--set=CLAIM=disk"],
    "xpk": [f"--set={name}=x" for name in ("CLUSTER", "ZONE", "IMAGE", "NAME")],
    "tpu-vm": ["--set=TPU_NAME=t", "--set=ZONE=z"],
}
UNCHECKED = "not checked: memory, because of --no-plan"


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Fake programs of all clusters, which print their arguments and variables."""
    body = f'touch "${{0%/*}}/submitted"; {SHOW} "($CONFIG)($WORKDIR)"'
    for name in ("sbatch", "xpk"):
        write_program(tmp_path / name, body)
    write_program(tmp_path / "kubectl", f"{body}; cat")
    write_program(tmp_path / "gcloud", f"{body}; echo NOT_FOUND >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(ROOT)
    return tmp_path


def submit(name, topology, *words):
    return main(["launch", name, *JOB, f"--topology={topology}", *NAMES[name], *words])


def test_slurm_gets_nodes_and_gpus(cluster, capfd):
    assert submit("slurm", "gpu:h100:4x2", "--no-plan", "--config.train.batch_size=16") == 0
    out = capfd.readouterr().out
    assert UNCHECKED in out
    assert (
        f"[--nodes=2][--gpus-per-node=4][launch/slurm.sh][{DATA}][--config.train.batch_size=16]"
        f"({TINY})(/shared/my runs/a)" in out
    )


@pytest.mark.parametrize(
    ("topology", "hosts", "limits"),
    [
        ("gpu:h100:4x2", 2, {"nvidia.com/gpu": 4}),
        ("v5e:2x4", 2, {"google.com/tpu": 4}),
        ("v5e:1x1", 1, {"google.com/tpu": 1}),
    ],
)
def test_kubernetes_gets_the_manifest_of_the_dry_run(topology, hosts, limits, cluster, capfd):
    manifests = []
    for words in (["--dry-run"], []):
        assert submit("jobset", topology, "--no-plan", *words) == 0
        out = capfd.readouterr().out
        assert ("[apply][-f][-]" in out) == (not words)
        manifests.append(yaml.safe_load(out[out.index("apiVersion:") :]))
    assert manifests[0] == manifests[1]
    job = manifests[0]["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == hosts
    container = job["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == limits


def test_xpk_gets_the_type_of_the_slice(cluster, capfd):
    assert submit("xpk", "v5p:2x2x2", "--no-plan") == 0
    assert "[--tpu-type][v5p-16][--num-slices][1]" in capfd.readouterr().out


def test_the_exit_code_is_that_of_the_command(cluster, capfd, monkeypatch):
    monkeypatch.setenv("POLL", "0")
    assert submit("tpu-vm", "v6e:2x4", "--no-plan") == 2
    assert (cluster / "submitted").exists()


@pytest.mark.parametrize("name", launch.LAUNCHERS)
def test_a_dry_run_submits_nothing(name, cluster, capfd):
    topology = "gpu:h100:4x2" if name == "slurm" else "v5e:2x4"
    assert submit(name, topology, "--no-plan", "--dry-run") == 0
    out = capfd.readouterr().out
    command = next(line for line in out.splitlines() if line.startswith("$ "))
    assert "WORKDIR='/shared/my runs/a'" in command
    assert f"launch/{launch.LAUNCHERS[name].script}" in shlex.split(command)
    assert not (cluster / "submitted").exists()


def test_launchers_of_the_command_have_scripts_that_run():
    assert set(launch.LAUNCHERS) == set(cli_launch.LAUNCHERS)
    for launcher in launch.LAUNCHERS.values():
        script = LAUNCH / launcher.script
        assert os.access(script, os.X_OK)
        header = script.read_text().partition("set -euo")[0]
        assert all(f"# {name}" in header or f", {name}" in header for name in launcher.required)


@pytest.fixture(scope="module")
def plan():
    """A plan for this machine, which needs no compiler of another."""
    config = load_config(str(TINY), ["model.num_layers=1", "model.remat=none"])
    return make_plan(config, parse_topology("cpu:1"))


def test_only_a_plan_that_fits_is_submitted(plan, cluster, capfd, monkeypatch):
    planned = []

    def make(config, topology, name):
        planned.append((config.train.steps, topology.name, name))
        return dataclasses.replace(plan, name=name, topology=topology.name, **outcome)

    monkeypatch.setattr(make_module, "make_plan", make)
    words = ["slurm", "gpu:h100:4x2", "--config.train.steps=7"]
    outcome = {"fits": True, "capacity": 2.0**40}
    assert submit(*words) == 0
    out = capfd.readouterr().out
    assert out.index("\nfits: ") < out.index("\n$ CONFIG=") < out.index("[--nodes=2]")
    assert UNCHECKED not in out
    assert planned == [(7, "gpu:h100:4x2", f"{TINY} {DATA} --config.train.steps=7")]

    proposal = dataclasses.replace(plan, changes={"mesh.fsdp": "8"})
    for changed, phrase in ((proposal, "it would with --config.mesh.fsdp=8;"), (None, "no change")):
        outcome = {"fits": False, "needed": 3 * 2.0**30, "capacity": 2.0**30, "proposal": changed}
        assert submit(*words) == 2
        out, err = capfd.readouterr()
        assert "does not fit gpu:h100:4x2: it needs 3.00 GiB per device of 1.00; " + phrase in err
        assert "nothing was submitted" in err
        assert "[--nodes" not in out


def test_without_a_compiler_only_no_plan_submits(cluster, capfd, monkeypatch):
    def make(*arguments, **options):
        raise UserError("libtpu is not installed.")

    monkeypatch.setattr(make_module, "make_plan", make)
    assert submit("xpk", "v5e:2x4") == 2
    err = capfd.readouterr().err
    assert "libtpu is not installed; or submit it unchecked with --no-plan" in err
    assert not (cluster / "submitted").exists()


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (("slurm", "v5e:2x4"), "choose GPUs, as in gpu:h100:8x4"),
        (("xpk", "gpu:h100:4x2"), "choose a TPU slice"),
        (("slurm", "gpu:h100:3x1"), "8 sequences cannot be divided"),
        (("slurm", "gpu:h100:1x5"), "4 or 8 processes would fit"),
        (("slurm", "cpu:4"), "choose GPUs"),
        (("xpk", "v5e:2x4", "--set=NAME="), "give --set=NAME=..."),
        (("xpk", "v5e:1x3", "--config.train.batch_size=3"), "has no name for this slice"),
        (("slurm", "gpu:h100:4x2", "--set=NAME"), "write --set=VARIABLE=VALUE"),
        (("slurm", "gpu:h100:4x2", "--workdir=runs/a"), "--workdir=runs/a must be an absolute"),
        (("jobset", "v5e:2x4", "--set=NUM_SLICES=2"), "a plan is of one slice"),
        (("jobset", "v5e:2x4", "--set=CLAIM="), "would end with its pod"),
        (("jobset", "v5e:2x4", "--workdir=/other/a"), "would end with its pod"),
        (("jobset", "v5e:2x4", "--set=GRACES=9"), "has no such variable"),
        (("slurm", "gpu:h100:4x2", "--config.data.sources="), "the run has no data"),
        (("slurm", "gpu:h100:4x2", "--config.data.sources=d"), "data.sources=d must be"),
        (("slurm", "gpu:h100:4x2", "--set=CONFIG=other", "--no-plan"), "give it as --config"),
        (("slurm", "gpu:h100:4x2", "--set=WORKDIR=/x", "--no-plan"), "give it as --workdir"),
    ],
)
def test_what_cannot_run_is_refused(words, phrase, cluster, capfd):
    assert submit(*words) == 2
    out, err = capfd.readouterr()
    assert phrase in err
    assert "$ " not in out


def test_without_program_or_checkout_the_sentence_says_so(cluster, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PATH", "/usr/bin-none")
    assert submit("slurm", "gpu:h100:4x2", "--no-plan") == 2
    assert "`sbatch` is not on PATH" in capfd.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert submit("slurm", "gpu:h100:4x2", "--no-plan") == 2
    assert f"runs in the checkout of tttjax (cd {ROOT})" in capfd.readouterr().err
    monkeypatch.setattr(launch, "CHECKOUT", tmp_path)
    assert submit("slurm", "gpu:h100:4x2", "--no-plan") == 2
    assert "a wheel has no scripts" in capfd.readouterr().err


def test_slices_of_the_environment_are_not_planned(cluster, monkeypatch, capfd):
    monkeypatch.setenv("NUM_SLICES", "2")
    assert submit("jobset", "v5e:2x4") == 2
    assert "a plan is of one slice" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["v5litepod-16", "v5p-64", "v6e-256", "tpu7x-16"])
def test_the_console_names_slices(name):
    assert console_name(parse_topology(name)) == name
