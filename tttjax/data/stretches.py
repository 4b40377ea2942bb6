"""Tokens of long texts, encoded in stretches, and equal to the tokens of the whole text.

Tokenizers slow down, and take much memory, on very long strings. A text may be cut where the
tokens of the whole text have a border, and no tokenizer says where that is, so each cut is tried:

    encode(left + right) must begin with encode(left)

with some text on the left and on the right of it. What is encoded after a cut is encoded behind
the text on its left, which is then taken off, because many tokenizers put a blank before whatever
they are given. The tokens beside a cut must not depend on where the text on the left begins: for
byte-pair encoding it then follows that the border is one of the whole text, since no merge reaches
across it from either side, and digits are not grouped from another place on. Where no cut is found,
the text is encoded whole.
"""

import re
from collections.abc import Iterator

import numpy as np

from tttjax.data.documents import MARGIN, TextSpan
from tttjax.data.tokenizers.base import Tokenizer
from tttjax.errors import UserError

STRETCH = 1 << 16  # characters
CONTEXT = 240  # characters on either side of a cut
_SHIFTS = (
    0,
    1,
    2,
)  # characters more on the left, with which nothing may change: digits go by three
_TAIL = 4  # tokens before a cut that have to agree
_LIKELY, _TRIES = 64, 128
# Where a word ends: every known pre-tokenizer and every vocabulary of words has a border there.
_WORD_END = re.compile(r"(?<=\w)(?=\s)")


def encode_text(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """int32 [N] tokens of a text of any length: those of `tokenizer.encode`."""
    tokens = _in_stretches(tokenizer, text, 0, len(text)) if tokenizer.can_be_cut else None
    return tokenizer.encode(text) if tokens is None else tokens


def encode_piece(tokenizer: Tokenizer, piece: TextSpan) -> tuple[np.ndarray, int]:
    """(int32 [N] tokens of a piece of a document, UTF-8 bytes of the text that they are of).

    The tokens of all pieces, one after the other, are those of the document: a piece begins and
    ends at the border of tokens that is nearest to the border of its text.

    Raises UserError if there is none.
    """
    if piece.begins and piece.ends:
        return encode_text(tokenizer, piece.text), len(piece.text.encode("utf-8"))
    if not tokenizer.can_be_cut:
        raise _refusal(tokenizer, piece.document)
    text = piece.before + piece.text + piece.after
    start, stop = len(piece.before), len(piece.before) + len(piece.text)
    start = 0 if piece.begins else _border(tokenizer, text, start, piece.document)
    stop = len(text) if piece.ends else _border(tokenizer, text, stop, piece.document)
    tokens = _in_stretches(tokenizer, text, start, stop)
    if tokens is None:
        tokens = _between(tokenizer, text, start, stop)
    if tokens is None:
        raise _refusal(tokenizer, piece.document)
    return tokens, len(text[start:stop].encode("utf-8"))


def _border(tokenizer: Tokenizer, text: str, near: int, document: str) -> int:
    cut = _cut(tokenizer, text, near)
    if cut is None:
        raise _refusal(tokenizer, document)
    return cut


def _refusal(tokenizer: Tokenizer, document: str) -> UserError:
    return UserError(
        f"{document} is too long to be encoded at once, and the {tokenizer.kind} tokenizer "
        f"({tokenizer.fingerprint()[:12]}) has no border of tokens where it could be cut; split "
        "the document, or use --tokenizer=bytes."
    )


def _in_stretches(tokenizer: Tokenizer, text: str, start: int, stop: int) -> np.ndarray | None:
    """Tokens of text[start:stop], with the text before it known; None if it cannot be cut."""
    parts: list[np.ndarray] = []
    while start < stop or not parts:
        end: int | None = stop
        if stop - start > 2 * STRETCH:
            end = _cut(tokenizer, text, start + STRETCH)
        part = None if end is None else _between(tokenizer, text, start, end)
        if end is None or part is None:
            return None
        parts.append(part)
        start = end
    return np.concatenate(parts)


def _between(tokenizer: Tokenizer, text: str, start: int, stop: int) -> np.ndarray | None:
    """Tokens of text[start:stop]; None if it has no border of tokens at one of its ends."""
    before = text[max(0, start - CONTEXT) : start]
    known = tokenizer.encode(before) if before else np.zeros(0, np.int32)
    tokens = tokenizer.encode(before + text[start:stop])
    if not np.array_equal(tokens[: len(known)], known):
        return None
    if stop < len(text):
        at_end = tokenizer.encode(text[max(0, stop - CONTEXT) : stop])
        if not _agree(tokens, at_end):
            return None
    return tokens[len(known) :]


def _cut(tokenizer: Tokenizer, text: str, near: int) -> int | None:
    """The best place to cut, found from no more than `MARGIN` characters on either side."""
    first = max(0, near - MARGIN)
    window = text[first : near + MARGIN]
    for place in _candidates(window, near - first):
        if _is_border(tokenizer, window, place):
            return first + place
    return None


def _candidates(window: str, near: int) -> Iterator[int]:
    """Places from which both contexts lie in the window; the likely ones first."""
    low, high = CONTEXT + max(_SHIFTS), len(window) - CONTEXT
    ends = [match.start() for match in _WORD_END.finditer(window)]
    likely = sorted((e for e in ends if low <= e <= high), key=lambda e: abs(e - near))
    yield from likely[:_LIKELY]
    yield from (p for p in range(near, near - _TRIES, -1) if low <= p <= high)


def _is_border(tokenizer: Tokenizer, window: str, place: int) -> bool:
    right = window[place : place + CONTEXT]
    first = np.zeros(0, np.int32), np.zeros(0, np.int32)
    for shift in _SHIFTS:
        left = window[place - CONTEXT - shift : place]
        alone = tokenizer.encode(left)
        both = tokenizer.encode(left + right)
        if not np.array_equal(both[: len(alone)], alone):
            return False
        found = alone, both[len(alone) :]
        if shift and not (_agree(first[0], found[0]) and np.array_equal(first[1], found[1])):
            return False
        first = found
    return True


def _agree(tokens: np.ndarray, others: np.ndarray) -> bool:
    """Whether both end with the same tokens; False if there is nothing to compare."""
    size = min(_TAIL, len(tokens), len(others))
    return size > 0 and np.array_equal(tokens[-size:], others[-size:])
