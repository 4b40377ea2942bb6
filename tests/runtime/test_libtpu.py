"""libtpu is told that there is no TPU where there is none, and nothing where there may be one."""

import os

import pytest

from tttjax.cli import main
from tttjax.runtime import libtpu


@pytest.fixture
def machine(monkeypatch):
    """machine(libtpu=, devices=): what is installed, and which device files there are."""

    def set_up(*, libtpu, devices=()):
        monkeypatch.setattr(
            libtpu.importlib.util, "find_spec", lambda name: object() if libtpu else None
        )
        found = {"/dev/accel*": "/dev/accel0", "/dev/vfio/[0-9]*": "/dev/vfio/0"}
        monkeypatch.setattr(
            libtpu.glob,
            "glob",
            lambda pattern: [found[pattern]] if found[pattern] in devices else [],
        )
        for variable in libtpu.ENVIRONMENT:
            monkeypatch.setenv(variable, "")  # restored afterwards
            monkeypatch.delenv(variable)

    return set_up


def told():
    return {name: os.environ.get(name) for name in libtpu.ENVIRONMENT}


def test_commands_tell_libtpu_that_there_is_no_tpu(machine, capsys):
    machine(libtpu=True)
    os.environ["TPU_WORKER_ID"] = "3"  # of the user, who knows better
    assert main.main(["--version"]) == 0
    assert told() == {**libtpu.ENVIRONMENT, "TPU_WORKER_ID": "3"}


@pytest.mark.parametrize("devices", [["/dev/accel0"], ["/dev/vfio/0"]])
def test_a_machine_with_a_tpu_is_left_alone(machine, devices):
    machine(libtpu=True, devices=devices)
    libtpu.quieten_libtpu()
    assert set(told().values()) == {None}


def test_nothing_is_set_without_libtpu(machine):
    machine(libtpu=False)
    libtpu.quieten_libtpu()
    assert set(told().values()) == {None}
