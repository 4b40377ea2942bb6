"""Finds input files in folders and behind URLs, and detects their formats.

The format is detected from the content and the file name. `stdlib` stands for the sources of the
running Python's standard library.
"""

import fnmatch
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from tttjax.data import json_lines, remote
from tttjax.data.parquet import check_pyarrow
from tttjax.data.prepare_settings import TEXT_KEY
from tttjax.data.streams import (
    READ_ERRORS,
    check_is_text,
    is_compressed,
    is_parquet,
    open_raw,
    open_stream,
    unreadable,
)
from tttjax.errors import UserError
from tttjax.io.paths import is_url, local_path

STDLIB = "stdlib"
TEXT_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in """txt text md rst tex html xml csv tsv py pyi c h cc cpp hpp cu rs go java js ts
    jl r rb sh pl lua hs ml scala swift kt sql toml yaml yml ini cfg json jsonl ndjson
    parquet""".split()  # noqa: SIM905
)
TEXT, LINES, ROWS, JSON = "text", "JSON lines", "Parquet", "JSON"
CHATS = "conversations"
_COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
_HEAD = 1024  # bytes that identify compression and Parquet
_LINES_SUFFIXES = (".jsonl", ".ndjson")
_STDLIB_SKIP = frozenset(
    ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test")
)


@dataclass(frozen=True)
class InputFile:
    """A file to read. `id` names its document, independently of the location of local inputs.

    path: of a local file, or a URL. version: the time of the last change, in ns, or what tells
    about changes of a URL (`remote.describe`).
    kind: TEXT (one document), LINES (JSON lines), CHATS (JSON lines of conversations), ROWS
    (Parquet), or JSON (a single JSON document).
    text_key: JSON key or Parquet column of the text.
    """

    path: str
    id: str
    size: int
    version: int | str
    compressed: bool
    kind: str = TEXT
    text_key: str = TEXT_KEY

    @property
    def text_bytes(self) -> int:
        """Approximate bytes of its text."""
        return self.size * (4 if self.compressed else 1)


def list_inputs(
    inputs: Sequence[str | os.PathLike], pattern: str = "", text_key: str = TEXT_KEY
) -> list[InputFile]:
    """All files of `inputs` (paths and URLs), in an order that does not depend on the file system.

    Searches folders recursively, without hidden names, for `pattern` (shell wildcards on the file's
    name) or by default for the usual suffixes of text. Raises UserError for an input that is
    missing, unreadable, empty, an archive or not text.
    """
    files: list[InputFile] = []
    for name in inputs:
        if is_url(name):
            files += _list_url(str(name), pattern, text_key)
            continue
        path = local_path(name)
        if str(name) == STDLIB and not path.exists():
            files += _list_stdlib(pattern, text_key)
        elif path.is_dir():
            files += _list_folder(path, pattern, text_key)
        elif path.exists():
            files.append(_input_file(str(path), path.name, text_key))
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
        name = file.path if is_url(file.path) else os.path.realpath(file.path)
        by_file.setdefault(name, file)
    return list(by_file.values())


def _list_folder(folder: Path, pattern: str, text_key: str) -> list[InputFile]:
    paths = []
    for root, folders, names in os.walk(folder, onerror=_refuse_folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        paths += [Path(root, name) for name in names if not name.startswith(".")]
    chosen = sorted(path for path in paths if _matches(path.name, pattern))
    if not chosen:
        raise _no_match(len(paths), folder, pattern)
    prefix = folder.resolve().name
    return [
        _input_file(str(p), f"{prefix}/{p.relative_to(folder).as_posix()}", text_key)
        for p in chosen
    ]


def _no_match(count: int, folder: str | Path, pattern: str) -> UserError:
    criterion = f"matches the pattern {pattern!r}" if pattern else "has a known suffix of text"
    return UserError(
        f"None of the {count} files in {folder} {criterion}; choose others with --pattern."
    )


def _list_url(url: str, pattern: str, text_key: str) -> list[InputFile]:
    """The file of a URL, or those of a folder in a bucket; their documents are named by URL."""
    try:
        files = remote.list_files(url)
    except FileNotFoundError as error:
        raise UserError(f"Input {url} does not exist; check its spelling.") from error
    except READ_ERRORS as error:
        raise unreadable(url, error) from error
    if files != [url]:
        visible = [file for file in files if _is_visible(file, url)]
        files = [file for file in visible if _matches(_name(file), pattern)]
        if not files:
            raise _no_match(len(visible), url, pattern)
    return [_input_file(file, file, text_key) for file in files]


def _is_visible(file: str, folder: str) -> bool:
    """Whether no part of the path below the folder begins with a dot."""
    depth = len(PurePosixPath(urlsplit(folder).path).parts)
    return not any(
        part.startswith(".") for part in PurePosixPath(urlsplit(file).path).parts[depth:]
    )


def _name(path: str) -> str:
    """The file name of a path or URL, without the query of the latter."""
    return PurePosixPath(urlsplit(path).path).name if is_url(path) else Path(path).name


def _list_stdlib(pattern: str, text_key: str) -> list[InputFile]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(folder.rglob(pattern or "*.py")):
        relative = path.relative_to(folder)
        # A few sources are in other encodings on purpose, to test the parser.
        if not _STDLIB_SKIP & set(relative.parts) and _is_utf8(path):
            files.append(_input_file(str(path), f"{STDLIB}/{relative.as_posix()}", text_key))
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


def _input_file(path: str, document: str, text_key: str) -> InputFile:
    """Raises UserError if the file is unreadable or not text."""
    try:
        size, version = remote.describe(path) if is_url(path) else _describe(path)
        with open_raw(path) as file:
            head = file.read(_HEAD)
        compressed = is_compressed(head) or is_parquet(head)
        kind = ROWS if is_parquet(head) else _kind(path, text_key)
    except READ_ERRORS as error:
        raise unreadable(path, error) from error
    if kind == ROWS:
        check_pyarrow(path)
    # Names that are not UTF-8 are escaped, since they are written to tables and files.
    name = os.fsencode(document).decode("utf-8", "backslashreplace")
    return InputFile(path, name, size, version, compressed, kind, text_key)


def _describe(path: str) -> tuple[int, int]:
    """Size and time of the last change of a local file."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def _kind(path: str, text_key: str) -> str:
    """The kind of a file by its suffix or, if that is ambiguous, by its first lines."""
    suffix = _suffix(_name(path))
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
