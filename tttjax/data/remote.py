"""Texts behind URLs (`https://`, `gs://`, `s3://`, `hf://`, ...), read with fsspec.

Many protocols need a further package; the error names it. What goes wrong on the way is raised as
`OSError` or `EOFError`, as for a local file: every implementation has exceptions of its own.
"""

import contextlib
import hashlib
import io
from collections.abc import Iterator
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlsplit

from tttjax.errors import UserError

_BLOCK = 1 << 20
_SECRETS = {"signature", "sig", "token", "access_token", "api_key", "apikey", "password"}


def list_files(url: str) -> list[str]:
    """The URLs of all files below a folder, sorted, or `url` itself. Raises OSError."""
    system, path = _open_system(url)
    with _as_os_error():
        if system.info(path)["type"] != "directory":  # `isdir` would load a web page whole
            return [url]
        return sorted(system.unstrip_protocol(file) for file in system.find(path))


def describe(url: str) -> tuple[int, str]:
    """Size, and what changes with the content as far as the server tells. Raises OSError."""
    system, path = _open_system(url)
    with _as_os_error():
        info = system.info(path)
        if info.get("mimetype") == "text/html" and not urlsplit(url).path.endswith(
            (".html", ".htm")
        ):
            raise UserError(f"{url} is a web page, not a text; name the file itself.")
        if info.get("size") is None:  # a web server need not say
            return _read_through(system.open(path, "rb"))
        # The key of a web page is its address alone.
        marks = [system.ukey(path), info.get("ETag"), info.get("Last-Modified")]
        return info["size"], " ".join(str(mark) for mark in marks if mark)


def _read_through(file: Any) -> tuple[int, str]:
    """Size and hash of the content."""
    size, digest = 0, hashlib.sha256()
    with file:
        while block := file.read(_BLOCK):
            size += len(block)
            digest.update(block)
    return size, digest.hexdigest()


def open_file(url: str) -> io.BufferedReader:
    """The bytes of a file. Opening and reading raise OSError or EOFError."""
    system, path = _open_system(url)
    with _as_os_error():
        return io.BufferedReader(_RemoteFile(system, path))


def _open_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    import fsspec  # slow, and not needed for files of this machine

    _refuse_secrets(url)
    protocol = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise UserError(f"Reading {url} needs a further package: {error}.") from error
    except ValueError as error:
        raise UserError(
            f"{url} begins with {protocol}://, which fsspec does not know; check the spelling, or "
            "name a local file."
        ) from error
    with _as_os_error():
        return fsspec.url_to_fs(url)


def _refuse_secrets(url: str) -> None:
    """Raises UserError for credentials in a URL: it is a document's name, and is written to files.

    The message does not repeat them.
    """
    parts = urlsplit(url)
    keys = {key.lower().removeprefix("x-amz-").removeprefix("x-goog-") for key in _query(parts)}
    if parts.password is not None or keys & (_SECRETS | {"credential", "security-token"}):
        raise UserError(
            f"The URL {parts.scheme}://{parts.hostname}{parts.path} holds credentials, which would "
            "be written to files; leave them to the settings of the package that reads it, or "
            "download the file."
        )


def _query(parts: SplitResult) -> list[str]:
    return [key for key, _ in parse_qsl(parts.query, keep_blank_values=True)]


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        # fsspec says so of a web server that it could not reach, too.
        cause = error.__cause__
        if cause is None or isinstance(cause, FileNotFoundError) or _status(cause) in (404, 410):
            raise
        raise OSError(_in_short(cause)) from error
    except (OSError, EOFError, UserError):
        raise
    except Exception as error:
        raise OSError(_in_short(error)) from error


def _status(error: BaseException) -> int | None:
    """The answer of a web server that an exception of aiohttp holds."""
    return getattr(error, "status", None)


def _in_short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": ")


class _RemoteFile(io.RawIOBase):
    """A file of fsspec. Raises EOFError where the content ends before its stated size."""

    def __init__(self, system: Any, path: str):
        self._system, self._path = system, path
        self._file: Any = None  # `close` is called also if opening fails
        self._file = system.open(path, "rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _as_os_error():
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        # Full buffers: the first bytes of a text are checked together.
        filled = 0
        with _as_os_error():
            while filled < len(buffer) and (block := self._read(len(buffer) - filled)):
                buffer[filled : filled + len(block)] = block
                filled += len(block)
            size = getattr(self._file, "size", None)
            if not filled and len(buffer) and size is not None and self._file.tell() < size:
                raise EOFError("the connection ended too early")
        return filled

    def _read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except ValueError:
            if "http" not in self._system.protocol:
                raise
            # The server sends no parts, which fsspec asks for so that no connection lasts for long.
            position = self._file.tell()
            self._file.close()
            self._file = self._system.open(self._path, "rb", block_size=0)
            while self._file.tell() < position and self._file.read(
                min(position - self._file.tell(), _BLOCK)
            ):
                pass
            return self._file.read(size)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()
