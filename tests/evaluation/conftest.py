"""Fixtures of all tests of evaluation: programs that are compiled once."""

import functools

import pytest

from tttjax.evaluation import scoring


@pytest.fixture(scope="session", autouse=True)
def all_scorers_are_kept():
    """The package keeps the last four."""
    compiled = functools.cache(scoring._compiled_scorer.__wrapped__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "_compiled_scorer", compiled)
        yield
