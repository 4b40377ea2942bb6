"""Inputs of `tttjax prepare`: files and folders to documents, in constant memory.

A plain text file (also `.gz`, `.xz`, `.zst`) is one document; a `.jsonl` file has one per line,
under the key "text". `stdlib` stands for the sources of the running Python's standard library.
Documents are read in pieces, so that neither a huge file nor a huge archive is ever in memory.
"""

import codecs
import fnmatch
import gzip
import io
import json
import lzma
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from tttjax.errors import UserError
from tttjax.paths import local_path

STDLIB = "stdlib"
TEXT_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in """txt text md rst tex html xml csv tsv py pyi c h cc cpp hpp cu rs go java js ts
    jl r rb sh pl lua hs ml scala swift kt sql toml yaml yml ini cfg json jsonl""".split()  # noqa: SIM905
)
_COMPRESSED = (".gz", ".xz", ".zst")
_STDLIB_SKIP = frozenset(
    ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test")
)
_BLOCK = 1 << 22  # bytes of text in one piece of a long document
MARGIN = 1 << 12  # characters beyond the ends of a piece that are known with it


@dataclass(frozen=True)
class InputFile:
    """A file to read. `id` names its document, independently of where the inputs lie."""

    path: str
    id: str
    size: int
    mtime_ns: int

    @property
    def compressed(self) -> bool:
        return self.path.endswith(_COMPRESSED)

    @property
    def is_jsonl(self) -> bool:
        return _suffix(self.path) == ".jsonl"


@dataclass(frozen=True)
class Piece:
    """Some text of a document; most documents are one piece.

    before, after: the last and the first `MARGIN` characters of the pieces beside it.
    """

    document: str
    text: str
    begins: bool = True
    ends: bool = True
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Line:
    """A line of a `.jsonl` file, not yet parsed."""

    path: str
    document: str
    raw: bytes


Item = InputFile | Piece | Line


def list_inputs(inputs: Sequence[str | os.PathLike], pattern: str = "") -> list[InputFile]:
    """All files of `inputs`, in an order that does not depend on the file system.

    Folders are searched recursively, hidden names left out: for `pattern` (shell wildcards on the
    file's name) or, without one, for the usual suffixes of text. Raises UserError for an input that
    is missing, cannot be read, or has nothing to read in it.
    """
    files: list[InputFile] = []
    for name in inputs:
        path = local_path(name)
        if str(name) == STDLIB and not path.exists():
            files += _list_stdlib(pattern)
        elif path.is_dir():
            files += _list_folder(path, pattern)
        elif path.exists():
            files.append(_input_file(path, path.name))
        else:
            raise UserError(
                f"Input {path} does not exist; check how it is spelt, and where the command was "
                "started."
            )
    if not files:
        raise UserError("No input was given: name files, folders, or `stdlib`.")
    if not sum(file.size for file in files):
        raise UserError(f"All input files are empty (the first is {files[0].path}).")
    return files


def _list_folder(folder: Path, pattern: str) -> list[InputFile]:
    found = []
    for root, folders, names in os.walk(folder, onerror=_refuse_folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found += [Path(root, name) for name in names if not name.startswith(".")]
    chosen = sorted(path for path in found if _wanted(path.name, pattern))
    if not chosen:
        wanted = f"matches the pattern {pattern!r}" if pattern else "has a known suffix of text"
        raise UserError(
            f"None of the {len(found)} files in {folder} {wanted}; choose others with --pattern."
        )
    prefix = folder.resolve().name
    return [_input_file(p, f"{prefix}/{p.relative_to(folder).as_posix()}") for p in chosen]


def _list_stdlib(pattern: str) -> list[InputFile]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(folder.rglob(pattern or "*.py")):
        relative = path.relative_to(folder)
        # Some sources are deliberately in other encodings; they only test the parser.
        if not _STDLIB_SKIP & set(relative.parts) and _is_utf8(path):
            files.append(_input_file(path, f"{STDLIB}/{relative.as_posix()}"))
    return files


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode("utf-8")
    except (UnicodeDecodeError, OSError):
        return False
    return True


def _wanted(name: str, pattern: str) -> bool:
    return fnmatch.fnmatch(name, pattern) if pattern else _suffix(name) in TEXT_SUFFIXES


def _suffix(name: str) -> str:
    """Last suffix of a file name, compression left aside: `a.txt.xz` -> `.txt`."""
    path = Path(name)
    return (path.with_suffix("") if path.suffix in _COMPRESSED else path).suffix.lower()


def _input_file(path: Path, document: str) -> InputFile:
    try:
        stat = path.stat()
        with path.open("rb"):
            pass
    except OSError as error:
        raise _unreadable(path, error) from error
    return InputFile(str(path), document, stat.st_size, stat.st_mtime_ns)


def _unreadable(path: str | os.PathLike, error: Exception) -> UserError:
    why = getattr(error, "strerror", None) or error
    return UserError(
        f"Cannot read {path} ({why}); mend it or its permissions, or leave it out of the input."
    )


def _refuse_folder(error: OSError) -> None:
    raise _unreadable(error.filename, error) from error


def open_stream(path: str) -> BinaryIO:
    """The file's content as a stream of bytes, decompressed."""
    if path.endswith(".xz"):
        return cast(BinaryIO, lzma.open(path, "rb"))
    if path.endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.endswith(".zst"):
        return cast(BinaryIO, io.BufferedReader(_ZstdReader(path), 1 << 20))
    return Path(path).open("rb")


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of a `.zst` file of one or more frames.

    The library's own reader takes a file that was cut off for a complete one; this raises EOFError.
    """

    def __init__(self, path: str):
        self._file = Path(path).open("rb")  # noqa: SIM115 (closed by close)
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._ready = memoryview(b"")
        self._within = False  # a frame

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = (self._frame.unused_data if self._frame.eof else b"") or self._file.read(
                1 << 17
            )
            if not block:
                if self._within:
                    raise EOFError("the compressed file ends too early")
                return 0
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(block))
            self._within = not self._frame.eof
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def read_items(file: InputFile) -> Iterator[Item]:
    """What of `file` is to be tokenised, in pieces small enough to be handed to a worker.

    A short file is handed on by name: the worker reads it.
    """
    if file.is_jsonl:
        yield from _read_lines(file)
    elif file.size > (_BLOCK // 4 if file.compressed else _BLOCK):
        yield from read_pieces(file)
    else:
        yield file


def read_pieces(file: InputFile) -> Iterator[Piece]:
    """The document of a text file, cut about every 4 MiB.

    Raises UserError if it is not UTF-8 or its compression is damaged.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    held, before, begins, position = "", "", True, 0
    try:
        with open_stream(file.path) as stream:
            while block := stream.read(_BLOCK):
                held += decoder.decode(block)
                if position == 0:
                    held = held.removeprefix("\ufeff")  # a byte-order mark is not text
                position += len(block)
                # No piece is so short that its two ends are within reach of each other.
                if len(held) >= max(_BLOCK // 4, 4 * MARGIN):
                    cut = len(held) - MARGIN
                    after = held[cut:]
                    yield Piece(file.id, held[:cut], begins, False, before, after)
                    before, held, begins = held[cut - MARGIN : cut], after, False
        held += decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file.path} is not UTF-8 text (about byte {position + error.start}); convert it to "
            "UTF-8 or leave it out."
        ) from error
    except (OSError, EOFError, lzma.LZMAError, zstandard.ZstdError) as error:
        raise _unreadable(file.path, error) from error
    yield Piece(file.id, held, begins, ends=True, before=before)


def _read_lines(file: InputFile) -> Iterator[Line]:
    try:
        with open_stream(file.path) as stream:
            for number, raw in enumerate(stream, start=1):
                if raw.strip():
                    yield Line(file.path, f"{file.id}:{number}", raw)
    except (OSError, EOFError, lzma.LZMAError, zstandard.ZstdError) as error:
        raise _unreadable(file.path, error) from error


def pieces_of(item: Item) -> Iterator[Piece]:
    """The text of an item. Raises UserError for what is not text or not JSON."""
    if isinstance(item, Piece):
        yield item
    elif isinstance(item, InputFile):
        yield from read_pieces(item)
    else:
        yield Piece(item.document, _json_text(item))


def _json_text(line: Line) -> str:
    where = f"{line.path}, line {line.document.rpartition(':')[2]}"
    try:
        record = json.loads(line.raw)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text.") from error
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}).") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where}: no text under the key "text".')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: the text has a lone surrogate, which is not Unicode.") from error
    return text


def item_size(item: Item) -> int:
    """Roughly how many bytes of text an item has, to group items into tasks of like size."""
    if isinstance(item, InputFile):
        return item.size * (4 if item.compressed else 1)
    return len(item.text) if isinstance(item, Piece) else len(item.raw)
