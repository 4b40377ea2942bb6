"""Imports compare logits three times; those of one model are compiled once."""

import functools

import pytest
from helpers.shapes import cheap_shapes  # noqa: F401 (of every module)

from tttjax.interop import transfer


@pytest.fixture(scope="session", autouse=True)
def one_program_per_model():
    """JAX knows a compiled function by its identity, so the same arguments give the same one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "partial", functools.cache(functools.partial))
        yield
