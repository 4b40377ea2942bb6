"""The one exception that users are meant to see, and one of JAX that they can mend."""


class UserError(Exception):
    """Something the user can mend: one sentence that says what is wrong and what to do.

    The command line prints the sentence without a traceback and exits with code 2.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is too small: the host's, or a device's, which JAX says in a RuntimeError."""
    if isinstance(error, MemoryError):
        return True
    first = str(error).partition("\n")[0]
    says_so = "RESOURCE_EXHAUSTED" in first and "memory" in first.lower()
    return isinstance(error, RuntimeError) and says_so
