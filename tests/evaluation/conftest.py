"""Fixtures of all tests of evaluation: programs that are compiled once."""

import functools

import pytest

from tttjax.evaluation import compare
from tttjax.inference.sequence_nll import make_scorer


@pytest.fixture(scope="session", autouse=True)
def all_scorers_are_kept():
    """The package keeps the last four."""
    compiled = functools.cache(make_scorer.__wrapped__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "make_scorer", compiled)
        yield
