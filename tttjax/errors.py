"""The one exception that users are meant to see."""


class UserError(Exception):
    """Something the user can mend: one sentence that says what is wrong and what to do.

    The command line prints the sentence without a traceback and exits with code 2.
    """
