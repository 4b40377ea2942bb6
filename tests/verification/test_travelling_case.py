"""The reference case of the official code that is part of the repository."""

from pathlib import Path

import pytest

from tttjax.verification.verify import verify

pytestmark = pytest.mark.slow

CASES = Path(__file__).parent / "cases"


def test_the_numbers_of_the_official_code():
    rows = verify(CASES)
    assert [row for row in rows if not row.ok] == []
    compared = {row.quantity for row in rows if row.deviation is not None}
    assert {"loss", "token_nll", "grads, tree", "grad_norm", "inner_grad_norm"} <= compared
