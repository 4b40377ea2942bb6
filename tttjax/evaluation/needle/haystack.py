"""Haystacks of needle tests: repeated noise, or sentences of a given text."""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from tttjax.data.documents import item_spans, read_items
from tttjax.data.inputs import JSON, list_inputs
from tttjax.data.shards import PreparedData
from tttjax.data.tokenizers.base import Tokenizer
from tttjax.errors import UserError

NOISE = (
    "The wind is cold.",
    "The road is long.",
    "The river is wide.",
    "On we walk.",
    "Evening comes and we walk back.",
)
LONGEST_SENTENCE = 120  # characters; longer sentences are split between words
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\s*\n\s*")


@dataclass
class Haystack:
    """A cyclic sequence of sentences.

    source: description of their origin. is_noise: whether a few sentences are repeated.
    """

    source: str
    sentences: list[str]
    tokenizer: Tokenizer
    is_noise: bool = False
    _sizes: dict[int, int] = field(default_factory=dict)

    def _size(self, i: int) -> int:
        """Tokens of sentence i and the space before it."""
        i %= len(self.sentences)
        if i not in self._sizes:
            self._sizes[i] = len(self.tokenizer.encode(" " + self.sentences[i]))
        return self._sizes[i]

    def after(self, first: int, tokens: int) -> list[str]:
        """Sentences from `first` on, with a total as close as possible to `tokens`."""
        stop, remaining = first, tokens
        while 2 * remaining >= self._size(stop):
            remaining -= self._size(stop)
            stop += 1
        return self._between(first, stop)

    def before(self, stop: int, tokens: int) -> list[str]:
        """The fewest sentences before `stop` with at least `tokens` tokens."""
        first, remaining = stop, tokens
        while remaining > 0:
            first -= 1
            remaining -= self._size(first)
        return self._between(first, stop)

    def _between(self, first: int, stop: int) -> list[str]:
        return [self.sentences[i % len(self.sentences)] for i in range(first, stop)]

    def tokens(self) -> int:
        """Number of tokens of all sentences."""
        return sum(self._size(i) for i in range(len(self.sentences)))


def noise(tokenizer: Tokenizer) -> Haystack:
    """The same few sentences, repeated."""
    return Haystack("repeated noise", list(NOISE), tokenizer, is_noise=True)


def sentences(text: str) -> list[str]:
    """Splits at ends of sentences and lines, and long sentences between words.

    Collapses white space to one space. Drops sentences without a letter or digit.
    """
    return [
        span
        for sentence in SENTENCE_END.split(text)
        for span in textwrap.wrap(sentence, LONGEST_SENTENCE)
        if any(character.isalnum() for character in span)
    ]


def from_file(path: Path | str, tokenizer: Tokenizer, characters: int) -> Haystack:
    """The first `characters` characters of a file or folder, parsed like `tttjax prepare` does.

    Raises UserError if it cannot be read or has no sentence.
    """
    text = ""
    # Single JSON documents are usually settings, not text.
    files = [file for file in list_inputs([path]) if file.kind != JSON]
    if not files:
        raise UserError(f"{path} is a JSON document, not text or JSON lines; give another file.")
    items = chain.from_iterable(map(read_items, files))
    for span in chain.from_iterable(map(item_spans, items)):
        text += span.text + "\n" * span.is_last
        if len(text) >= characters:
            break
    return _of_text(str(path), text[:characters], tokenizer)


def from_held_out(
    data: PreparedData, split: str, tokenizer: Tokenizer, characters: int, seed: int
) -> Haystack:
    """About `characters` characters of a split's documents, in random order from `seed`.

    Raises UserError if there are none, or they hold no text.
    """
    if not data.tokenizer.token_bytes().any():
        raise UserError(f"{data.folder} holds token ids without text; use another haystack")
    text = ""
    for document in _documents(data, split, characters, seed):
        text += document + "\n"
        if len(text) >= characters:
            break
    return _of_text(f"the split {split} of {data.folder}", text, tokenizer)


def _documents(data: PreparedData, split: str, characters: int, seed: int) -> Iterator[str]:
    tokens = data.split(split)
    starts, stops = tokens.document_bounds()
    for i in np.random.default_rng(seed).permutation(len(starts)):
        stop = min(int(stops[i]), int(starts[i]) + characters)
        yield data.tokenizer.decode(tokens.read(int(starts[i]), stop))[:characters]


def _of_text(source: str, text: str, tokenizer: Tokenizer) -> Haystack:
    parts = sentences(text)
    if not parts:
        raise UserError(f"{source} has no sentence for a haystack; give another text")
    return Haystack(source, parts, tokenizer)
