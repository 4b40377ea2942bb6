"""Exit codes of the commands: a contract with schedulers and launch scripts.

In a run of several processes, every process exits with DONE, SAVED, USER_ERROR or LOST; only the
one with a bug exits with FAILED, and one that gets Ctrl-C with INTERRUPTED.
"""

DONE = 0
FAILED = 1  # a check failed, or a bug (with traceback)
USER_ERROR = 2  # mend it first; starting again would fail again
SAVED = 75  # stopped and saved: start the same command again (EX_TEMPFAIL of sysexits.h)
LOST = 76  # a process or bucket was lost, or one hung: start the same command again on every host
INTERRUPTED = 130  # Ctrl-C, nothing saved
BROKEN_PIPE = 141  # the consumer of the output has ended
