"""The one exception that users are meant to see, what it may advise, and one of JAX."""


def install_extra(name: str) -> str:
    """How to install an extra: from a checkout, since `tttjax` on the public index is not ours."""
    return f"`pip install -e '.[{name}]'` in the checkout of tttjax"


class UserError(Exception):
    """Something the user can mend: one sentence that says what is wrong and what to do.

    The command line prints the sentence without a traceback and exits with code 2.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is too small: the host's, or a device's, which JAX says in a RuntimeError."""
    if isinstance(error, MemoryError):
        return True
    first = str(error).partition("\n")[0]
    is_named = "RESOURCE_EXHAUSTED" in first and "memory" in first.lower()
    return isinstance(error, RuntimeError) and is_named
