"""When checkpoints are due, by steps and by a clock of the test."""

import dataclasses

import pytest

from tttjax.config.schema import TrainConfig
from tttjax.training.save_schedule import MAX_STEPS_UNCHECKED, SaveSchedule

OFF = dataclasses.replace(TrainConfig(), checkpoint_every=10**6, checkpoint_minutes=0.0)


class Clock:
    """A clock that the test sets; counts how often it is read."""

    def __init__(self):
        self.seconds, self.reads = 0.0, 0

    def __call__(self):
        self.reads += 1
        return self.seconds


def run(step_seconds, start=0, clock=None, **settings):
    """The steps after which a run saves, and how often it read the clock between saves at most."""
    clock, saved, most_reads = clock or Clock(), [], 0
    schedule = SaveSchedule(dataclasses.replace(OFF, **settings), start, clock)
    clock.reads = 0
    for step, seconds in enumerate(step_seconds, start=start + 1):
        clock.seconds += seconds
        if schedule.is_due(step):
            most_reads, clock.reads = max(most_reads, clock.reads), 0
            schedule.saved(step)
            saved.append(step)
    return saved, most_reads


def test_saves_by_steps_alone():
    saved, _ = run([1e9] * 10, checkpoint_every=4, keep_every=5)
    assert saved == [4, 5, 8, 10]


@pytest.mark.parametrize("seconds", [7.0, 60.0, 1000.0])
def test_time_saves_at_the_first_step_after_the_deadline(seconds):
    saved, reads = run([seconds] * 1000, start=3, checkpoint_minutes=10.0)
    interval = -(-600 // seconds)
    assert saved == [3 + n * interval for n in range(1, 1 + int(1000 // interval))]
    assert reads <= 12  # of up to 86 steps


def test_whichever_comes_first():
    saved, _ = run([60.0] * 12, checkpoint_minutes=5.0, checkpoint_every=4)
    assert saved == [4, 8, 12]
    saved, _ = run([60.0] * 12, checkpoint_minutes=5.0, checkpoint_every=7)
    assert saved == [5, 7, 12]


def test_slow_steps_after_fast_ones_are_noticed():
    saved, _ = run([0.001] * 5000 + [10.0] * 400, checkpoint_minutes=10.0)
    assert 5060 <= saved[0] <= 5060 + MAX_STEPS_UNCHECKED


def test_remains_due_until_saved():
    schedule = SaveSchedule(dataclasses.replace(OFF, checkpoint_every=4), 0, Clock())
    assert [schedule.is_due(step) for step in range(1, 8)] == [False] * 3 + [True] * 4
    schedule.saved(6)
    assert not schedule.is_due(7)
