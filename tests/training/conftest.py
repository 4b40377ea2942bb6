"""Fixtures of a tiny run: configuration, data, compiled programs."""

import dataclasses
import os
from pathlib import Path

import jax
import pytest
from helpers.paths import TINY

from tttjax.config import load_config
from tttjax.data.preparation import prepare
from tttjax.training import loop
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


@pytest.fixture(scope="module", autouse=True)
def trainers():
    """The trainers that the runs of this module share; clear it to compile again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_trainer", shared_trainer)
        yield TRAINERS


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
