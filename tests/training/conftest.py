"""Fixtures of a tiny run: configuration, data, devices, compiled programs."""

import dataclasses
import os
import re
from pathlib import Path

import jax
import pytest
from helpers.paths import TINY

from tttjax.config import MeshConfig, load_config
from tttjax.config.placement import choose_placement
from tttjax.data.preparation import prepare
from tttjax.parallel.mesh import make_mesh
from tttjax.training import train_run
from tttjax.training.step import make_trainer

TRAINERS: dict = {}


def shared_trainer(config, mesh):
    """The trainer of an earlier run, already compiled, if its programs would be the same."""
    # Of `train`, `make_trainer` reads `accum_steps`, and `steps` for the schedule.
    decay_steps = config.optim.decay_steps or config.train.steps
    optim = dataclasses.replace(config.optim, decay_steps=decay_steps)
    parts = (config.model, config.inner, optim, config.train.accum_steps, config.mesh.gather)
    key = (repr(parts), mesh, jax.config.jax_enable_x64)
    if key not in TRAINERS:
        TRAINERS[key] = make_trainer(config, mesh)
    return TRAINERS[key]


on_all_devices = train_run._choose_mesh


def on_few_devices(config, workdir):
    """One device for configurations that do not mention the mesh: the others only take time."""
    if config.mesh == MeshConfig():
        return choose_placement(config, workdir, 1, 1), make_mesh(devices=jax.devices()[:1])
    return on_all_devices(config, workdir)


@pytest.fixture(scope="module", autouse=True)
def trainers():
    """The trainers that the runs of this module share; clear it to compile again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_run, "make_trainer", shared_trainer)
        patch.setattr(train_run, "_choose_mesh", on_few_devices)
        yield TRAINERS


@pytest.fixture
def one_device(monkeypatch):
    """Processes that the test starts have one device, as the runs in this process."""
    jax.devices()  # this process keeps its number
    flags = re.sub(r"(device_count)=\d+", r"\1=1", os.environ["XLA_FLAGS"])
    monkeypatch.setenv("XLA_FLAGS", flags)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A prepared data set of bytes: two files of the standard library."""
    folder = tmp_path_factory.mktemp("data") / "prepared"
    library = Path(os.__file__).parent
    prepare([str(library / f"{name}.py") for name in ("argparse", "ast")], folder, num_workers=0)
    return folder


@pytest.fixture(scope="module")
def tiny(data):
    """tiny(*overrides, arg="static") -> configuration of `tiny_run.py`.

    Shorter runs have its schedule too, hence its programs.
    """

    def make(*overrides, arg="static"):
        always = [f"data.sources={data}", "optim.decay_steps=12"]
        return load_config(f"{TINY}:{arg}", [*always, *overrides])

    return make
