"""Reads the documents of input files and folders, in constant memory.

A plain text file is one document; JSON lines have one per line, Parquet one per row. The format is
detected from the content and the file name. `stdlib` stands for the sources of the running Python's
standard library. Long documents are read in spans.
"""

import codecs
import fnmatch
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tttjax.data import json_lines
from tttjax.data.parquet import check_pyarrow, read_column
from tttjax.data.prepare_settings import TEXT_KEY
from tttjax.data.streams import (
    READ_ERRORS,
    check_is_text,
    clean_text,
    is_compressed,
    is_parquet,
    open_stream,
    unreadable,
)
from tttjax.errors import UserError
from tttjax.io.paths import local_path

STDLIB = "stdlib"
TEXT_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in """txt text md rst tex html xml csv tsv py pyi c h cc cpp hpp cu rs go java js ts
    jl r rb sh pl lua hs ml scala swift kt sql toml yaml yml ini cfg json jsonl ndjson
    parquet""".split()  # noqa: SIM905
)
TEXT, LINES, ROWS, JSON = "text", "JSON lines", "Parquet", "JSON"
_COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
_HEAD = 1024  # bytes that identify compression and Parquet
_LINES_SUFFIXES = (".jsonl", ".ndjson")
_STDLIB_SKIP = frozenset(
    ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test")
)
_BLOCK = 1 << 22  # bytes of text in one span of a long document
MARGIN = 1 << 12  # characters of context on either side of a span


@dataclass(frozen=True)
class InputFile:
    """A file to read. `id` names its document, independently of the location of the inputs.

    kind: TEXT (one document), LINES (JSON lines), ROWS (Parquet), or JSON (a single JSON document).
    text_key: JSON key or Parquet column of the text.
    """

    path: str
    id: str
    size: int
    mtime_ns: int
    compressed: bool
    kind: str = TEXT
    text_key: str = TEXT_KEY


@dataclass(frozen=True)
class TextSpan:
    """Consecutive text of a document; most documents are one span.

    before, after: up to `MARGIN` characters of the document on either side.
    """

    document: str
    text: str
    is_first: bool = True
    is_last: bool = True
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Line:
    """A line of JSON, not yet parsed. key: JSON key of its text."""

    path: str
    document: str
    raw: bytes
    key: str


Item = InputFile | TextSpan | Line


def list_inputs(
    inputs: Sequence[str | os.PathLike], pattern: str = "", text_key: str = TEXT_KEY
) -> list[InputFile]:
    """All files of `inputs`, in an order that does not depend on the file system.

    Searches folders recursively, without hidden names, for `pattern` (shell wildcards on the file's
    name) or by default for the usual suffixes of text. Raises UserError for an input that is
    missing, unreadable, empty, an archive or not text.
    """
    files: list[InputFile] = []
    for name in inputs:
        path = local_path(name)
        if str(name) == STDLIB and not path.exists():
            files += _list_stdlib(pattern, text_key)
        elif path.is_dir():
            files += _list_folder(path, pattern, text_key)
        elif path.exists():
            files.append(_input_file(path, path.name, text_key))
        else:
            raise UserError(
                f"Input {path} does not exist; check its spelling and the working directory."
            )
    if not files:
        raise UserError("No input was given: name files, folders, or `stdlib`.")
    files = _unique_files(files)
    if not sum(file.size for file in files):
        raise UserError(f"All input files are empty (the first is {files[0].path}).")
    return files


def _unique_files(files: Sequence[InputFile]) -> list[InputFile]:
    """Each file once, by its first name: under two names it could be in both splits."""
    by_file: dict[str, InputFile] = {}
    for file in files:
        by_file.setdefault(os.path.realpath(file.path), file)
    return list(by_file.values())


def _list_folder(folder: Path, pattern: str, text_key: str) -> list[InputFile]:
    paths = []
    for root, folders, names in os.walk(folder, onerror=_refuse_folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        paths += [Path(root, name) for name in names if not name.startswith(".")]
    chosen = sorted(path for path in paths if _matches(path.name, pattern))
    if not chosen:
        criterion = f"matches the pattern {pattern!r}" if pattern else "has a known suffix of text"
        raise UserError(
            f"None of the {len(paths)} files in {folder} {criterion}; choose others with --pattern."
        )
    prefix = folder.resolve().name
    return [
        _input_file(p, f"{prefix}/{p.relative_to(folder).as_posix()}", text_key) for p in chosen
    ]


def _list_stdlib(pattern: str, text_key: str) -> list[InputFile]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(folder.rglob(pattern or "*.py")):
        relative = path.relative_to(folder)
        # A few sources are in other encodings on purpose, to test the parser.
        if not _STDLIB_SKIP & set(relative.parts) and _is_utf8(path):
            files.append(_input_file(path, f"{STDLIB}/{relative.as_posix()}", text_key))
    return files


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode("utf-8")
    except (UnicodeDecodeError, OSError):
        return False
    return True


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatch(name, pattern) if pattern else _suffix(name) in TEXT_SUFFIXES


def _suffix(name: str) -> str:
    """Last suffix of a file name, ignoring compression: `a.txt.xz` -> `.txt`."""
    path = Path(name)
    return (path.with_suffix("") if path.suffix in _COMPRESSED else path).suffix.lower()


def _input_file(path: Path, document: str, text_key: str) -> InputFile:
    """Raises UserError if the file is unreadable or not text."""
    try:
        stat = path.stat()
        with path.open("rb") as file:
            head = file.read(_HEAD)
        compressed = is_compressed(head) or is_parquet(head)
        kind = ROWS if is_parquet(head) else _kind(path, text_key)
    except READ_ERRORS as error:
        raise unreadable(path, error) from error
    if kind == ROWS:
        check_pyarrow(str(path))
    # Names that are not UTF-8 are escaped, since they are written to tables and files.
    name = os.fsencode(document).decode("utf-8", "backslashreplace")
    return InputFile(str(path), name, stat.st_size, stat.st_mtime_ns, compressed, kind, text_key)


def _kind(path: Path, text_key: str) -> str:
    """The kind of a file by its suffix or, if that is ambiguous, by its first lines."""
    suffix = _suffix(path.name)
    with open_stream(path) as stream:
        check_is_text(stream, path)
        if suffix in _LINES_SUFFIXES:
            return LINES
        if suffix == ".json":
            return LINES if json_lines.are_lines(stream, text_key) else JSON
        if suffix not in TEXT_SUFFIXES and json_lines.are_lines(stream, text_key, by_key=True):
            return LINES
    return TEXT


def _refuse_folder(error: OSError) -> None:
    raise unreadable(error.filename, error) from error


def read_items(file: InputFile) -> Iterator[Item]:
    """Items of `file` to tokenise, each small enough to send to a worker.

    A short file is sent by name; the worker reads it.
    """
    if file.kind == LINES:
        yield from _read_lines(file)
    elif file.kind == ROWS:
        yield from _read_rows(file)
    elif file.size > (_BLOCK // 4 if file.compressed else _BLOCK):
        yield from file_spans(file)
    else:
        yield file


def file_spans(file: InputFile) -> Iterator[TextSpan]:
    """The document of a text file in spans of about 4 MiB.

    Raises UserError if it is not UTF-8 text or its compression is damaged.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # drops a byte-order mark
    buffer, before, is_first, position = "", "", True, 0
    try:
        with open_stream(file.path) as stream:
            check_is_text(stream, file.path)
            while block := stream.read(_BLOCK):
                buffer += decoder.decode(block)
                position += len(block)
                # A span is long enough that the contexts of its two ends do not overlap.
                if len(buffer) >= max(_BLOCK // 4, 4 * MARGIN):
                    split = len(buffer) - MARGIN
                    after = buffer[split:]
                    yield TextSpan(file.id, buffer[:split], is_first, False, before, after)
                    before, buffer, is_first = buffer[split - MARGIN : split], after, False
        buffer += decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file.path} is not UTF-8 text (about byte {position + error.start}); convert it to "
            "UTF-8 or exclude it."
        ) from error
    except READ_ERRORS as error:
        raise unreadable(file.path, error) from error
    yield TextSpan(file.id, buffer, is_first, is_last=True, before=before)


def _read_lines(file: InputFile) -> Iterator[Line]:
    try:
        with open_stream(file.path) as stream:
            check_is_text(stream, file.path)
            for number, raw in enumerate(stream, start=1):
                if raw.strip():
                    yield Line(file.path, f"{file.id}:{number}", raw, file.text_key)
    except READ_ERRORS as error:
        raise unreadable(file.path, error) from error


def _read_rows(file: InputFile) -> Iterator[TextSpan]:
    for number, text in read_column(file.path, file.text_key):
        yield TextSpan(f"{file.id}:{number}", clean_text(text, f"{file.path}, row {number},"))


def item_spans(item: Item) -> Iterator[TextSpan]:
    """The text of an item in spans. Raises UserError if it is not text or not JSON."""
    if isinstance(item, TextSpan):
        yield item
    elif isinstance(item, InputFile):
        yield from file_spans(item)
    else:
        where = f"{item.path}, line {item.document.rpartition(':')[2]}"
        yield TextSpan(item.document, json_lines.text_of(item.raw, item.key, where))


def item_size(item: Item) -> int:
    """Approximate bytes of text of an item, to group items into tasks of similar size."""
    if isinstance(item, InputFile):
        return item.size * (4 if item.compressed else 1)
    return len(item.text) if isinstance(item, TextSpan) else len(item.raw)
