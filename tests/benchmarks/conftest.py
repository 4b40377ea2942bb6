"""Fixture: train steps from weights of zero."""

import dataclasses

import jax
import numpy as np
import pytest

from tttjax.benchmarks import train
from tttjax.training import step


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
