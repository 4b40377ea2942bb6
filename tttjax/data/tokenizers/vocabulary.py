"""Makes the tokenizer of a data set: by name, from a file, or trained on the text."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tttjax.data.documents import item_spans, read_items
from tttjax.data.inputs import InputFile
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
    split only. Raises UserError for an unknown tokenizer or special tokens that it does not have.
    """
    tokenizer = _make(settings, files, rule, log)
    for name in ("bos_id", "eos_id"):
        requested, own = getattr(settings, name), getattr(tokenizer, name)
        flag = f"--{name.replace('_', '-')}={requested}"
        if requested is not None and requested != own:
            raise UserError(
                f"{flag} does not match {settings.tokenizer}, which has {own}; drop the option."
            )
        if requested is not None and not 0 <= requested < tokenizer.vocab_size:
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
    tokenizer = open_tokenizer(path, bos_id=settings.bos_id, eos_id=settings.eos_id)
    if tokenizer is None:
        raise UserError(
            f"Tokenizer {name!r} is unknown: choose bytes, sentencepiece (trained here), a "
            "SentencePiece .model file, a Hugging Face tokenizer.json, the folder of another "
            "prepared data set, or ids (Zarr tokens without a tokenizer)."
        )
    return tokenizer


def open_tokenizer(
    path: Path, *, bos_id: int | None = None, eos_id: int | None = None
) -> Tokenizer | None:
    """Opens the tokenizer of a file or of the folder of a tokenizer, data set or run, if any.

    bos_id, eos_id: for a `tokenizer.json` that does not define them.
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
    """Text of training documents: all, or a random sample of about 64 MiB."""
    total = sum(file.text_bytes for file in files)
    share = TRAINING_SAMPLE_BYTES / max(total, 1)
    sampled = 0
    for file in files:
        for item in read_items(file):
            for span in item_spans(item):
                # Sampling uses a hash of its own, independent of the split.
                keep = len(files) < 2 or rule.position(f"sample:{span.document}") < share
                if keep and rule(span.document) == TRAIN:
                    yield span.text
                    sampled += len(span.text)
                if sampled > TRAINING_SAMPLE_BYTES:
                    return
