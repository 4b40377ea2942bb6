"""Errors of XLA's runtime, which JAX raises under two types."""

import jax
import pytest

from tttjax.errors import is_runtime_error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (jax.errors.JaxRuntimeError("INTERNAL: something"), True),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), True),
        (ValueError("DEADLINE_EXCEEDED: Gloo all-reduce"), True),
        (ValueError("the loss is not finite"), False),
        (ValueError("NaN: not a number"), False),
        (RuntimeError("UNKNOWN: of another library"), False),
    ],
)
def test_errors_of_xlas_runtime(error, expected):
    assert is_runtime_error(error) is expected
