"""SentencePiece tokenizers: loaded, or trained to be lossless."""

import io
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import sentencepiece

from tttjax.data.tokenizers.base import (
    SpecialToken,
    as_text,
    decode_tokens,
    hash_definition,
    is_lossless,
    read_model,
    save_definition,
)
from tttjax.errors import UserError

_SPACE = "\u2581"  # how SentencePiece writes a space within its pieces
_MODEL_FILE = "sentencepiece.model"


class VocabPiece(NamedTuple):
    """An entry of a vocabulary. kind: "text", "byte", or "special" (not text)."""

    text: str
    score: float
    kind: str


class SentencePieceTokenizer:
    """A SentencePiece model from a `.model` file.

    SentencePiece writes a space as U+2581, so a U+2581 in the text would decode to a space. If the
    model has byte pieces and adds no prefix space, that character is encoded as its three bytes.
    """

    kind = "sentencepiece"
    chat_template = ""

    def __init__(self, path: str | os.PathLike):
        self._model = read_model(path, "SentencePiece model")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except RuntimeError as error:
            raise UserError(f"{path} is not a SentencePiece model ({error}).") from error
        pieces = self._processor
        self.vocab_size: int = pieces.vocab_size()
        self.bos_id: int | None = pieces.bos_id() if pieces.bos_id() >= 0 else None
        self.eos_id: int | None = pieces.eos_id() if pieces.eos_id() >= 0 else None
        # Scores are ranks in byte-pair encoding, and summed logarithms in unigram models.
        scores = map(pieces.get_score, range(self.vocab_size))
        self.splittable = all(score.is_integer() for score in scores)
        self.eos_ids: tuple[int, ...] = () if self.eos_id is None else (self.eos_id,)
        byte_ids = [pieces.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._bytes_V = [self._bytes_of(i) for i in range(self.vocab_size)]
        self._adds_prefix_space = self._strips_prefix_space()
        exact = all(pieces.is_byte(i) for i in byte_ids) and not self._adds_prefix_space
        self._space_symbol_ids = byte_ids if exact else None
        self.lossless = is_lossless(self)

    def encode(self, text: str | bytes) -> np.ndarray:
        text = as_text(text)
        if _SPACE not in text or self._space_symbol_ids is None:
            return np.array(self._processor.encode(text), np.int32)
        ids: list[int] = []
        for i, part in enumerate(text.split(_SPACE)):
            ids += (self._space_symbol_ids if i else []) + self._processor.encode(part)
        return np.array(ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        return decode_tokens(self, tokens)

    def bytes_after(self, token: int, previous: int | None) -> bytes | None:
        raw = self._bytes_V[token]
        if previous is None and self._adds_prefix_space and raw is not None:
            # The model prepends a space, which is not part of the text.
            return raw if self._processor.is_byte(token) else raw.removeprefix(b" ")
        return raw

    def _bytes_of(self, token: int) -> bytes | None:
        pieces = self._processor
        if pieces.is_control(token):
            return None
        if pieces.is_byte(token):
            return bytes((int(pieces.id_to_piece(token)[3:5], 16),))
        if pieces.is_unknown(token):
            return pieces.decode([token]).encode("utf-8")
        return pieces.id_to_piece(token).replace(_SPACE, " ").encode("utf-8")

    def _strips_prefix_space(self) -> bool:
        """Whether the model strips a leading space when it decodes, having added one."""
        for token, raw in enumerate(self._bytes_V):
            is_text = not (self._processor.is_unknown(token) or self._processor.is_byte(token))
            if is_text and raw and raw.startswith(b" "):
                return not self._processor.decode([token]).startswith(" ")
        return False

    def special_tokens(self) -> list[SpecialToken]:
        pieces = self._processor
        ids = [i for i in range(self.vocab_size) if pieces.is_control(i)]
        tokens = [SpecialToken(pieces.id_to_piece(i), i) for i in ids]
        return sorted(tokens, key=lambda token: -len(token.text))

    def pieces(self) -> list[VocabPiece]:
        """The vocabulary in order of ids."""
        pieces = self._processor

        def kind(i: int) -> str:
            if pieces.is_byte(i):
                return "byte"
            special = pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_unused(i)
            return "special" if special else "text"

        ids = range(self.vocab_size)
        return [VocabPiece(pieces.id_to_piece(i), pieces.get_score(i), kind(i)) for i in ids]

    def token_bytes(self) -> np.ndarray:
        pieces = self._processor
        counts = np.zeros(self.vocab_size, np.int32)
        for i, raw in enumerate(self._bytes_V):
            if not (pieces.is_unknown(i) or pieces.is_unused(i)):
                counts[i] = len(raw or b"")
        return counts

    def _config(self) -> dict[str, Any]:
        return {"kind": self.kind, "file": _MODEL_FILE}

    def fingerprint(self) -> str:
        return hash_definition(self._config(), self._model)

    def save(self, directory: str | os.PathLike) -> None:
        save_definition(directory, self._config(), self._model)


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, *, num_threads: int = 1, model_type: str = "bpe"
) -> bytes:
    """A new SentencePiece model of `vocab_size` pieces, as the bytes of its `.model` file.

    The model is lossless: identity normalisation, no dummy prefix, pieces of repeated spaces (so
    that indentation costs few tokens), and byte pieces for rare characters.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            num_threads=num_threads,
            character_coverage=0.9999,
            required_chars=_SPACE,  # a space has a piece even if the text has none
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=1 << 20,
            minloglevel=2,
        )
    except (RuntimeError, StopIteration) as error:
        raise UserError(
            f"Cannot train a SentencePiece vocabulary of {vocab_size} on this text: "
            f"{_advice(str(error))}, or --tokenizer=bytes, which needs no training."
        ) from error
    return model.getvalue()


def _advice(error: str) -> str:
    """A readable form of the trainer's error."""
    if too_many := re.search(r"value <= (\d+)", error):
        return f"it has enough for {too_many[1]} pieces; use a smaller --vocab-size, more text"
    if too_few := re.search(r"required_chars\. \d+ vs (\d+)", error):
        return f"its characters alone need {too_few[1]} pieces; use a larger --vocab-size"
    reason = "it is empty" if "sentences_.empty" in error or not error else error
    return f"{reason}; use another --vocab-size, more text"


def _sentences(texts: Iterable[str], characters: int = 2000) -> Iterable[str]:
    """Splits the texts: the trainer's memory grows with the longest sentence."""
    for text in texts:
        for start in range(0, len(text), characters):
            sentence = text[start : start + characters].replace("\x00", " ")
            if sentence.strip():
                yield sentence
