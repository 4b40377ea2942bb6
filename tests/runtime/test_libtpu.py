"""The libtpu environment is set on machines without a TPU only."""

import os

import pytest

from tttjax.cli import main
from tttjax.runtime import libtpu


@pytest.fixture
def machine(monkeypatch):
    """machine(installed=, devices=): whether libtpu is installed, and the existing device files."""

    def set_up(*, installed, devices=()):
        monkeypatch.setattr(
            libtpu.importlib.util, "find_spec", lambda name: object() if installed else None
        )
        paths_by_pattern = {"/dev/accel*": "/dev/accel0", "/dev/vfio/[0-9]*": "/dev/vfio/0"}
        monkeypatch.setattr(
            libtpu.glob,
            "glob",
            lambda pattern: (
                [paths_by_pattern[pattern]] if paths_by_pattern[pattern] in devices else []
            ),
        )
        for variable in libtpu.ENVIRONMENT:
            monkeypatch.setenv(variable, "")  # restored afterwards
            monkeypatch.delenv(variable)

    return set_up


def environment():
    return {name: os.environ.get(name) for name in libtpu.ENVIRONMENT}


def test_commands_set_the_libtpu_environment(machine, capsys):
    machine(installed=True)
    os.environ["TPU_WORKER_ID"] = "3"  # set by the user
    assert main.main(["--version"]) == 0
    assert environment() == {**libtpu.ENVIRONMENT, "TPU_WORKER_ID": "3"}


@pytest.mark.parametrize("devices", [["/dev/accel0"], ["/dev/vfio/0"]])
def test_nothing_is_set_with_a_tpu(machine, devices):
    machine(installed=True, devices=devices)
    libtpu.quieten_libtpu()
    assert set(environment().values()) == {None}


def test_nothing_is_set_without_libtpu(machine):
    machine(installed=False)
    libtpu.quieten_libtpu()
    assert set(environment().values()) == {None}
