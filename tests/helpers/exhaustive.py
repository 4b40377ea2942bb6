"""Which cases of a parametrized test are exhaustive, for `launch/test.sh --exhaustive`."""

from collections.abc import Iterable
from typing import Any

import pytest


def only(kept: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Values for `parametrize`: all cases, those that are not `kept` marked as exhaustive."""
    kept = list(kept)
    return [case if case in kept else _marked(case) for case in cases]


def _marked(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.exhaustive)
