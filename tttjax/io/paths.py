"""User-supplied paths: local files and folders, with `~` expanded, and URLs of texts."""

import os
import re
from pathlib import Path

from tttjax.errors import UserError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # pathlib makes one slash of two
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


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
            "not supported yet; name a local folder, or a path where the bucket is mounted."
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


def path_text(value: str | os.PathLike, option: str = "") -> str:
    """`local_path` as text; unchanged where nothing is expanded."""
    text = os.fspath(value)
    path = local_path(text, option)
    return str(path) if text.startswith("~") else text


def absolute_path(value: str | os.PathLike, option: str = "") -> str:
    """`local_path` made absolute; symbolic links are not resolved."""
    return str(local_path(value, option).absolute())


def is_url(value: str | os.PathLike) -> bool:
    """Whether a text is read from `scheme://...`, with fsspec."""
    return isinstance(value, str) and _URL.match(value) is not None


def text_path(value: str | os.PathLike, option: str = "") -> str:
    """`path_text` of an input text, which may also be a URL."""
    return str(value) if is_url(value) else path_text(value, option)
