"""The watchdog: limits of steps and phases, stacks, exit code, and the restart after a hang."""

import os
import signal
import subprocess
import sys

import pytest
from helpers.paths import ROOT, TINY

from tttjax.config import WatchdogConfig
from tttjax.training import watchdog
from tttjax.training.loop import train
from tttjax.training.metrics_file import deterministic_records
from tttjax.training.start_account import StartAccount


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def watch(clock, **limits):
    return watchdog.Watchdog(WatchdogConfig(**limits), pytest.fail, StartAccount(), clock)


def steps(dog, clock, *seconds):
    for value in seconds:
        clock.now += value
        dog.step()


def test_a_step_may_take_the_floor_or_twenty_medians(clock):
    dog = watch(clock, next_step=30)
    steps(dog, clock, 500, 2, 3, 2)  # the first is of the start
    clock.now += 39
    assert not dog.overdue()
    clock.now += 2
    assert dog.overdue() == "no step ended in 40 s (watchdog.next_step)"
    quick = watch(clock, next_step=30)
    steps(quick, clock, 0.1, 0.1, 0.1)
    clock.now += 29
    assert not quick.overdue()
    clock.now += 2
    assert "in 30 s" in quick.overdue()


@pytest.mark.parametrize("phase", ["compile", "restore", "save", "evaluate"])
def test_every_phase_has_its_own_limit_and_time_before_it_does_not_count(clock, phase):
    dog = watch(clock, start=50, **{phase: 100})
    clock.now += 40
    with dog.phase(phase):
        clock.now += 99
        assert not dog.overdue()
        clock.now += 2
        assert f"did not end in 100 s (watchdog.{phase})" in dog.overdue()
    clock.now += 49
    assert not dog.overdue()
    clock.now += 2
    assert dog.overdue() == "the start did not end in 50 s (watchdog.start)"


def test_a_request_to_stop_shortens_the_wait_for_a_step_alone(clock):
    dog = watch(clock, next_step=1000, save=100)
    steps(dog, clock, 1, 10, 10)
    clock.now += 25
    dog.expect_stop()
    clock.now += 29
    assert not dog.overdue()
    clock.now += 2
    assert "no step ended in 30 s" in dog.overdue()
    with dog.phase("save"):
        clock.now += 99
        assert not dog.overdue()


def test_zero_is_no_limit(clock):
    dog = watch(clock, next_step=0, start=0)
    clock.now += 1e6
    assert not dog.overdue()
    steps(dog, clock, 1, 1)
    dog.expect_stop()
    clock.now += 1e6
    assert not dog.overdue()


def test_a_suspension_does_not_count(clock):
    dog = watch(clock, next_step=30)
    steps(dog, clock, 1, 1, 1)
    dog.check_clock()
    for seconds in (10, 600, 10, 9):  # the second: Ctrl-Z
        clock.now += seconds
        dog.check_clock()
        assert not dog.overdue()
    clock.now += 2
    assert "no step ended in 30 s" in dog.overdue()


# A real hang -------------------------------------------------------------------------------------

HANG_BEFORE_STEP = """
import dataclasses, sys, time
from tttjax.cli.main import main
from tttjax.training import train_run, watchdog

make_trainer, calls = train_run.make_trainer, []
watchdog.STOP_SECONDS = 1

def sleeping_step(step, *arguments):
    calls.append(1)
    if len(calls) == 7:
        print("hanging", file=sys.stderr, flush=True)
        time.sleep(600)
    return step(*arguments)

def hanging(config, mesh):
    trainer = make_trainer(config, mesh)
    step = lambda *arguments: sleeping_step(trainer.step, *arguments)
    return dataclasses.replace(trainer, step=step)

train_run.make_trainer = hanging
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "stopped"), [(2, False), pytest.param(600, True, marks=pytest.mark.exhaustive)]
)
def test_a_hang_ends_with_stacks_and_the_restart_is_bit_identical(
    limit, stopped, tiny, data, tmp_path, one_device
):
    workdir = tmp_path / "run"
    command = [
        *("train", f"--config={TINY}:static", f"--workdir={workdir}"),
        *(f"--config.data.sources={data}", "--config.train.steps=12"),
        "--config.optim.decay_steps=12",
        *("--config.train.checkpoint_every=4", f"--config.watchdog.next_step={limit}"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-c", HANG_BEFORE_STEP, *command]
    lines = []
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stderr:
            lines.append(line)
            if stopped and line == "hanging\n":
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 76, "".join(lines)
    (sentence,) = [line for line in lines if line.startswith("error: ")]
    assert "no step ended in" in sentence
    (stacks,) = (workdir / watchdog.STACKS_DIR).iterdir()
    assert "in sleeping_step" in stacks.read_text()
    assert "in sleeping_step" in "".join(lines)
    overrides = ("train.steps=12", "train.checkpoint_every=4")
    assert train(tiny(*overrides), workdir).step == 12
    train(tiny(*overrides), tmp_path / "alone")
    assert deterministic_records(workdir) == deterministic_records(tmp_path / "alone")
