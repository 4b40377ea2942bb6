"""User-supplied paths: local files and folders, with `~` expanded, buckets, and URLs of texts."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tttjax.errors import UnreachableError, UserError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # pathlib makes one slash of two
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_BUCKET = re.compile(r"(gs|s3)://")


def local_path(value: str | os.PathLike, option: str = "") -> Path:
    """`value` as a local path; idempotent.

    Only a leading `~` or `~user` is expanded. option: name of the flag or field, for the error.
    Raises UserError for `scheme://...`, which would become a local folder `scheme:`, and for an
    unknown user.
    """
    text = os.fspath(value)
    label = f"{option}={text}" if option else text
    if scheme := _SCHEME.match(text):
        raise UserError(
            f"{label} is not a path on this machine: {scheme[0]}/ and other buckets and URLs are "
            "not supported here; name a local folder, or a path where the bucket is mounted."
        )
    try:
        path = Path(text).expanduser() if text.startswith("~") else Path(text)
    except RuntimeError as error:
        raise UserError(
            f"{label} names the home of a user who does not exist; write ./{text} for a file or "
            "folder of that name."
        ) from error
    # Path drops the `./` of `./~` and `./gs:/`, so a second call would expand or refuse them.
    would_expand_again = str(path).startswith("~") or _SCHEME.match(str(path))
    return path.absolute() if would_expand_again else path


def is_bucket(value: str | os.PathLike) -> bool:
    """Whether a path is in a bucket."""
    return _BUCKET.match(os.fspath(value)) is not None


def storage_path(value: str | os.PathLike, option: str = "") -> Path:
    """`value` as a path in a bucket (`gs://`, `s3://`) or as `local_path`; idempotent.

    Both have the methods of pathlib that the callers use (`buckets.BucketPath`). Raises UserError
    as `local_path` does, and if the bucket cannot be reached.
    """
    text = os.fspath(value)
    if not is_bucket(text):
        return local_path(value, option)
    from tttjax.io.buckets import open_bucket  # slow to import

    return open_bucket(text, f"{option}={text}" if option else text)


def storage_text(value: str | os.PathLike, option: str = "") -> str:
    """`path_text` of a path that may be in a bucket, which is not reached."""
    text = os.fspath(value)
    return text if is_bucket(text) else path_text(text, option)


def remove_tree(path: Path) -> None:
    """Deletes a folder and what is in it, wherever it is."""
    if is_bucket(path):
        bucket_path: Any = path
        bucket_path.rmtree(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """(folder, names of its folders, names of its files) from the top, as `os.walk`."""
    anywhere: Any = root
    yield from (
        anywhere.walk()
        if is_bucket(root)
        else ((Path(folder), folders, files) for folder, folders, files in os.walk(root))
    )


def raise_if_unreachable(path: str | os.PathLike, error: Exception) -> None:
    """Raises UnreachableError for an error of the libraries that reach a bucket."""
    from tttjax.io.buckets import is_bucket_error, unreachable_sentence

    if is_bucket_error(error):
        raise UnreachableError(unreachable_sentence(path, error)) from error


@contextlib.contextmanager
def if_reachable(path: str | os.PathLike) -> Iterator[None]:
    """For cleaning up after an error, which must not be hidden by a bucket that does not answer."""
    try:
        yield
    except Exception as error:
        if not is_bucket(path):
            raise
        from tttjax.io.buckets import is_bucket_error

        if not isinstance(error, UnreachableError) and not is_bucket_error(error):
            raise


def file_sizes(folder: Any) -> dict[str, int]:
    """Bytes of all files below a folder, by their path in it; in a bucket from one listing."""
    if is_bucket(folder):
        return folder.sizes()
    paths = [
        Path(where, name) for where, _, names in os.walk(folder, followlinks=True) for name in names
    ]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def path_text(value: str | os.PathLike, option: str = "") -> str:
    """`local_path` as text; unchanged where nothing is expanded."""
    text = os.fspath(value)
    path = local_path(text, option)
    return str(path) if text.startswith("~") else text


def absolute_path(value: str | os.PathLike, option: str = "") -> str:
    """`local_path` made absolute; symbolic links are not resolved. A path in a bucket is so."""
    text = os.fspath(value)
    return text if is_bucket(text) else str(local_path(value, option).absolute())


def is_url(value: str | os.PathLike) -> bool:
    """Whether a text is read from `scheme://...`, with fsspec."""
    return isinstance(value, str) and _URL.match(value) is not None


def text_path(value: str | os.PathLike, option: str = "") -> str:
    """`path_text` of an input text, which may also be a URL."""
    return str(value) if is_url(value) else path_text(value, option)
