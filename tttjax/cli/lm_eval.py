"""The lm-evaluation-harness command line, with the model `tttjax` registered."""

import sys

from tttjax.errors import UserError
from tttjax.runtime.libtpu import quieten_libtpu


def main() -> int:
    """Runs the harness's command line; returns the exit code."""
    quieten_libtpu()
    try:
        import tttjax.evaluation.lm_eval  # noqa: F401  (registers the model)
    except ImportError as error:
        print(f"error: {error} ({error.__cause__})", file=sys.stderr)
        return 2
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
