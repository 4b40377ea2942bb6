"""Tokenizers: one small protocol, four kinds.

    bytes          ids 0..255 are the UTF-8 bytes, then BOS and EOS
    sentencepiece  a SentencePiece model, trained by `tttjax prepare` or given
    huggingface    a `tokenizer.json` of the Hugging Face `tokenizers` library
    ids            no text at all: only sizes, for data that comes as tokens (Zarr)

A tokenizer is saved beside the data that it made (`save`, `load_tokenizer`), and its fingerprint,
a hash of its whole definition, is in the manifest, so that training and evaluation find the same
one again or refuse. A run keeps a copy in its work directory (`keep_tokenizer`).

Text comes out of tokens by one function, `bytes_after`: the bytes that a token adds. All tokens at
once (`decode_tokens`) and one at a time (`TextStream`) therefore give the same text.

Bits per byte need the number of UTF-8 bytes behind a target token: `token_bytes()`. It is exact
when `lossless` is true, that is, when decoding gives back every byte that was encoded, and they are
as many as `token_bytes` says.
"""

import codecs
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tttjax.errors import UserError
from tttjax.io.atomic import atomic_write
from tttjax.io.sealed import read_object

CONFIG_FILE = "tokenizer_config.json"
SPECIAL_IDS = ("bos_id", "eos_id")

# A token that is not known, but had text: what follows it does not begin a text.
UNKNOWN = -1

# Everything that tokenizers commonly alter: blanks at either end and in runs, line ends, tabs,
# compatibility forms, combining marks, characters outside any vocabulary, and the sign with which
# SentencePiece writes a blank; then texts that begin and end with no blank, and with one.
_PROBES = (
    "  two blanks,\ttab \r\n\n    \ufb01 \uff11 \xe9 e\u0301 ☃ 😀 \u2581 <s> <0x41> \x00 \n",
    "one",
    " two three ",
    "川 と\u3000山 ไทย นี้ हिन्दी 👩\u200d👧 \xa0\u200b\ufeff\u2028end",
)


class Tokenizer(Protocol):
    """What the rest of tttjax knows of a tokenizer.

    can_be_cut: whether what is a border of tokens in its surroundings is one in the whole text
    (`data.stretches`); not where one sum decides on all of a text.
    """

    kind: str
    can_be_cut: bool
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    eos_ids: tuple[int, ...]  # every token that ends a text: `eos_id`, then any others
    lossless: bool

    def encode(self, text: str | bytes) -> np.ndarray:
        """int32 [N] token ids of `text`, without BOS or EOS."""

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of `tokens`. BOS, EOS and padding give no text."""

    def bytes_after(self, token: int, previous: int | None) -> bytes | None:
        """The UTF-8 bytes that a token adds to a text; part of a character, it may be.

        previous: the last token before it that gave bytes (`UNKNOWN` if only that is known), or
        None where the text begins. None for a token that has no part in texts, as BOS has not.
        """

    def token_bytes(self) -> np.ndarray:
        """int32 [V] UTF-8 bytes that each token stands for; 0 for BOS, EOS and padding."""

    def fingerprint(self) -> str:
        """sha256 (hex) of the tokenizer's definition, special tokens included."""

    def _config(self) -> dict[str, Any]:
        """The settings that `save` writes."""

    def save(self, directory: str | os.PathLike) -> None:
        """Writes what `load_tokenizer` needs into `directory`."""


def hash_definition(config: dict[str, Any], model: bytes = b"") -> str:
    """sha256 of a tokenizer's settings and model file."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    digest.update(model)
    return digest.hexdigest()


def save_definition(directory: str | os.PathLike, config: dict[str, Any], model: bytes = b""):
    """Writes settings and model file; the settings last, since they make the folder loadable."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if model:
        _write(directory / config["file"], model)
    _write(directory / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


class TextStream:
    """Text of tokens as they come. The bytes of a character are held back until it is whole."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] | np.ndarray = ()):
        """before: tokens that the text goes on from; their own text is not given again."""
        self._tokenizer = tokenizer
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._previous: int | None = None
        for token in before:
            if token == UNKNOWN:
                self._previous = UNKNOWN
            else:
                self.add(int(token))

    def add(self, token: int) -> str:
        """The characters that are whole with this token; U+FFFD for bytes that never will be."""
        raw = self._tokenizer.bytes_after(token, self._previous)
        if raw is None:
            return ""
        self._previous = token
        return self._characters.decode(raw)

    def rest(self) -> str:
        """U+FFFD if the tokens ended within a character, else nothing."""
        return self._characters.decode(b"", final=True)


def decode_tokens(tokenizer: Tokenizer, tokens: Sequence[int] | np.ndarray) -> str:
    """The text of `tokens`; U+FFFD for bytes that are no character."""
    stream = TextStream(tokenizer)
    return "".join(map(stream.add, np.asarray(tokens, np.int64).tolist())) + stream.rest()


def is_lossless(tokenizer: Tokenizer) -> bool:
    """Whether texts of everything that tokenizers like to alter survive, and are counted right."""
    for text in _PROBES:
        tokens = tokenizer.encode(text).tolist()
        counts = [len(tokenizer.bytes_after(token, UNKNOWN) or b"") for token in tokens]
        if tokenizer.decode(tokens) != text or sum(counts) != len(text.encode("utf-8")):
            return False
    return True


def as_text(text: str | bytes) -> str:
    return text.decode("utf-8") if isinstance(text, bytes) else text


class ByteTokenizer:
    """UTF-8 bytes. Vocabulary 264: 256 bytes, BOS 256, EOS 257, and six ids that never occur.

    The padding makes the embedding divisible by 8, so that it can be sharded.
    """

    kind = "bytes"
    can_be_cut = True
    vocab_size = 264
    lossless = True
    bos_id: int | None = 256
    eos_id: int | None = 257
    eos_ids: tuple[int, ...] = (257,)

    def encode(self, text: str | bytes) -> np.ndarray:
        raw = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(raw, np.uint8).astype(np.int32)

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
    """Stands in for an unknown tokenizer: data that came as token ids. It has no text."""

    kind = "ids"
    can_be_cut = True
    lossless = False

    def __init__(self, vocab_size: int, bos_id: int | None, eos_id: int | None):
        self.vocab_size, self.bos_id, self.eos_id = vocab_size, bos_id, eos_id
        self.eos_ids: tuple[int, ...] = () if eos_id is None else (eos_id,)

    def encode(self, text: str | bytes) -> np.ndarray:
        raise UserError(
            "This data set holds token ids of an unknown tokenizer, so text cannot be encoded for "
            "it; prepare it again with --tokenizer=tokenizer.json."
        )

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
    """The tokenizer that `save` wrote into `directory`.

    Raises UserError if there is none, it is damaged or of an unknown kind.
    """
    from tttjax.data.tokenizers.huggingface import HuggingFaceTokenizer
    from tttjax.data.tokenizers.sentencepiece import SentencePieceTokenizer

    directory = Path(directory)
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
            found: Tokenizer = ByteTokenizer()
        elif kind == "ids":
            found = IdsTokenizer(*(_size(config, name) for name in ("vocab_size", *SPECIAL_IDS)))
        elif kind == "sentencepiece":
            found = SentencePieceTokenizer(directory / _file_name(config))
        elif kind == "huggingface":
            ids = {name: _size(config, name) for name in SPECIAL_IDS}
            several = config.get("eos_ids", ())
            found = HuggingFaceTokenizer(directory / _file_name(config), **ids, eos_ids=several)
        else:
            raise UserError(f"{path} names the unknown tokenizer kind {kind!r}.")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); run `tttjax prepare` again.") from error
    _check_definition(path, config, found)
    return found


def _size(config: dict[str, Any], name: str) -> Any:
    """A number of the settings; of special tokens also None. ValueError for anything else."""
    value = config[name]
    is_known = type(value) is int and 0 <= value < 2**31
    if not is_known and not (value is None and name in SPECIAL_IDS):
        raise ValueError(f"{name} is {value!r}")
    return value


def _file_name(config: dict[str, Any]) -> str:
    """The name of the model file. ValueError for one that lies elsewhere."""
    name = config["file"]
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"file is {name!r}")
    return name


def _check_definition(path: Path, config: dict[str, Any], found: Tokenizer) -> None:
    """UserError unless the settings are those that the tokenizer would write."""
    own = found._config()
    for name in sorted(own.keys() | config.keys()):
        if name not in own or name not in config or own[name] != config[name]:
            raise UserError(
                f"{path} is damaged: {name} is {config.get(name, 'missing')!r}, and the tokenizer "
                f"has {own.get(name, 'no such setting')!r}; run `tttjax prepare` again."
            )


def keep_tokenizer(source: str | os.PathLike, directory: str | os.PathLike) -> None:
    """Copies a saved tokenizer, all of its folder or nothing; one that is there already stays.

    Another one that is there, or a damaged one, gives way.
    """
    source, directory = Path(source), Path(directory)
    with contextlib.suppress(UserError):
        if load_tokenizer(directory).fingerprint() == load_tokenizer(source).fingerprint():
            return
    temporary = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for path in source.iterdir():  # not their permissions, which are those of the data
            shutil.copyfile(path, temporary / path.name)
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_model(path: str | os.PathLike, what: str) -> bytes:
    """Bytes of a model file; UserError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read the {what} {path}: {error.strerror}.") from error
