"""A small tokenizer of every family of encoding and decoding."""

import functools
import io
import json
import tempfile
from pathlib import Path

import sentencepiece
import tokenizers as hf
from tokenizers import decoders, normalizers, pre_tokenizers

from tttjax.data.tokenizers.base import ByteTokenizer, Tokenizer
from tttjax.data.tokenizers.huggingface import HuggingFaceTokenizer
from tttjax.data.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece

SCRIPTS = {
    "Latin": "The cat's  naïve café,\n\n\tsat on 12345678 mats. ",
    "Cyrillic": "Мама мыла раму, пока кошка спала.\n",
    "CJK": "日本語で書いた文章。長い川について読んだ。",
    "Thai": "ภาษาไทยไม่มีช่องว่าง",
    "Devanagari": "नमस्ते दुनिया, यह हिन्दी है ",
    "emoji": "👩\u200d👩\u200d👧 😀👍🏽 e\u0301 🏳\ufe0f\u200d🌈",
}
_LLAMA_3 = (
    r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Excludes some scripts, so that each of their characters takes several tokens.
_TEXTS = [SCRIPTS[name] * 20 for name in ("Latin", "Cyrillic", "Devanagari")] + ["x" * 40, " " * 9]


def _huggingface(normalizer, pre_tokenizer, decoder, byte_fallback=False) -> Tokenizer:
    model = hf.models.BPE(byte_fallback=byte_fallback, unk_token="<unk>" if byte_fallback else None)
    tokenizer = hf.Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    trainer = hf.trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<s>", "</s>", "<unk>", *(_BYTES if byte_fallback else [])],
        initial_alphabet=[] if byte_fallback else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=16,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    definition = json.loads(tokenizer.to_str())
    added = definition["added_tokens"]
    definition["added_tokens"] = [token for token in added if token["content"] not in _BYTES]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(definition), encoding="utf-8")
        return HuggingFaceTokenizer(path)


def _split(pattern: str):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(hf.Regex(pattern), "isolated"), byte_level]
    )


def _llama_2() -> Tokenizer:
    return _huggingface(
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
        decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        ),
        byte_fallback=True,
    )


def _metaspace() -> Tokenizer:
    options = {"prepend_scheme": "first", "split": True}
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(**options)])
    return _huggingface(None, pre_tokenizers.Metaspace(**options), decoder, byte_fallback=True)


def _gemma() -> Tokenizer:
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    replace = normalizers.Replace(" ", "▁")
    return _huggingface(replace, None, decoders.Sequence(parts), byte_fallback=True)


def _gpt_2(add_prefix_space: bool) -> Tokenizer:
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    return _huggingface(None, pre_tokenizer, decoders.ByteLevel())


def _sentencepiece(model: bytes) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.model"
        path.write_bytes(model)
        return SentencePieceTokenizer(path)


def _unigram() -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXTS),
        model_writer=model,
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
    )
    return _sentencepiece(model.getvalue())


FAMILIES = {
    "bytes": ByteTokenizer,
    "trained here": lambda: _sentencepiece(train_sentencepiece(_TEXTS, 450)),
    "trained without blanks": lambda: _sentencepiece(
        train_sentencepiece([SCRIPTS["CJK"] * 20, SCRIPTS["Thai"] * 20], 310)
    ),
    "Llama 2 .model": lambda: SentencePieceTokenizer(
        Path(__file__).parents[1] / "data" / "tokenizers" / "llama2real.model"
    ),
    "unigram": _unigram,
    "Llama 2": _llama_2,
    "Metaspace": _metaspace,
    "Gemma": _gemma,
    "GPT-2": lambda: _gpt_2(False),
    "add_prefix_space": lambda: _gpt_2(True),
    "Llama 3": lambda: _huggingface(None, _split(_LLAMA_3), decoders.ByteLevel()),
}
LOSSLESS = ("bytes", "trained here", "trained without blanks", "GPT-2", "Llama 3")
PREFIXED = ("Llama 2 .model", "Llama 2", "Metaspace")  # a space is prepended and stripped


@functools.cache
def family(name: str) -> Tokenizer:
    """The tokenizer of that name, built once per test session."""
    return FAMILIES[name]()
