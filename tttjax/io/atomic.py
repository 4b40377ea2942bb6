"""Atomic writes of files and folders: complete, or not there at all."""

import contextlib
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tttjax.errors import UserError
from tttjax.io.locks import hold
from tttjax.io.paths import file_sizes, is_bucket, local_path, storage_path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """The path of a temporary file, which replaces `path` after the block and an fsync.

    For a path in a bucket, it is copied there, where an object appears when it is complete.

    On an exception it is removed and `path` is unchanged. Its name is unique, so that concurrent
    writers, also on several hosts, do not mix: the last to finish wins. Its permissions follow the
    umask, also for libraries that write files readable by the owner only.
    """
    path = storage_path(path)
    if is_bucket(path):
        with tempfile.TemporaryDirectory() as folder:
            yield (temporary := Path(folder, path.name))
            upload(temporary, path)
        return
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    mode = _usual_mode(temporary)
    try:
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def upload(source: Path, path: Path) -> None:
    """Copies a file into an object of a bucket. Raises UnreachableError after retries."""
    from tttjax.io import buckets  # slow to import

    buckets.upload(source, path)


@contextlib.contextmanager
def local_copy(path: Path, parent: Path) -> Iterator[Path]:
    """A folder itself or, of one in a bucket, a copy in a temporary folder in `parent`."""
    if not is_bucket(path):
        yield path
        return
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        for name in file_sizes(path):
            (copy := Path(folder, name)).parent.mkdir(parents=True, exist_ok=True)
            download(path / name, copy)
        yield Path(folder)


def download(path: Path, target: Path) -> None:
    """Copies an object of a bucket into a file. Raises UnreachableError after retries."""
    from tttjax.io import buckets

    buckets.download(path, target)


def _usual_mode(path: Path) -> int:
    """Permissions of a new file; reading the umask itself would change it for all threads."""
    path.unlink(missing_ok=True)
    path.touch(exist_ok=False)
    try:
        return path.stat().st_mode & 0o777
    finally:
        path.unlink()


def write_files(
    out: str | os.PathLike, writers: Mapping[str, Callable[[Path], object]]
) -> dict[str, Path]:
    """Writes each file under `out` atomically; returns their paths by name."""
    folder = storage_path(out)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / name for name in writers}
    for name, write in writers.items():
        with atomic_write(paths[name]) as temporary:
            write(temporary)
    return paths


def write_text(path: Path, text: str) -> None:
    """`Path.write_text` in UTF-8."""
    path.write_text(text, encoding="utf-8")


def require_empty_dir(path: str | os.PathLike, option: str) -> Path:
    """The path; raises UserError, with the option's name, unless it is an empty or new folder."""
    path = local_path(path, option)
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise UserError(f"{option}={path} cannot be a folder, because {parent} is a file.")
    if path.exists() and not path.is_dir():
        raise UserError(f"{option}={path} exists and is a file; name a new folder.")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{option}={path} exists and is not empty; name a new folder.")
    return path


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike, option: str) -> Iterator[Path]:
    """A temporary folder beside `path`, renamed to it after the block, or removed on an exception.

    Raises UserError as `require_empty_dir` does, before and after the block, and while another
    process writes the same folder.
    """
    path = require_empty_dir(path, option).absolute()  # "." has no name
    with hold(path, beside=True):
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # of a killed process
            shutil.rmtree(leftover, ignore_errors=True)
        # A unique name, because transformers caches the code of a folder by its name.
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.mkdir()
        try:
            yield temporary
            os.replace(temporary, require_empty_dir(path, option))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
