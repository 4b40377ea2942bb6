"""Reads the documents of input files, in constant memory.

A plain text file is one document; JSON lines have one per line (a text or a conversation), Parquet
one per row. Long documents are read in spans.
"""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass

from tttjax.data import json_lines
from tttjax.data.conversations import Message, parse_conversation
from tttjax.data.inputs import CHATS, LINES, ROWS, InputFile
from tttjax.data.near_duplicates import carried_words
from tttjax.data.parquet import read_column
from tttjax.data.streams import READ_ERRORS, check_is_text, clean_text, open_stream, unreadable
from tttjax.errors import UserError

_BLOCK = 1 << 22  # bytes of text in one span of a long document
MARGIN = 1 << 12  # characters of context on either side of a span


@dataclass(frozen=True)
class TextSpan:
    """Consecutive text of a document; most documents are one span.

    before, after: up to `MARGIN` characters of the document on either side.
    carried: the last words before it (`near_duplicates.carried_words`).
    """

    document: str
    text: str
    is_first: bool = True
    is_last: bool = True
    before: str = ""
    after: str = ""
    carried: str = ""


@dataclass(frozen=True)
class Line:
    """A line of JSON, not yet parsed. key: JSON key of its text."""

    path: str
    document: str
    raw: bytes
    key: str


@dataclass(frozen=True)
class ChatLine:
    """A line of JSON with a conversation, not yet parsed."""

    path: str
    document: str
    raw: bytes

    @property
    def where(self) -> str:
        """The line, for messages."""
        return _where(self)

    def messages(self) -> list[Message]:
        """Raises UserError if the line is no conversation."""
        return parse_conversation(self.raw, self.where)


Item = InputFile | TextSpan | Line | ChatLine


def read_items(file: InputFile) -> Iterator[Item]:
    """Items of `file` to tokenise, each small enough to send to a worker.

    A short file is sent by name; the worker reads it.
    """
    if file.kind in (LINES, CHATS):
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
    buffer, before, carried, is_first, position = "", "", "", True, 0
    try:
        with open_stream(file.path) as stream:
            check_is_text(stream, file.path)
            while block := stream.read(_BLOCK):
                buffer += decoder.decode(block)
                position += len(block)
                # A span is long enough that the contexts of its two ends do not overlap.
                if len(buffer) >= max(_BLOCK // 4, 4 * MARGIN):
                    split = len(buffer) - MARGIN
                    text, after = buffer[:split], buffer[split:]
                    yield TextSpan(file.id, text, is_first, False, before, after, carried)
                    carried = carried_words(carried, text)
                    before, buffer, is_first = text[-MARGIN:], after, False
        buffer += decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file.path} is not UTF-8 text (about byte {position + error.start}); convert it to "
            "UTF-8 or exclude it."
        ) from error
    except READ_ERRORS as error:
        raise unreadable(file.path, error) from error
    yield TextSpan(file.id, buffer, is_first, is_last=True, before=before, carried=carried)


def _read_lines(file: InputFile) -> Iterator[Line | ChatLine]:
    try:
        with open_stream(file.path) as stream:
            check_is_text(stream, file.path)
            for number, raw in enumerate(stream, start=1):
                name = f"{file.id}:{number}"
                if raw.strip() and file.kind == CHATS:
                    yield ChatLine(file.path, name, raw)
                elif raw.strip():
                    yield Line(file.path, name, raw, file.text_key)
    except READ_ERRORS as error:
        raise unreadable(file.path, error) from error


def _read_rows(file: InputFile) -> Iterator[TextSpan]:
    for number, text in read_column(file.path, file.text_key):
        yield TextSpan(f"{file.id}:{number}", clean_text(text, f"{file.path}, row {number},"))


def item_spans(item: Item) -> Iterator[TextSpan]:
    """The text of an item in spans; of a conversation, what its messages say.

    Raises UserError if it is not text or not JSON.
    """
    if isinstance(item, TextSpan):
        yield item
    elif isinstance(item, InputFile):
        yield from file_spans(item)
    elif isinstance(item, ChatLine):
        text = "\n\n".join(message["content"] for message in item.messages())
        yield TextSpan(item.document, text)
    else:
        yield TextSpan(item.document, json_lines.text_of(item.raw, item.key, _where(item)))


def _where(item: Line | ChatLine) -> str:
    return f"{item.path}, line {item.document.rpartition(':')[2]}"


def item_size(item: Item) -> int:
    """Approximate bytes of text of an item, to group items into tasks of similar size."""
    if isinstance(item, InputFile):
        return item.text_bytes
    return len(item.text) if isinstance(item, TextSpan) else len(item.raw)
