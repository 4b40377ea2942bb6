"""Text to hide a needle in: repeated noise, or sentences of a text that was given."""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from tttjax.data.documents import JSON, list_inputs, pieces_of, read_items
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
LONGEST_SENTENCE = 120  # characters; longer ones are cut between words, so that needles fit in
ENDS = re.compile(r"(?<=[.!?])\s+|\s*\n\s*")


@dataclass
class Haystack:
    """Sentences that follow each other, the first after the last.

    source: where they are from, in words. is_noise: whether they are the same few ones repeated.
    """

    source: str
    sentences: list[str]
    tokenizer: Tokenizer
    is_noise: bool = False
    _sizes: dict[int, int] = field(default_factory=dict)

    def _size(self, i: int) -> int:
        """Tokens of sentence i and the blank before it."""
        i %= len(self.sentences)
        if i not in self._sizes:
            self._sizes[i] = len(self.tokenizer.encode(" " + self.sentences[i]))
        return self._sizes[i]

    def after(self, first: int, tokens: int) -> list[str]:
        """From sentence `first` on, as many as come nearest to so many tokens."""
        stop, left = first, tokens
        while 2 * left >= self._size(stop):
            left -= self._size(stop)
            stop += 1
        return self._between(first, stop)

    def before(self, stop: int, tokens: int) -> list[str]:
        """Those before sentence `stop`, as few as have at least so many tokens."""
        first, left = stop, tokens
        while left > 0:
            first -= 1
            left -= self._size(first)
        return self._between(first, stop)

    def _between(self, first: int, stop: int) -> list[str]:
        return [self.sentences[i % len(self.sentences)] for i in range(first, stop)]

    def tokens(self) -> int:
        """Of all sentences once."""
        return sum(self._size(i) for i in range(len(self.sentences)))


def noise(tokenizer: Tokenizer) -> Haystack:
    """The same few sentences, again and again."""
    return Haystack("repeated noise", list(NOISE), tokenizer, is_noise=True)


def sentences(text: str) -> list[str]:
    """Cut at ends of sentences and lines, long ones also between words; white space is one blank.

    Sentences without any letter or digit are left out.
    """
    return [
        piece
        for sentence in ENDS.split(text)
        for piece in textwrap.wrap(sentence, LONGEST_SENTENCE)
        if any(character.isalnum() for character in piece)
    ]


def from_file(path: Path | str, tokenizer: Tokenizer, characters: int) -> Haystack:
    """The beginning of a file or folder, as `tttjax prepare` reads it, about so many characters.

    Raises UserError if it cannot be read or has no sentence.
    """
    text = ""
    files = [file for file in list_inputs([path]) if file.kind != JSON]  # settings, hardly text
    if not files:
        raise UserError(f"{path} is a JSON document, not text or JSON lines; name another.")
    items = chain.from_iterable(map(read_items, files))
    for piece in chain.from_iterable(map(pieces_of, items)):
        text += piece.text + "\n" * piece.ends
        if len(text) >= characters:
            break
    return _of_text(str(path), text[:characters], tokenizer)


def from_held_out(
    data: PreparedData, split: str, tokenizer: Tokenizer, characters: int, seed: int
) -> Haystack:
    """Documents of a split, in an order drawn with `seed`, about so many characters of them.

    Raises UserError if there are none, or no text in them.
    """
    if not data.tokenizer.token_bytes().any():
        raise UserError(f"{data.folder} holds token ids without text")
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
    found = sentences(text)
    if not found:
        raise UserError(f"there is no sentence in {source} to hide a needle among")
    return Haystack(source, found, tokenizer)
