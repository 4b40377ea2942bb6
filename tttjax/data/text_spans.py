"""Encodes long texts span by span; the tokens equal those of the whole text.

Tokenizers are slow and use much memory on very long strings. A text may be split at any token
boundary of the whole text, but tokenizers do not report these, so each candidate is tested:

    encode(left + right) must begin with encode(left)

with `CONTEXT` characters on either side. A span is encoded together with the context to its left,
whose tokens are then dropped, because many tokenizers prepend a space to their input. The tokens
next to a split point must not change when the left context starts a few characters earlier. For
byte-pair encoding this implies a token boundary of the whole text: no merge crosses the split
point, and digits are not regrouped. A text without a split point is encoded at once.
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from tttjax.data.documents import MARGIN, TextSpan
from tttjax.data.tokenizers.base import Tokenizer
from tttjax.errors import UserError

SPAN_CHARS = 1 << 16
CONTEXT = 240  # characters on either side of a split point
# Extra characters of left context that must not change the tokens; digits are grouped by three.
_SHIFTS = (0, 1, 2)
_TAIL_TOKENS = 4  # tokens before a split point that must agree
_MAX_WORD_ENDS, _MAX_OFFSETS = 64, 128  # candidates tested
# Every known pre-tokenizer and word vocabulary has a token boundary at the end of a word.
_WORD_END = re.compile(r"(?<=\w)(?=\s)")


def encode_text(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """int32 [N] tokens of a text of any length, equal to `tokenizer.encode(text)`."""
    tokens = _encode_in_spans(tokenizer, text, 0, len(text)) if tokenizer.splittable else None
    return tokenizer.encode(text) if tokens is None else tokens


def encode_spans(tokenizer: Tokenizer, spans: Sequence[TextSpan]) -> list[tuple[np.ndarray, int]]:
    """`encode_span` of each; texts that need no split are encoded together, which is faster."""
    is_short = [s.is_first and s.is_last and len(s.text) <= 2 * SPAN_CHARS for s in spans]
    texts = [span.text for span, short in zip(spans, is_short, strict=True) if short]
    batch = iter(tokenizer.encode_batch(texts))
    return [
        (next(batch), len(span.text.encode("utf-8"))) if short else encode_span(tokenizer, span)
        for span, short in zip(spans, is_short, strict=True)
    ]


def encode_span(tokenizer: Tokenizer, span: TextSpan) -> tuple[np.ndarray, int]:
    """(int32 [N] tokens of a document's span, number of UTF-8 bytes that they encode).

    The tokens of all spans concatenated are those of the document: each end of a span moves to a
    nearby split point. Raises UserError if there is none.
    """
    if span.is_first and span.is_last:
        return encode_text(tokenizer, span.text), len(span.text.encode("utf-8"))
    if not tokenizer.splittable:
        raise _unsplittable_error(tokenizer, span.document)
    text = span.before + span.text + span.after
    start, stop = len(span.before), len(span.before) + len(span.text)
    start = 0 if span.is_first else _require_split_point(tokenizer, text, start, span.document)
    stop = len(text) if span.is_last else _require_split_point(tokenizer, text, stop, span.document)
    tokens = _encode_in_spans(tokenizer, text, start, stop)
    if tokens is None:
        tokens = _encode_range(tokenizer, text, start, stop)
    if tokens is None:
        raise _unsplittable_error(tokenizer, span.document)
    return tokens, len(text[start:stop].encode("utf-8"))


def _require_split_point(tokenizer: Tokenizer, text: str, target: int, document: str) -> int:
    split_point = _find_split_point(tokenizer, text, target)
    if split_point is None:
        raise _unsplittable_error(tokenizer, document)
    return split_point


def _unsplittable_error(tokenizer: Tokenizer, document: str) -> UserError:
    return UserError(
        f"{document} is too long to be encoded at once, and the {tokenizer.kind} tokenizer "
        f"({tokenizer.fingerprint()[:12]}) has no token boundary to split it at; split the "
        "document, or use --tokenizer=bytes."
    )


def _encode_in_spans(tokenizer: Tokenizer, text: str, start: int, stop: int) -> np.ndarray | None:
    """Tokens of text[start:stop], encoded in spans; None if there is no split point."""
    parts: list[np.ndarray] = []
    while start < stop or not parts:
        end: int | None = stop
        if stop - start > 2 * SPAN_CHARS:
            end = _find_split_point(tokenizer, text, start + SPAN_CHARS)
        part = None if end is None else _encode_range(tokenizer, text, start, end)
        if end is None or part is None:
            return None
        parts.append(part)
        start = end
    return np.concatenate(parts)


def _encode_range(tokenizer: Tokenizer, text: str, start: int, stop: int) -> np.ndarray | None:
    """Tokens of text[start:stop]; None if either end is not a token boundary."""
    before = text[max(0, start - CONTEXT) : start]
    prefix = tokenizer.encode(before) if before else np.zeros(0, np.int32)
    tokens = tokenizer.encode(before + text[start:stop])
    if not np.array_equal(tokens[: len(prefix)], prefix):
        return None
    if stop < len(text):
        at_end = tokenizer.encode(text[max(0, stop - CONTEXT) : stop])
        if not _same_tail(tokens, at_end):
            return None
    return tokens[len(prefix) :]


def _find_split_point(tokenizer: Tokenizer, text: str, target: int) -> int | None:
    """A split point within `MARGIN` characters of `target`, or None."""
    first = max(0, target - MARGIN)
    window = text[first : target + MARGIN]
    for index in _candidates(window, target - first):
        if _is_split_point(tokenizer, window, index):
            return first + index
    return None


def _candidates(window: str, target: int) -> Iterator[int]:
    """Indices with a full context on either side; ends of words first."""
    low, high = CONTEXT + max(_SHIFTS), len(window) - CONTEXT
    word_ends = [match.start() for match in _WORD_END.finditer(window)]
    likely = sorted((e for e in word_ends if low <= e <= high), key=lambda e: abs(e - target))
    yield from likely[:_MAX_WORD_ENDS]
    yield from (p for p in range(target, target - _MAX_OFFSETS, -1) if low <= p <= high)


def _is_split_point(tokenizer: Tokenizer, window: str, index: int) -> bool:
    right = window[index : index + CONTEXT]
    previous = np.zeros(0, np.int32), np.zeros(0, np.int32)
    for shift in _SHIFTS:
        left = window[index - CONTEXT - shift : index]
        alone = tokenizer.encode(left)
        both = tokenizer.encode(left + right)
        if not np.array_equal(both[: len(alone)], alone):
            return False
        current = alone, both[len(alone) :]
        if shift and not (
            _same_tail(previous[0], current[0]) and np.array_equal(previous[1], current[1])
        ):
            return False
        previous = current
    return True


def _same_tail(tokens: np.ndarray, other: np.ndarray) -> bool:
    """Whether both end with the same tokens; False if there is nothing to compare."""
    size = min(_TAIL_TOKENS, len(tokens), len(other))
    return size > 0 and np.array_equal(tokens[-size:], other[-size:])
