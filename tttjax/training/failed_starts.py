"""The count of starts in a row that finished no new step, which bounds automatic restarts.

A launcher starts a run again after every crash. `failed_starts.json` in the work directory counts
the starts, so that one that cannot succeed ends with exit code 2, at which every launcher stops.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from tttjax.errors import UnreachableError, UserError
from tttjax.exit_codes import INTERRUPTED, USER_ERROR
from tttjax.io.atomic import atomic_write
from tttjax.io.paths import if_reachable
from tttjax.runtime.ending import at_sudden_end
from tttjax.training.metrics_file import last_record

FAILED_STARTS = "failed_starts.json"


@contextlib.contextmanager
def count_start(workdir: Path, limit: int) -> Iterator[None]:
    """Counts this start as failed, until `forget_failed_starts`; the caller holds the lock.

    A step that no earlier start had finished sets the count to 0 at the next start. A start that
    ends with UserError or Ctrl-C is not counted, since nothing starts it again by itself.

    Raises:
      UserError: the last `limit` starts all failed. The count is then 0 again, so that the user,
        who has seen the sentence, can run the same command.
    """
    path = workdir / FAILED_STARTS
    before = path.read_bytes() if path.exists() else None
    counted = json.loads(before) if before else {"starts": 0, "last_step": 0}
    last_step = last_record(workdir).get("step", 0)
    if last_step > counted["last_step"]:
        counted = {"starts": 0, "last_step": last_step}
    if counted["starts"] >= limit:
        path.unlink(missing_ok=True)
        raise UserError(
            f"the last {counted['starts']} starts of {workdir} failed before they finished a step "
            f"after step {counted['last_step']}, so this one was not tried: find the cause in "
            f"their logs and mend it; then run the same command again, which allows {limit} more "
            "(train.max_failed_starts)"
        )
    _write(path, json.dumps({**counted, "starts": counted["starts"] + 1}).encode())

    def take_back(code: int) -> None:
        if code in (USER_ERROR, INTERRUPTED):
            _write(path, before) if before else path.unlink(missing_ok=True)

    try:
        with at_sudden_end(take_back):
            yield
    except UnreachableError:  # counted, since launchers start the run again
        raise
    except UserError:
        with if_reachable(workdir):
            take_back(USER_ERROR)
        raise
    except KeyboardInterrupt:
        with if_reachable(workdir):
            take_back(INTERRUPTED)
        raise


def forget_failed_starts(workdir: Path) -> None:
    """Ends the count, after a start that saved new steps or found the run complete."""
    (workdir / FAILED_STARTS).unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
