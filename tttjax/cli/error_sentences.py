"""One sentence for every error that the user can mend."""

import errno
import os
import sys
from collections.abc import Iterator

from tttjax.errors import UserError, is_out_of_memory


def error_sentence(error: BaseException) -> str | None:
    """What the error says to the user; None if it is a bug."""
    if isinstance(error, UserError):
        return str(error)
    if _is_out_of_space(error):
        return (
            "No space left on the output device (or in the quota); free some space and run the "
            "same command again."
        )
    if cause := next(filter(is_out_of_memory, _causes(error)), None):
        message = str(cause).partition("\n")[0].rstrip(".")
        where = "host" if isinstance(cause, MemoryError) else "device"
        return (
            f"Out of memory on the {where} ({message}). For training, increase "
            "train.accum_steps or mesh.fsdp, or set inner.trajectory=recompute; otherwise "
            "reduce the batch size or context length. `tttjax plan` predicts what fits."
        )
    if isinstance(error, RecursionError) and "JSON" in str(error):
        return "A JSON file is nested too deeply; it is damaged."
    return _path_error_message(error) or _bucket_error_message(error) or None


def _is_out_of_space(error: BaseException) -> bool:
    """Whether the error or a cause is a full disk, which storage libraries only say in text."""
    return any(
        (isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT))
        or "No space left on device" in str(cause)
        for cause in _causes(error)
    )


def _bucket_error_message(error: BaseException) -> str:
    """The message for an error of the libraries that reach buckets; otherwise empty."""
    buckets = sys.modules.get("tttjax.io.buckets")  # imported once a path is in one
    if buckets is None or not buckets.is_bucket_error(error):
        return ""
    return buckets.unreachable_sentence("A bucket", error)


_PATH_ERRORS = {
    errno.EEXIST: "exists already as a file, but a folder is needed; choose another path",
    errno.ENOTDIR: "passes through a file where a folder is needed; choose another path",
    errno.EISDIR: "is a folder, but a file is needed; give a file",
    errno.ENAMETOOLONG: "is too long for a path; choose another path",
    errno.ENOENT: "does not exist; check the spelling and the current directory",
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS),
        "cannot be read or written with your permissions; change them or choose another path",
    ),
}


def _path_error_message(error: BaseException) -> str:
    """The message for an operating-system error about a path; otherwise empty."""
    if not isinstance(error, OSError) or not isinstance(error.filename, str | os.PathLike):
        return ""
    problem = _PATH_ERRORS.get(error.errno or 0)
    return f"{os.fspath(error.filename)} {problem}." if problem else ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
