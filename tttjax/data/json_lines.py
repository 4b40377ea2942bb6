"""JSON lines: whether a file has them, and the text of one."""

import json
from typing import Any, BinaryIO

from tttjax.data.streams import clean_text
from tttjax.errors import UserError

TEXT_KEY = "text"
_LONGEST = 1 << 26  # bytes of a first line by which a file without a telling name is judged


def are_lines(stream: BinaryIO, key: str, *, by_key: bool = False) -> bool:
    """Whether a stream begins with an object on a line of its own that is one of several, or has
    `key`: a single object without it is a document, not a record. by_key: only if it has it.
    """
    first = _next_line(stream)
    if len(first) >= _LONGEST or not first.lstrip(b"\xef\xbb\xbf \t\r").startswith(b"{"):
        return False
    try:
        record = parse(first, "")
    except UserError:
        return False
    return key in record or (not by_key and bool(_next_line(stream)))


def _next_line(stream: BinaryIO) -> bytes:
    """The next line that is not empty; empty at the end."""
    while line := stream.readline(_LONGEST):
        if line.strip():
            return line
    return b""


def parse(raw: bytes, where: str) -> dict[str, Any]:
    """The object of a line. UserError if it is not one."""
    try:
        record = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}).") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object, which each line must be.")
    return record


def text_of(raw: bytes, key: str, where: str) -> str:
    """The text under `key` of a line. UserError, beginning with `where`, if there is none."""
    record = parse(raw, where)
    text = record.get(key)
    if not isinstance(text, str):
        have = ", ".join(f'"{name}"' for name, value in record.items() if isinstance(value, str))
        raise UserError(
            f'{where}: no text under the key "{key}" (keys with text: {have or "none"}); name one '
            "with --text-key."
        )
    return clean_text(text, f"{where}: the text")
