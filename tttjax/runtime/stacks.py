"""The stacks of all threads of this process, to stderr and to a file."""

import contextlib
import faulthandler
import sys
import tempfile
import time
from pathlib import Path


def write_stacks(folder: Path, process_id: int) -> None:
    """Writes the stacks to stderr, and to `folder/TIME-process-N.txt` if it can be written.

    May be called from any thread, whatever the others are doing.
    """
    faulthandler.dump_traceback(sys.__stderr__ or sys.stderr)
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    with contextlib.suppress(Exception):  # a disk or bucket that does not answer
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile("w+") as file:  # which a bucket's are not
            faulthandler.dump_traceback(file)
            file.seek(0)
            (folder / f"{moment}-process-{process_id}.txt").write_text(file.read())
