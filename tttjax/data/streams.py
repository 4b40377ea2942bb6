"""Reads input files: decompression by content, and decoding to text.

Every input text passes through here. It must be UTF-8; a leading byte-order mark is dropped, and
line endings are kept. Archives and other binary files are refused.
"""

import bz2
import gzip
import io
import lzma
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

from tttjax.data import remote
from tttjax.errors import ResumableError, UserError
from tttjax.io.paths import is_url

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BYTE_ORDER_MARK = "\ufeff"
# Errors of reading or decompressing a file.
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError)
_HEAD = 8192  # bytes that are checked for binary content
_ARCHIVES = {
    b"PK\x03\x04": "a zip archive",
    b"PK\x05\x06": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a rar archive",
}
# Of the first block, and of the end of an empty file; `BZh` and a digit alone could begin a text.
_BZIP2_BLOCKS = (b"\x31\x41\x59\x26\x53\x59", b"\x17\x72\x45\x38\x50\x90")
_BINARY_FORMATS = {
    b"\x04\x22\x4d\x18": "compressed with lz4",
    b"%PDF-": "a PDF file",
    b"ARROW1\x00": "an Arrow file",
}


def unreadable(path: str | os.PathLike, error: Exception) -> UserError:
    """The error to raise for a text that cannot be read."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if is_url(path):
        return ResumableError(
            f"Cannot read {path} ({reason}); check the address, the network and your access to "
            "it, and run the same command again."
        )
    return UserError(
        f"Cannot read {path} ({reason}); repair the file or its permissions, or exclude it."
    )


def is_compressed(head: bytes) -> bool:
    """Whether a file that begins with `head` (10 bytes) is gzip, xz, bzip2 or Zstandard."""
    return _decompressor(head) is not None


def _decompressor(head: bytes) -> Callable[[Any], Any] | None:
    """The reader for content that begins with `head`.

    All of them read files of several parts and raise for a truncated file. fsspec's readers are the
    same, except that of Zstandard, which may accept a truncated file and stop after one frame.
    """
    if head.startswith(b"\x1f\x8b"):
        return lambda file: gzip.GzipFile(fileobj=file)
    if head.startswith(b"\xfd7zXZ\x00"):
        return lzma.LZMAFile
    if head.startswith(b"BZh") and head[4:10] in _BZIP2_BLOCKS:
        return bz2.BZ2File
    is_skippable = head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F
    return zstd.ZstdFile if is_skippable or head.startswith(b"\x28\xb5\x2f\xfd") else None


def is_parquet(head: bytes) -> bool:
    """Whether a file that begins with `head` (a few hundred bytes) is Parquet."""
    return head.startswith(b"PAR1") and b"\x00" in head


def open_stream(path: str | os.PathLike) -> BinaryIO:
    """The file's content as a byte stream, decompressed whatever its suffix."""
    return decompressed(open_raw(path))


def open_raw(path: str | os.PathLike) -> BinaryIO:
    """The file's bytes as they are. path: a local file or a URL."""
    return remote.open_file(str(path)) if is_url(path) else Path(path).open("rb")


def decompressed(file: Any) -> BinaryIO:
    """A buffered byte stream, decompressed if its content is compressed."""
    decompressor = _decompressor(file.peek(10)[:10])
    return file if decompressor is None else cast(BinaryIO, _Closing(decompressor(file), file))


class _Closing(io.BufferedReader):
    """A reader that also closes the file beneath it."""

    def __init__(self, reader: Any, file: Any):
        super().__init__(reader, 1 << 20)
        self._file = file

    def close(self) -> None:
        super().close()
        self._file.close()


def check_is_text(stream: Any, name: str | os.PathLike) -> None:
    """UserError if a buffered stream begins like an archive or another binary file."""
    head = stream.peek(_HEAD)[:_HEAD]
    kind = next((kind for magic, kind in _ARCHIVES.items() if head.startswith(magic)), None)
    if head[257:262] == b"ustar":
        kind = "a tar archive"
    if kind:
        raise UserError(f"{name} is {kind}; unpack it, and name the folder or its files.")
    kind = next((kind for magic, kind in _BINARY_FORMATS.items() if head.startswith(magic)), None)
    if kind and kind.startswith("compressed"):
        raise UserError(
            f"{name} is {kind}, which is not supported; unpack it, or compress it with "
            "zstd, gzip, xz or bzip2."
        )
    if is_parquet(head):
        raise UserError(f"{name} is a Parquet file of many documents, not one text.")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{name} is not UTF-8 text (it looks like UTF-16); convert it to UTF-8.")
    if kind or b"\x00" in head:
        raise UserError(f"{name} is {kind or 'a binary file'}, not text; exclude it.")


def read_text(path: str | os.PathLike) -> str:
    """The text of a file or a URL, decompressed if needed; "-": standard input.

    Raises UserError if it cannot be read or is not UTF-8 text.
    """
    is_input = os.fspath(path) == "-"
    name = "standard input" if is_input else path
    try:
        if is_input:
            raw: Any = io.BytesIO(sys.stdin.buffer.read())
            stream = decompressed(io.BufferedReader(raw))
        else:
            stream = open_stream(path)
        with stream:
            check_is_text(stream, name)
            return stream.read().decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text (byte {error.start}); convert it to UTF-8."
        ) from error
    except FileNotFoundError as error:
        raise UserError(f"{name} does not exist") from error
    except READ_ERRORS as error:
        raise unreadable(name, error) from error


def clean_text(text: str, name: str) -> str:
    """A text without a leading byte-order mark. Raises UserError as `check_unicode` does."""
    check_unicode(text, name)
    return text.removeprefix(BYTE_ORDER_MARK)


def check_unicode(text: str, name: str) -> None:
    """Raises UserError if a text has a lone surrogate (half of a character).

    Python also uses these for command-line bytes that are not UTF-8. name: for the message.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} has a lone surrogate ({text[error.start]!r} at character {error.start}), "
            "which is not Unicode text; give it as UTF-8."
        ) from error
