"""Faults of a process that trains: what `helpers/pod_server.py` injects for `tests/pod/soak.py`.

`slow` trains with a pause before every batch, so that signals fall between the steps. `slow, KIND
at STEP` also does something at that step; the kinds are those of `at_step`.
"""

import dataclasses
import os
import signal
import time

import jax
import jax.numpy as jnp

from tttjax.data.pipeline import TrainStream
from tttjax.training import checkpoint_integrity, train_run
from tttjax.training.checkpoint_format import uncommitted

PAUSE = 0.05  # seconds


def at_step(fault: str) -> None:
    """Makes this process slow, and has it fail at a step.

    hangs, bug: when it takes the step's batch. NaN: its weights after the step, and no others'.
    killed in a save, killed at the seal: of the first checkpoint from the step on, when its own
    files are written or, on process 0, those of all.
    """
    kind, _, step = fault.removeprefix("slow").removeprefix(", ").rpartition(" at ")
    number = int(step or 0)

    take = TrainStream.__next__

    def next_batch(stream):
        time.sleep(PAUSE)
        if stream.step == number - 1:
            if kind == "hangs":
                time.sleep(1000)
            if kind == "bug":
                raise ValueError("the planned bug")
        return take(stream)

    TrainStream.__next__ = next_batch
    if kind == "NaN":
        train_run.make_trainer = _poisoned(train_run.make_trainer, number)
    if kind in ENDS_OF_SAVE:
        name = ENDS_OF_SAVE[kind]
        setattr(checkpoint_integrity, name, _killed(getattr(checkpoint_integrity, name), number))


ENDS_OF_SAVE = {"killed in a save": "write_own_checksums", "killed at the seal": "seal"}


def _poisoned(make_trainer, number: int):
    """make_trainer, whose step `number` leaves NaN in the weights on this process's devices."""

    def with_nan(x: jax.Array) -> jax.Array:
        shards = [jnp.full_like(shard.data, jnp.nan) for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)

    def make(config, mesh):
        trainer = make_trainer(config, mesh)

        def step(state, batch):
            is_it = int(state.step) == number - 1
            state, values = trainer.step(state, batch)
            if is_it:
                state = state.replace(params=jax.tree.map(with_nan, state.params))
            return state, values

        return dataclasses.replace(trainer, step=step)

    return make


def _killed(function, number: int):
    """A function of the folder of checkpoints that kills the process from step `number` on."""

    def call(folder):
        saving = [path.name for path in uncommitted(folder)]
        if any(int(name.split(".")[0]) >= number for name in saving):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(folder)

    return call
