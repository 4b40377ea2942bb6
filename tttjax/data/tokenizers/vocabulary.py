"""Choosing the tokenizer of a data set: by name, from a file, or trained on the text."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tttjax.data.documents import InputFile, pieces_of, read_items
from tttjax.data.splits import TRAIN, SplitRule
from tttjax.data.tokenizers.base import (
    CONFIG_FILE,
    ByteTokenizer,
    IdsTokenizer,
    Tokenizer,
    load_tokenizer,
)
from tttjax.data.tokenizers.huggingface import HuggingFaceTokenizer
from tttjax.data.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece
from tttjax.errors import UserError

TRAINING_SAMPLE_BYTES = 64 << 20


def make_tokenizer(
    settings: Any, files: Sequence[InputFile], rule: SplitRule, log: Callable[[str], None]
) -> Tokenizer:
    """The tokenizer that `settings.tokenizer` asks for (see `tttjax prepare --help`).

    settings: a PrepareSettings. A SentencePiece model is trained on documents of the training
    split only. Raises UserError if there is no such tokenizer, or for special tokens that it has
    not.
    """
    tokenizer = _make(settings, files, rule, log)
    for name in ("bos_id", "eos_id"):
        wanted, own = getattr(settings, name), getattr(tokenizer, name)
        flag = f"--{name.replace('_', '-')}={wanted}"
        if wanted is not None and wanted != own:
            raise UserError(
                f"{flag} is for a tokenizer that does not say: {settings.tokenizer} has {own}."
            )
        if wanted is not None and not 0 <= wanted < tokenizer.vocab_size:
            raise UserError(
                f"{flag} must be a token of the vocabulary, from 0 to {tokenizer.vocab_size - 1}."
            )
    return tokenizer


def _make(
    settings: Any, files: Sequence[InputFile], rule: SplitRule, log: Callable[[str], None]
) -> Tokenizer:
    name = settings.tokenizer
    path = Path(name)
    if name == "bytes":
        return ByteTokenizer()
    if name == "ids":
        return IdsTokenizer(settings.vocab_size, settings.bos_id, settings.eos_id)
    if name == "sentencepiece":
        return _trained(settings.vocab_size, files, rule, log)
    found = open_tokenizer(path, bos_id=settings.bos_id, eos_id=settings.eos_id)
    if found is None:
        raise UserError(
            f"Tokenizer {name!r} is unknown: choose bytes, sentencepiece (trained here), a "
            "SentencePiece .model file, a Hugging Face tokenizer.json, the folder of another "
            "prepared data set, or ids (Zarr tokens without a tokenizer)."
        )
    return found


def open_tokenizer(
    path: Path, *, bos_id: int | None = None, eos_id: int | None = None
) -> Tokenizer | None:
    """That of a file, or of a folder that a tokenizer, a data set or a run lies in; None if none.

    bos_id, eos_id: of a `tokenizer.json`, if it does not say.
    """
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, bos_id=bos_id, eos_id=eos_id)
    for folder in (path, path / "tokenizer"):
        if (folder / CONFIG_FILE).exists():
            return load_tokenizer(folder)
    return None


def _trained(vocab_size: int, files, rule: SplitRule, log: Callable[[str], None]) -> Tokenizer:
    if not files:
        raise UserError(
            "A Zarr folder has no text to train a tokenizer on; give its tokenizer.json, or "
            "--tokenizer=ids."
        )
    log(f"prepare: training a SentencePiece vocabulary of {vocab_size}")
    model = train_sentencepiece(_sample(files, rule), vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trained.model"
        path.write_bytes(model)
        return SentencePieceTokenizer(path)


def _sample(files: Sequence[InputFile], rule: SplitRule) -> Iterator[str]:
    """Text of training documents: all, or a random share that makes about 64 MiB."""
    total = sum(file.size * (4 if file.compressed else 1) for file in files)
    share = TRAINING_SAMPLE_BYTES / max(total, 1)
    taken = 0
    for file in files:
        for item in read_items(file):
            for piece in pieces_of(item):
                # The hash that chooses the split runs from 0 (held out) to 1.
                keep = len(files) < 2 or rule.position(f"sample:{piece.document}") < share
                if keep and rule(piece.document) == TRAIN:
                    yield piece.text
                    taken += len(piece.text)
                if taken > TRAINING_SAMPLE_BYTES:
                    return
