"""Hugging Face `tokenizer.json` files, read with the `tokenizers` library."""

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers

from tttjax.data.tokenizers import (
    as_text,
    hash_definition,
    is_lossless,
    read_model,
    save_definition,
)
from tttjax.errors import UserError

_MODEL_FILE = "tokenizer.json"
# The last of each list also serves models that mark only the border between documents.
_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>", "<|endoftext|>")
_EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|endoftext|>")


class HuggingFaceTokenizer:
    """A `tokenizer.json`. BOS and EOS are found among its special tokens unless given by id.

    eos_ids: every token that ends a text, where a model has several.
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
        # A special token's name written in the text is text, not the special token.
        self._tokenizer.encode_special_tokens = True
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(ids.values()) + 1
        self.bos_id: int | None = self._special(path, "bos", bos_id, _BOS_NAMES)
        self.eos_id: int | None = self._special(path, "eos", eos_id, _EOS_NAMES)
        first = () if self.eos_id is None else (self.eos_id,)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys((*first, *eos_ids)))
        for token in self.eos_ids:
            self._special(path, "eos", token, ())
        self.lossless = is_lossless(self)

    def _special(self, path, role: str, given: int | None, names: Sequence[str]) -> int | None:
        if given is not None:
            if not 0 <= given < self.vocab_size:
                raise UserError(
                    f"the {role.upper()} id {given} is outside the vocabulary of {path} (0 to "
                    f"{self.vocab_size - 1})."
                )
            return given
        found = [self._tokenizer.token_to_id(name) for name in names]
        found = [token for token in found if token is not None]
        if not found and role == "bos":
            raise UserError(
                f"{path} has no token that is known to begin a document ({', '.join(names)}); "
                "give its id with --bos-id."
            )
        return found[0] if found else None

    def encode(self, text: str | bytes) -> np.ndarray:
        encoding = self._tokenizer.encode(as_text(text), add_special_tokens=False)
        return np.array(encoding.ids, np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        drop = {self.bos_id, self.eos_id}
        ids = [int(token) for token in tokens if int(token) not in drop]
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        counts = np.zeros(self.vocab_size, np.int32)
        byte_level = _mentions(self._definition.get("decoder"), "ByteLevel")
        for token, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            if byte_level:
                counts[i] = len(token)  # byte-level vocabularies write each byte as one character
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                counts[i] = 1
            else:
                counts[i] = len(token.replace("\u2581", " ").encode())
        for added in self._definition.get("added_tokens", []):
            counts[added["id"]] = 0 if added["special"] else len(added["content"].encode())
        counts[[i for i in (self.bos_id, self.eos_id) if i is not None]] = 0
        return counts

    def _config(self) -> dict[str, Any]:
        # Without an entry for a single one: older fingerprints stay valid.
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


def _mentions(part: Any, kind: str) -> bool:
    """Whether `kind` is the type of this part of a definition, or of one nested in it."""
    if isinstance(part, dict):
        return part.get("type") == kind or any(_mentions(value, kind) for value in part.values())
    return isinstance(part, list) and any(_mentions(value, kind) for value in part)
