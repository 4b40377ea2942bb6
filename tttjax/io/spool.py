"""Files that grow, of a folder that may be in a bucket, where nothing can be appended."""

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tttjax.io.atomic import upload
from tttjax.io.paths import is_bucket, storage_path

UPLOAD_SECONDS = 60.0  # between uploads for those who watch a run


class Spool:
    """The local folder for files of `folder`: itself or, for a bucket, a temporary one.

    `upload` copies the files that have changed, each as a whole object. names: files to continue,
    which are copied from the bucket first. One thread calls its methods.
    """

    def __init__(self, folder: Path, names: Sequence[str] = ()):
        self._target, self.folder = storage_path(folder), Path()
        self._temporary: tempfile.TemporaryDirectory | None = None
        self._uploaded: dict[Path, tuple[int, int]] = {}
        self._last, self._is_down = time.monotonic(), False
        self._uploading, self._thread = threading.Lock(), threading.Thread()
        if not is_bucket(self._target):
            self.folder = self._target
            self.folder.mkdir(parents=True, exist_ok=True)
            return
        self._temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.folder = Path(self._temporary.name)
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).write_bytes((self._target / name).read_bytes())
        self._uploaded = self._states()

    def upload(self) -> None:
        """Copies what has changed into the bucket. Raises UnreachableError."""
        if self._temporary is None:
            return
        with self._uploading:
            self._is_down = True
            for path, state in self._states().items():
                if self._uploaded.get(path) != state:
                    upload(path, self._target / path.relative_to(self.folder).as_posix())
                    self._uploaded[path] = state
            self._is_down, self._last = False, time.monotonic()

    def upload_sometimes(self) -> None:
        """`upload` in a thread, if the last was a minute ago; its failures are left to others.

        A bucket that does not answer takes minutes until the retries end.
        """
        is_due = time.monotonic() - self._last > UPLOAD_SECONDS
        if self._temporary and is_due and not self._thread.is_alive():
            self._last = time.monotonic()
            self._thread = threading.Thread(target=self._try_upload, name="upload", daemon=True)
            self._thread.start()

    def _try_upload(self) -> None:
        with contextlib.suppress(Exception):
            self.upload()

    def close(self) -> None:
        """Uploads what is left, unless the last upload failed, and deletes the temporary folder."""
        if self._temporary is not None:
            if self._thread.is_alive():
                self._thread.join()
            try:
                if not self._is_down:
                    self.upload()
            finally:
                self._temporary.cleanup()
                self._temporary = None

    def _states(self) -> dict[Path, tuple[int, int]]:
        """Size and time of the last change (ns) of every file."""
        states = {}
        for where, _, names in os.walk(self.folder):
            for path in (Path(where, name) for name in names):
                with contextlib.suppress(FileNotFoundError):  # wandb deletes, and has links
                    stat = path.stat()
                    states[path] = (stat.st_size, stat.st_mtime_ns)
        return states
