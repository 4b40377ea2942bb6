"""Hugging Face `tokenizer.json` tokenizers."""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from tttjax.data.tokenizers.base import (
    CONFIG_FILE,
    UNKNOWN,
    SpecialToken,
    as_text,
    decode_tokens,
    hash_definition,
    is_lossless,
    read_model,
    save_definition,
)
from tttjax.errors import UserError
from tttjax.io.atomic import atomic_write
from tttjax.io.paths import storage_path

_MODEL_FILE = "tokenizer.json"
TEMPLATE_FILE, TEMPLATE_KEY = "chat_template.jinja", "chat_template"
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a byte in vocabularies with byte fallback
# <|endoftext|> is for models with a single document separator.
_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>", "<|endoftext|>")
_EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|endoftext|>")


class HuggingFaceTokenizer:
    """A `tokenizer.json`. BOS and EOS are looked up by name unless given by id.

    eos_ids: all tokens that end a text, if there are several. The chat template is that of the
    files beside it, if any; it is no part of the fingerprint.
    """

    kind = "huggingface"

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        eos_ids: Sequence[int] = (),
    ):
        self._model = read_model(path, "tokenizer file")
        try:
            self._definition = json.loads(self._model)
            self._tokenizer = tokenizers.Tokenizer.from_str(self._model.decode("utf-8"))
        except Exception as error:  # `tokenizers` raises plain Exception for a bad definition
            raise UserError(f"{path} is not a Hugging Face tokenizer.json ({error}).") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # The name of a special token within a text is plain text.
        self._tokenizer.encode_special_tokens = True
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(ids.values()) + 1
        self.bos_id: int | None = self._special_id(path, "bos", bos_id, _BOS_NAMES)
        self.eos_id: int | None = self._special_id(path, "eos", eos_id, _EOS_NAMES)
        splits = _splits_words(self._definition.get("pre_tokenizer"))
        self.splittable = splits or self._definition["model"].get("type") != "Unigram"
        decoder = self._definition.get("decoder")
        self._byte_level = decoder is not None and _kinds(decoder) <= {"ByteLevel", "Fuse"}
        self._depends_on_previous = bool(_kinds(decoder) & {"BPEDecoder", "CTC"})
        self._decoder = (
            _without_byte_fallback(decoder) if "ByteFallback" in _kinds(decoder) else decoder
        )
        self._join = _make_join(self._decoder)
        self._added = {added["id"]: added for added in self._definition.get("added_tokens", [])}
        self._bytes_cache: dict[tuple[int, int | None], bytes] = {}
        first = () if self.eos_id is None else (self.eos_id,)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys((*first, *eos_ids)))
        for token in self.eos_ids:
            self._special_id(path, "eos", token, ())
        self.lossless = is_lossless(self)
        self.chat_template = _chat_template(storage_path(path).parent)

    def _special_id(
        self, path, role: str, requested: int | None, names: Sequence[str]
    ) -> int | None:
        if requested is not None:
            if not 0 <= requested < self.vocab_size:
                raise UserError(
                    f"the {role.upper()} id {requested} is outside the vocabulary of {path} (0 to "
                    f"{self.vocab_size - 1})."
                )
            return requested
        ids = [self._tokenizer.token_to_id(name) for name in names]
        ids = [token for token in ids if token is not None]
        if not ids and role == "bos":
            raise UserError(
                f"{path} has no known BOS token ({', '.join(names)}); give its id with --bos-id."
            )
        return ids[0] if ids else None

    def encode(self, text: str | bytes) -> np.ndarray:
        return self.encode_batch([as_text(text)])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        # The fast form computes no offsets, and exists for batches only.
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def special_tokens(self) -> list[SpecialToken]:
        tokens = {
            i: SpecialToken(added["content"], i, added["lstrip"], added["rstrip"])
            for i, added in self._added.items()
            if added["special"]
        }
        for i in (self.bos_id, *self.eos_ids):
            text = None if i is None or i in tokens else self._tokenizer.id_to_token(i)
            if i is not None and text:  # the id may be a gap in the vocabulary
                tokens[i] = SpecialToken(text, i)
        return sorted(tokens.values(), key=lambda token: -len(token.text))

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        return decode_tokens(self, tokens)

    def bytes_after(self, token: int, previous: int | None) -> bytes | None:
        if token == self.bos_id or token in self.eos_ids:
            return None
        if previous is not None and not self._depends_on_previous:
            previous = UNKNOWN
        key = token, previous
        if key not in self._bytes_cache:
            self._bytes_cache[key] = self._bytes_of(*key)
        return self._bytes_cache[key]

    def _bytes_of(self, token: int, previous: int | None) -> bytes:
        text = self._tokenizer.id_to_token(token)
        if text is None:  # a gap in the vocabulary
            return b""
        if self._byte_level:
            return _byte_level_bytes(text) if token not in self._added else text.encode("utf-8")
        if self._decoder is not self._definition.get("decoder") and _BYTE.fullmatch(text):
            return bytes((int(text[3:5], 16),))
        if previous is None:
            return self._join([text]).encode("utf-8")
        # After other text: the difference that the token makes.
        before = ["a"]
        if previous != UNKNOWN:
            before.append(self._tokenizer.id_to_token(previous) or "")
        return self._join([*before, text]).removeprefix(self._join(before)).encode("utf-8")

    def token_bytes(self) -> np.ndarray:
        counts = np.zeros(self.vocab_size, np.int32)
        for i in range(self.vocab_size):
            if not self._added.get(i, {}).get("special"):
                counts[i] = len(self.bytes_after(i, UNKNOWN) or b"")
        return counts

    def _config(self) -> dict[str, Any]:
        # Omitted for a single EOS, so that older fingerprints stay valid.
        several = {"eos_ids": list(self.eos_ids)} if len(self.eos_ids) > 1 else {}
        return {
            "kind": self.kind,
            "file": _MODEL_FILE,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            **several,
        }

    def fingerprint(self) -> str:
        return hash_definition(self._config(), self._model)

    def save(self, directory: str | os.PathLike) -> None:
        save_definition(directory, self._config(), self._model)
        if self.chat_template:
            with atomic_write(storage_path(directory) / TEMPLATE_FILE) as temporary:
                temporary.write_text(self.chat_template, encoding="utf-8", newline="")


def _chat_template(folder: Path) -> str:
    """The chat template in the folder of a `tokenizer.json`; "" if there is none.

    In a folder of transformers it may be a value of `tokenizer_config.json`: a template, or a list
    of named ones.
    """
    try:
        path, config = folder / TEMPLATE_FILE, folder / CONFIG_FILE
        if path.exists():
            return path.read_bytes().decode("utf-8")
        value = json.loads(config.read_bytes()).get(TEMPLATE_KEY) if config.exists() else None
        if isinstance(value, list):
            value = {named["name"]: named["template"] for named in value}.get("default")
        if not isinstance(value, str | None):
            raise TypeError(f"{TEMPLATE_KEY} is {value!r}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"The chat template in {folder} is damaged ({error}).") from error
    return value or ""


def _decoder_steps(decoder: Any) -> list[dict[str, Any]]:
    """The steps of a decoder's definition, flattened."""
    if not decoder:
        return []
    if decoder["type"] == "Sequence":
        return [part for step in decoder["decoders"] for part in _decoder_steps(step)]
    return [decoder]


def _kinds(decoder: Any) -> set[str]:
    return {part["type"] for part in _decoder_steps(decoder)}


def _splits_words(pre_tokenizer: Any) -> bool:
    """Whether the pre-tokenizer splits a text into words."""
    if not pre_tokenizer:
        return False
    if pre_tokenizer["type"] == "Sequence":
        return any(map(_splits_words, pre_tokenizer["pretokenizers"]))
    if pre_tokenizer["type"] == "Metaspace":
        return pre_tokenizer.get("split", True)
    return pre_tokenizer["type"] != "ByteLevel" or pre_tokenizer.get("use_regex", True)


def _without_byte_fallback(decoder: Any) -> dict[str, Any]:
    parts = [part for part in _decoder_steps(decoder) if part["type"] != "ByteFallback"]
    return {"type": "Sequence", "decoders": parts}


def _make_join(decoder: Any) -> Callable[[list[str]], str]:
    """The function that joins tokens to a text."""
    if not decoder:
        return " ".join
    model = {"type": "BPE", "vocab": {}, "merges": []}
    definition = {"version": "1.0", "added_tokens": [], "model": model, "decoder": decoder}
    return tokenizers.Tokenizer.from_str(json.dumps(definition)).decoder.decode


def _byte_level_bytes(token: str) -> bytes:
    """Bytes of a token of a byte-level vocabulary, which writes each byte as one character."""
    try:
        return bytes(map(_BYTE_OF.__getitem__, token))
    except KeyError:
        return token.encode("utf-8")


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte: printable Latin-1 maps to itself, U+0100 and on to the other bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unprintable = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(unprintable)}


_BYTE_OF = _byte_alphabet()
