"""The one exception that users are meant to see, and one of JAX that they can mend."""


class UserError(Exception):
    """Something the user can mend: one sentence that says what is wrong and what to do.

    The command line prints the sentence without a traceback and exits with code 2.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory is too small, which JAX says by the text of a RuntimeError."""
    text = str(error)
    return (
        isinstance(error, RuntimeError)
        and text.startswith("RESOURCE_EXHAUSTED")
        and "No space left" not in text
    )
