"""UserError, advice for its sentences, and detection of errors of JAX's runtime."""

import re


def install_extra(name: str) -> str:
    """How to install an extra: from a checkout, because PyPI's `tttjax` is another project."""
    return f"`pip install -e '.[{name}]'` in the checkout of tttjax"


class UserError(Exception):
    """User error: one sentence that says what is wrong and what to do.

    The command line prints the sentence without a traceback and exits with code 2.
    """


class AbsentProcessError(UserError):
    """Other processes of the run have not come. Exit code 76: it may help to start all again."""


class UnreachableError(UserError):
    """A bucket does not answer, after retries. In training, code 76: starting again may help."""


class ResumableError(UserError):
    """A failure not caused by the input; the same command continues when run again."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether host or device memory ran out; JAX reports the latter as a RuntimeError."""
    if isinstance(error, MemoryError):
        return True
    first = str(error).partition("\n")[0]
    is_named = "RESOURCE_EXHAUSTED" in first and "memory" in first.lower()
    return isinstance(error, RuntimeError) and is_named


def is_runtime_error(error: BaseException) -> bool:
    """Whether XLA's runtime failed; JAX raises JaxRuntimeError, in some places ValueError."""
    status = re.match(r"[A-Z]{2,}(_[A-Z]+)*: ", str(error))
    return type(error).__name__ == "JaxRuntimeError" or (
        isinstance(error, ValueError) and status is not None
    )
