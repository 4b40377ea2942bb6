"""Detects and parses JSON lines."""

import json
from typing import Any, BinaryIO

from tttjax.data.streams import clean_text
from tttjax.errors import UserError

_MAX_LINE = 1 << 26  # bytes of a first line that are read to detect JSON lines


def are_lines(stream: BinaryIO, key: str, *, by_key: bool = False) -> bool:
    """Whether a stream holds JSON lines: its first line is an object that has `key` or is one of
    several. by_key: only if it has `key`. A single object without `key` is a document.
    """
    first = _next_line(stream)
    if len(first) >= _MAX_LINE or not first.lstrip(b"\xef\xbb\xbf \t\r").startswith(b"{"):
        return False
    try:
        record = parse(first, "")
    except UserError:
        return False
    return key in record or (not by_key and bool(_next_line(stream)))


def _next_line(stream: BinaryIO) -> bytes:
    """The next line that is not blank; b"" at the end."""
    while line := stream.readline(_MAX_LINE):
        if line.strip():
            return line
    return b""


def parse(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object of a line. UserError if it is not one."""
    try:
        record = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}).") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object; each line must be one.")
    return record


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; without this, the last of equal keys would count."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'the key "{next(k for k in keys if keys.count(k) > 1)}" occurs twice')
    return record


def text_of(raw: bytes, key: str, where: str) -> str:
    """The text under `key` of a line. UserError, beginning with `where`, if there is none."""
    record = parse(raw, where)
    text = record.get(key)
    if not isinstance(text, str):
        available = ", ".join(
            f'"{name}"' for name, value in record.items() if isinstance(value, str)
        )
        raise UserError(
            f'{where}: no text under the key "{key}" (keys with text: {available or "none"}); name '
            "one with --text-key."
        )
    return clean_text(text, f"{where}: the text")
