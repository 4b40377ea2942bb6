"""Engines of equal models share their compiled functions: weights are arguments of these."""

import pytest

from tttjax.inference.engine import Engine

FUNCTIONS = ("_read_chunks", "_extend", "_step", "_to_decode_state", "_from_decode_state")


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    """In the modules that import this fixture."""
    functions = {}

    def property_of(name, make):
        def get(engine):
            of = engine.inference_model
            key = name, of.chunk_model.split.model, of.chunk_size, of.lr, of.clip, of.fast_dtype
            return functions.setdefault(key, make(engine))

        return property(get)

    with pytest.MonkeyPatch.context() as patch:
        for name in FUNCTIONS:
            patch.setattr(Engine, name, property_of(name, vars(Engine)[name].func))
        yield
