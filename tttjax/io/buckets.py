"""Folders in buckets, `gs://` and `s3://`: paths with the methods of pathlib, by etils and fsspec.

A bucket has objects and no folders: every name with objects below it is a folder, objects are
written whole, and nothing is appended, linked or renamed in one step.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from etils.epath import gpath

from tttjax.errors import UnreachableError, UserError, install_extra
from tttjax.runtime.progress import report_activity

_PACKAGES = {"gs": ("gcs", "gcsfs"), "s3": ("s3", "s3fs")}  # by scheme: extra, package
_DELAYS_S = (1.0, 2.0, 4.0, 8.0)  # after the retries of the package itself, about 30 s each time
_LIBRARIES = ("aiohttp", "aiobotocore", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs")
_PATTERN = re.compile(r"[*?\[]")
# Of TensorStore, which reads and writes the arrays of checkpoints.
_STORE_ERROR = re.compile(r"Error (reading|writing|opening|listing|deleting).*\b(gs|s3)://", re.S)
T = TypeVar("T")


class BucketPath(gpath.PosixGPath):
    """A path in a bucket, as etils has them, with what else the callers use of pathlib."""

    def absolute(self) -> "BucketPath":
        return self

    def resolve(self, strict: bool = False) -> "BucketPath":
        return self

    def exists(self) -> bool:
        return self._type() != ""

    def is_dir(self) -> bool:
        return self._type() == "directory"

    def is_file(self) -> bool:
        return self._type() == "file"

    def _type(self) -> str:
        """ "" if there is nothing. Errors are raised: fsspec takes them for "no folder"."""
        if self._is_bucket():
            return "directory"
        try:
            return file_system(self).info(str(self))["type"]
        except FileNotFoundError:
            return ""

    def _is_bucket(self) -> bool:  # or above it; `open_bucket` has seen that it exists
        return len(self.parts) <= 3

    def iterdir(self) -> Iterator[Any]:
        """Nothing for a folder without objects, which cannot be told from a missing one."""
        with contextlib.suppress(FileNotFoundError):
            yield from super().iterdir()

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: a folder is there with its first object, and not without one."""

    def rmdir(self) -> None:
        """Does nothing, as `mkdir`."""

    def rename(self, target: str | os.PathLike) -> "BucketPath":
        """Copies all objects below, then deletes them; interrupted, it leaves one of both whole."""
        system, before, after = file_system(self), str(self), BucketPath(target)
        if after.exists():
            raise FileExistsError(f"{after} exists already")
        prefix = before.partition("://")[2]
        objects = system.find(before)
        for name in objects:
            system.copy(name, f"{after}{name.removeprefix(prefix)}")
        system.rm(objects)
        return after

    def walk(self, **_: Any) -> Iterator[Any]:
        scheme = self.parts[1]
        for folder, folders, files in file_system(self).walk(str(self)):
            yield BucketPath(f"{scheme}://{folder}"), folders, files

    def open(self, mode: str = "r", *, encoding=None, errors=None, newline=None, **_: Any) -> Any:
        text = {} if "b" in mode else {"encoding": "utf-8", "errors": errors, "newline": newline}
        return file_system(self).open(str(self), mode, **text)

    def read_bytes(self) -> bytes:
        """In one request, so that it is one version of an object that others write."""
        return file_system(self).cat_file(str(self))

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        return self.read_bytes().decode("utf-8", errors or "strict")

    def write_bytes(self, data: Any) -> int:
        file_system(self).pipe_file(str(self), bytes(data))
        return len(data)

    def write_text(self, data: str, *_: Any, **__: Any) -> int:
        return self.write_bytes(data.encode())

    def stat(self, *, follow_symlinks: bool = True) -> Any:
        """Size and time, under the names of etils; the size under that of pathlib, too."""
        result: Any = super().stat()
        result.st_size = result.length
        if not result.mtime and not result.is_directory:  # etils does not know where s3:// says it
            result.mtime = file_system(self).modified(str(self)).timestamp()
        return result

    def sizes(self) -> dict[str, int]:
        """Bytes of all objects below, by their path in this folder, from one listing."""
        listing = file_system(self).find(str(self), detail=True)
        prefix = str(self).partition("://")[2] + "/"
        return {name.removeprefix(prefix): info["size"] for name, info in listing.items()}


def open_bucket(text: str, label: str) -> Path:
    """The path of a folder or object in a bucket, which is reached once per process.

    label: the path with its option, for errors. Raises UserError without the package, for
    credentials in the path, for a name that is a pattern to fsspec (with `*`, it would delete the
    files of other folders), and for a bucket that is missing or not readable.
    """
    parts = urlsplit(text)
    scheme = parts.scheme
    extra, package = _PACKAGES[scheme]
    if parts.username or parts.password or parts.query or not parts.netloc:
        shown = f"{scheme}://{parts.hostname or ''}{parts.path}"
        problem = "holds credentials or options" if parts.netloc else "names no bucket"
        raise UserError(f"{shown} {problem}; write {scheme}://BUCKET/FOLDER alone.")
    if found := _PATTERN.search(text):
        raise UserError(f"{label} has {found[0]} in its name; choose one without * ? and [.")
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{label} needs {package}: {install_extra(extra)}.")
    path: Any = BucketPath(text)
    _reach(scheme, parts.netloc)
    return path


@functools.cache
def _reach(scheme: str, bucket: str) -> None:
    name = f"{scheme}://{bucket}"
    try:
        with report_activity(f"looking for the bucket {name}"):
            file_system(name).find(f"{bucket}/.tttjax/none")
    except FileNotFoundError as error:
        sentence = f"the bucket {name} does not exist; check its name, or create it."
        raise UserError(sentence) from error
    except Exception as error:
        if not is_bucket_error(error):
            raise
        raise UserError(unreachable_sentence(name, error)) from error


def file_system(path: str | os.PathLike) -> Any:
    """The file system of fsspec, which has no cache of listings: other hosts write, too."""
    return _file_system(os.fspath(path).partition("://")[0])


@functools.cache
def _file_system(scheme: str) -> Any:
    # Before the first import of gcsfs, and for the paths of etils that Orbax makes itself.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks another service
    os.environ.setdefault("EPATH_USE_TF", "false")
    import fsspec  # slow, and not needed for files of this machine

    for logger in ("gcsfs", "s3fs"):  # they log the tracebacks of what they raise
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    for name in ("gs", "gcs", "s3"):
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem(scheme)


def create(path: Path, content: bytes) -> bool:
    """Creates an object; False if it exists. Of several processes one succeeds."""
    system = file_system(path)
    try:
        if system.exists(str(path)):
            return False
        system.pipe_file(str(path), content, mode="create")
    except FileExistsError:
        return False
    except Exception as error:
        if getattr(error, "code", None) == 412:  # gcsfs: its condition did not hold
            return False
        raise
    return True


def upload(source: Path, path: Path) -> None:
    """Copies a local file into an object, which appears when it is complete."""
    retried("writing", path, lambda: file_system(path).put_file(str(source), str(path)))


def download(path: Path, target: Path) -> None:
    """Copies an object into a local file."""
    retried("reading", path, lambda: file_system(path).get_file(str(path), str(target)))


def read_range(path: Path, start: int, stop: int) -> bytes:
    """Bytes of an object."""
    return retried(
        "reading", path, lambda: file_system(path).cat_file(str(path), start=start, end=stop)
    )


def retried(what: str, path: str | os.PathLike, call: Callable[[], T]) -> T:
    """The result of a call; repeated a few times while the bucket does not answer.

    what, path: what the call does, for messages. Raises UnreachableError after that, and UserError
    at once if the credentials do not suffice.
    """
    is_main = threading.current_thread() is threading.main_thread()  # others read ahead
    for delay_s in (*_DELAYS_S, None):
        try:
            with report_activity(f"{what} {path}") if is_main else contextlib.nullcontext():
                return call()
        except Exception as error:
            if isinstance(error, FileNotFoundError) or not is_bucket_error(error):
                raise
            if is_refusal(error):
                raise UserError(unreachable_sentence(path, error)) from error
            if delay_s is None:
                raise UnreachableError(unreachable_sentence(path, error)) from error
            print(
                f"note: {what} {path} failed ({_in_short(error)}); again in {delay_s:g} s",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(delay_s)
    raise AssertionError  # the last round returns or raises


def unreachable_sentence(name: str | os.PathLike, error: BaseException) -> str:
    """What the user reads. name: the bucket, or a path in it."""
    remedy = (
        "check the credentials of this host, and that they may read and write there"
        if is_refusal(error)
        else "check the network and the credentials of this host, and run the same command again"
    )
    return f"{os.fspath(name)} cannot be reached ({_in_short(error)}): {remedy}."


def is_bucket_error(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is of a library that talks to buckets."""
    while error is not None:
        if type(error).__module__.partition(".")[0] in _LIBRARIES or _is_forbidden(error):
            return True
        if isinstance(error, ValueError) and _STORE_ERROR.search(str(error)):
            return True
        error = error.__cause__
    return False


def is_refusal(error: BaseException) -> bool:
    """Whether the credentials are missing or do not suffice."""
    status = str(getattr(error, "code", ""))
    is_named = "Credential" in type(error).__name__ or "PERMISSION_DENIED" in str(error)
    is_named = is_named or isinstance(error, PermissionError) or _is_forbidden(error)
    return is_named or status in ("401", "403")


def _is_forbidden(error: BaseException) -> bool:
    """Whether it is what gcsfs raises for status 403."""
    return isinstance(error, OSError) and str(error).startswith("Forbidden: ")


def _in_short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(": ")
