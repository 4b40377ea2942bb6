"""Shapes of weights without tracing random numbers, which is most of the time of `init`."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import pytest

from tttjax.models import Transformer, layers
from tttjax.types import Params


@contextlib.contextmanager
def no_random_numbers():
    """Weights are zeros, and all keys the same."""
    key = jax.random.key(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "normal", lambda key, shape, dtype: jnp.zeros(shape, dtype))
        patch.setattr(layers.nnx.RngStream, "__call__", lambda stream: key)
        yield


@functools.cache
def _shapes(model: Transformer, x64: bool) -> Params:
    del x64  # part of the cache key
    with no_random_numbers():
        return jax.eval_shape(lambda key: model.init(key), jax.random.key(0))


def shapes(model: Transformer) -> Params:
    """As `model.abstract_params()`; computed once for equal models."""
    return jax.tree.map(lambda x: x, _shapes(model, jax.config.jax_enable_x64))


@pytest.fixture(scope="module", autouse=True)
def cheap_shapes():
    """All models give their shapes so, in the modules that import this fixture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transformer, "abstract_params", shapes)
        yield
