"""Tokenizers: the protocol and its four kinds.

    bytes          ids 0..255 are the UTF-8 bytes, then BOS and EOS
    sentencepiece  a SentencePiece model, trained by `tttjax prepare` or loaded
    huggingface    a `tokenizer.json` of the Hugging Face `tokenizers` library
    ids            no text, only a vocabulary size, for data of token ids (Zarr)

A tokenizer is saved with the data that it encoded (`save`, `load_tokenizer`). The manifest holds
its fingerprint, a hash of its whole definition, so that training and evaluation use the same
tokenizer or refuse. A run has a copy in its work directory (`copy_tokenizer`).

Decoding goes through one function, `bytes_after`: the bytes that a token adds. Decoding at once
(`decode_tokens`) and token by token (`TextStream`) therefore give the same text.

Bits per byte need the UTF-8 bytes of each target token, `token_bytes()`. They are exact if
`lossless`, that is, if decoding restores every encoded byte and `token_bytes` counts them.
"""

import codecs
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from tttjax.errors import UserError
from tttjax.io.atomic import atomic_write
from tttjax.io.paths import is_bucket, storage_path
from tttjax.io.sealed import read_object

CONFIG_FILE = "tokenizer_config.json"
SPECIAL_IDS = ("bos_id", "eos_id")

# Stands for an unknown previous token that had text.
UNKNOWN = -1

# What tokenizers commonly alter: leading, trailing and repeated spaces, line endings, tabs,
# compatibility forms, combining marks, rare characters, and U+2581, which SentencePiece writes
# for a space; then texts with and without a space at either end.
_PROBES = (
    "  two blanks,\ttab \r\n\n    \ufb01 \uff11 \xe9 e\u0301 ☃ 😀 \u2581 <s> <0x41> \x00 \n",
    "one",
    " two three ",
    "川 と\u3000山 ไทย นี้ हिन्दी 👩\u200d👧 \xa0\u200b\ufeff\u2028end",
)


class SpecialToken(NamedTuple):
    """A token that stands for no text, by the name that chat templates have for it.

    lstrip, rstrip: whether it takes up the whitespace before and after it.
    """

    text: str
    id: int
    lstrip: bool = False
    rstrip: bool = False


class Tokenizer(Protocol):
    """The interface of a tokenizer.

    chat_template: its own (`data.chat`), or "".

    splittable: whether a token boundary within a local context is one of the whole text
    (`data.text_spans`); False for unigram models that score the whole text at once.
    """

    kind: str
    splittable: bool
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    eos_ids: tuple[int, ...]  # every token that ends a text: `eos_id`, then any others
    lossless: bool
    chat_template: str

    def encode(self, text: str | bytes) -> np.ndarray:
        """int32 [N] token ids of `text`, without BOS or EOS."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""

    def special_tokens(self) -> list[SpecialToken]:
        """The special tokens, longer names first; `encode` takes their names for plain text."""

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of `tokens`. BOS, EOS and padding give no text."""

    def bytes_after(self, token: int, previous: int | None) -> bytes | None:
        """The UTF-8 bytes that a token adds to a text; may be part of a character.

        previous: the last token before it that gave bytes (`UNKNOWN` if it is not known), or None
        at the beginning of the text. Returns None for special tokens such as BOS.
        """

    def token_bytes(self) -> np.ndarray:
        """int32 [V] UTF-8 bytes of each token; 0 for BOS, EOS and padding."""

    def fingerprint(self) -> str:
        """sha256 (hex) of the tokenizer's definition, including special tokens."""

    def _config(self) -> dict[str, Any]:
        """Settings that `save` writes."""

    def save(self, directory: str | os.PathLike) -> None:
        """Writes what `load_tokenizer` needs into `directory`."""


def hash_definition(config: dict[str, Any], model: bytes = b"") -> str:
    """sha256 of a tokenizer's settings and model file."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    digest.update(model)
    return digest.hexdigest()


def save_definition(directory: str | os.PathLike, config: dict[str, Any], model: bytes = b""):
    """Writes the model file, then the settings, which make the folder loadable."""
    directory = storage_path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if model:
        _write(directory / config["file"], model)
    _write(directory / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


class TextStream:
    """Decodes tokens incrementally; buffers bytes until a character is complete."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] | np.ndarray = ()):
        """before: preceding tokens; their text is not returned."""
        self._tokenizer = tokenizer
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._previous: int | None = None
        for token in before:
            if token == UNKNOWN:
                self._previous = UNKNOWN
            else:
                self.add(int(token))

    def add(self, token: int) -> str:
        """The characters that this token completes; U+FFFD for invalid bytes."""
        raw = self._tokenizer.bytes_after(token, self._previous)
        if raw is None:
            return ""
        self._previous = token
        return self._characters.decode(raw)

    def flush(self) -> str:
        """U+FFFD if the tokens end within a character, else ""."""
        return self._characters.decode(b"", final=True)


def decode_tokens(tokenizer: Tokenizer, tokens: Sequence[int] | np.ndarray) -> str:
    """The text of `tokens`; U+FFFD for invalid bytes."""
    stream = TextStream(tokenizer)
    return "".join(map(stream.add, np.asarray(tokens, np.int64).tolist())) + stream.flush()


def is_lossless(tokenizer: Tokenizer) -> bool:
    """Whether the probe texts survive encoding and decoding, with correct byte counts."""
    for text in _PROBES:
        tokens = tokenizer.encode(text).tolist()
        counts = [len(tokenizer.bytes_after(token, UNKNOWN) or b"") for token in tokens]
        if tokenizer.decode(tokens) != text or sum(counts) != len(text.encode("utf-8")):
            return False
    return True


def as_text(text: str | bytes) -> str:
    return text.decode("utf-8") if isinstance(text, bytes) else text


class ByteTokenizer:
    """UTF-8 bytes. Vocabulary 264: 256 bytes, BOS 256, EOS 257, and six unused ids.

    The padding makes the embedding divisible by 8, so that it can be sharded.
    """

    kind = "bytes"
    splittable = True
    vocab_size = 264
    lossless = True
    chat_template = ""
    bos_id: int | None = 256
    eos_id: int | None = 257
    eos_ids: tuple[int, ...] = (257,)

    def special_tokens(self) -> list[SpecialToken]:
        return [SpecialToken("</s>", 257), SpecialToken("<s>", 256)]

    def encode(self, text: str | bytes) -> np.ndarray:
        raw = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(raw, np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(tokens)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def bytes_after(self, token: int, previous: int | None) -> bytes | None:
        return bytes((token,)) if token < 256 else None

    def token_bytes(self) -> np.ndarray:
        return (np.arange(self.vocab_size) < 256).astype(np.int32)

    def _config(self) -> dict[str, Any]:
        return {"kind": self.kind, "vocab_size": self.vocab_size}

    def fingerprint(self) -> str:
        return hash_definition(self._config())

    def save(self, directory: str | os.PathLike) -> None:
        save_definition(directory, self._config())


class IdsTokenizer:
    """Placeholder for an unknown tokenizer of data given as token ids. It cannot encode text."""

    kind = "ids"
    splittable = True
    lossless = False
    chat_template = ""

    def __init__(self, vocab_size: int, bos_id: int | None, eos_id: int | None):
        self.vocab_size, self.bos_id, self.eos_id = vocab_size, bos_id, eos_id
        self.eos_ids: tuple[int, ...] = () if eos_id is None else (eos_id,)

    def encode(self, text: str | bytes) -> np.ndarray:
        raise UserError(
            "This data set holds token ids of an unknown tokenizer, so it cannot encode text; "
            "prepare it again with --tokenizer=tokenizer.json."
        )

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def special_tokens(self) -> list[SpecialToken]:
        return []

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        return decode_tokens(self, tokens)

    def bytes_after(self, token: int, previous: int | None) -> bytes | None:
        return (str(token) if previous is None else f" {token}").encode()

    def token_bytes(self) -> np.ndarray:
        return np.zeros(self.vocab_size, np.int32)

    def _config(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
        }

    def fingerprint(self) -> str:
        return hash_definition(self._config())

    def save(self, directory: str | os.PathLike) -> None:
        save_definition(directory, self._config())


def load_tokenizer(directory: str | os.PathLike) -> Tokenizer:
    """Loads the tokenizer that `save` wrote into `directory`.

    Raises UserError if there is none, it is damaged or of an unknown kind.
    """
    from tttjax.data.tokenizers.huggingface import HuggingFaceTokenizer
    from tttjax.data.tokenizers.sentencepiece import SentencePieceTokenizer

    directory = storage_path(directory)
    path = directory / CONFIG_FILE
    try:
        config = read_object(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{directory} has no readable tokenizer ({CONFIG_FILE}: {error}); run `tttjax prepare` "
            "again."
        ) from error
    kind = config.get("kind")
    try:
        if kind == "bytes":
            tokenizer: Tokenizer = ByteTokenizer()
        elif kind == "ids":
            tokenizer = IdsTokenizer(
                *(_size(config, name) for name in ("vocab_size", *SPECIAL_IDS))
            )
        elif kind == "sentencepiece":
            tokenizer = SentencePieceTokenizer(directory / _file_name(config))
        elif kind == "huggingface":
            ids = {name: _size(config, name) for name in SPECIAL_IDS}
            eos_ids = config.get("eos_ids", ())
            tokenizer = HuggingFaceTokenizer(directory / _file_name(config), **ids, eos_ids=eos_ids)
        else:
            raise UserError(f"{path} names the unknown tokenizer kind {kind!r}.")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); run `tttjax prepare` again.") from error
    _check_definition(path, config, tokenizer)
    return tokenizer


def _size(config: dict[str, Any], name: str) -> Any:
    """An integer setting; special tokens may be None. ValueError for anything else."""
    value = config[name]
    is_known = type(value) is int and 0 <= value < 2**31
    if not is_known and not (value is None and name in SPECIAL_IDS):
        raise ValueError(f"{name} is {value!r}")
    return value


def _file_name(config: dict[str, Any]) -> str:
    """The name of the model file. ValueError if it is not within the folder."""
    name = config["file"]
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"file is {name!r}")
    return name


def _check_definition(path: Path, config: dict[str, Any], tokenizer: Tokenizer) -> None:
    """UserError if the settings differ from those that the tokenizer would write."""
    own = tokenizer._config()
    for name in sorted(own.keys() | config.keys()):
        if name not in own or name not in config or own[name] != config[name]:
            raise UserError(
                f"{path} is damaged: {name} is {config.get(name, 'missing')!r}, and the tokenizer "
                f"has {own.get(name, 'no such setting')!r}; run `tttjax prepare` again."
            )


def copy_tokenizer(source: str | os.PathLike, directory: str | os.PathLike) -> None:
    """Copies the folder of a saved tokenizer, unless the same one is there; on disks atomically.

    Replaces a different or damaged tokenizer.
    """
    source, directory = storage_path(source), storage_path(directory)
    with contextlib.suppress(UserError):
        if load_tokenizer(directory).fingerprint() == load_tokenizer(source).fingerprint():
            return
    if is_bucket(directory):  # the definition last, which tells whether the others belong to it
        for path in sorted(source.iterdir(), key=lambda path: path.name == CONFIG_FILE):
            (directory / path.name).write_bytes(path.read_bytes())
        return
    temporary = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for path in source.iterdir():  # without permissions, which are those of the data set
            (temporary / path.name).write_bytes(path.read_bytes())
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_model(path: str | os.PathLike, what: str) -> bytes:
    """Bytes of a model file; UserError if it cannot be read."""
    try:
        return storage_path(path).read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read the {what} {path}: {error.strerror}.") from error
