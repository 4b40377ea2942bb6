"""Fixtures: benchmarks whose results several tests read, train steps from weights of zero."""

import dataclasses

import jax
import numpy as np
import pytest

from tttjax.benchmarks import train
from tttjax.training import step


@pytest.fixture(scope="module")
def measure_once():
    """measure_once(command, name) -> the benchmark of that name in a command's module.

    Equal calls in one test module, the command's own included, measure only once.
    """
    benchmarks = {}

    def replace(command, name):
        def once(*arguments):
            key = repr(arguments)
            if key not in results:
                results[key] = measure(*arguments)
            return results[key]

        if (command, name) not in benchmarks:
            measure, results = getattr(command, name), {}
            patch.setattr(command, name, once)
            benchmarks[command, name] = once
        return benchmarks[command, name]

    with pytest.MonkeyPatch.context() as patch:
        yield replace


@pytest.fixture
def zero_weights(monkeypatch):
    """Train steps are measured from weights of zero, to save the compilation of random ones."""

    def make_trainer(config, mesh):
        trainer = step.make_trainer(config, mesh)

        def init_state(seed):
            del seed
            abstract = trainer.abstract_state
            zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
            return jax.device_put(zeros, jax.tree.map(lambda x: x.sharding, abstract))

        return dataclasses.replace(trainer, init_state=init_state)

    monkeypatch.setattr(train, "make_trainer", make_trainer)
