"""Export of a tokenizer as `tokenizer.json`, with exactly the same tokens in transformers.

Hugging Face tokenizers are copied. Byte and SentencePiece tokenizers are converted to the
`tokenizers` library; the result is used only if it gives the same tokens on test texts.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from tttjax.data.tokenizers.base import Tokenizer
from tttjax.data.tokenizers.sentencepiece import SentencePieceTokenizer

TOKENIZER_FILE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
NATIVE_DIR = "tttjax_tokenizer"  # of a tokenizer without an exact equivalent in transformers
BLANK = "\u2581"
SAMPLE = """\
Reading is learning: what a page says changes how the next one is read. In 1905, a clerk in Bern
wrote four papers; the third was 30 pages long.

    def f(x):
\treturn {"sum": x + 1, 'list': [x, 2.5e-3]}  # blanks   in runs

Straße, naïve, e\u0301t\u00e9, Ωmega, Привет, 你好世界, \u2581, \ufb01ne, 😀!\r
"""


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> str:
    """Writes `tokenizer.json`, else the native tokenizer; returns why, or "" for the former."""
    if tokenizer.kind == "ids":
        return "there is no tokenizer to export: the data has token ids only"
    result: tokenizers.Tokenizer | None
    if tokenizer.kind == "huggingface":
        tokenizer.save(folder)  # its settings are replaced below
        result = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    else:
        result = _equivalent(tokenizer)
        if result is None:
            tokenizer.save(folder / NATIVE_DIR)
            return (
                "transformers has no tokenizer with exactly the same tokens as this SentencePiece "
                f"model; it is in {NATIVE_DIR}/, for the sentencepiece library"
            )
        result.save(str(folder / TOKENIZER_FILE))
    (folder / TOKENIZER_CONFIG).write_text(
        json.dumps(_settings(tokenizer, result), indent=2) + "\n"
    )
    return ""


def special_tokens(tokenizer: Tokenizer) -> dict[str, int | list[int] | None]:
    """Token ids under the names of `config.json`; EOS is a list if there are several."""
    end = tokenizer.eos_id if tokenizer.eos_id is not None else tokenizer.bos_id
    eos_ids = list(tokenizer.eos_ids) if len(tokenizer.eos_ids) > 1 else None
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": eos_ids or tokenizer.eos_id,
        "pad_token_id": end,
    }


def _settings(tokenizer: Tokenizer, exported: tokenizers.Tokenizer) -> dict[str, Any]:
    # tokenizer_config.json takes a single EOS.
    ids = special_tokens(tokenizer) | {"eos_token_id": tokenizer.eos_id}
    tokens = {
        name.removesuffix("_id"): exported.id_to_token(i)
        for name, i in ids.items()
        if isinstance(i, int)
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: token for name, token in tokens.items() if token is not None},
        "clean_up_tokenization_spaces": False,
        # The name of a special token in a text is plain text, as in tttjax.
        **({} if tokenizer.kind == "huggingface" else {"split_special_tokens": True}),
    }


def _equivalent(tokenizer: Tokenizer) -> tokenizers.Tokenizer | None:
    if isinstance(tokenizer, SentencePieceTokenizer):
        candidates: Iterable[tokenizers.Tokenizer] = _from_sentencepiece(tokenizer)
    else:
        candidates = [_from_bytes()]
    texts = [SAMPLE, *_random_texts(tokenizer)]
    for candidate in candidates:
        candidate.encode_special_tokens = True
        if all(_is_equivalent(tokenizer, candidate, text) for text in texts):
            return _with_bos(candidate, tokenizer.bos_id)
    return None


def _is_equivalent(tokenizer: Tokenizer, other: tokenizers.Tokenizer, text: str) -> bool:
    ours = tokenizer.encode(text).tolist()
    ids = other.encode(text, add_special_tokens=False).ids
    return ids == ours and other.decode(ids) == tokenizer.decode(ours)


def _random_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Texts of random tokens, which cover most of the vocabulary in unusual contexts."""
    rng = np.random.default_rng(0)
    for _ in range(8):
        tokens = rng.integers(tokenizer.vocab_size, size=1000)
        yield tokenizer.decode(tokens).replace("\ufffd", "")


def _with_bos(result: tokenizers.Tokenizer, bos: int | None) -> tokenizers.Tokenizer:
    """Prepends BOS to every text, as tttjax does."""
    if bos is not None:
        name = result.id_to_token(bos)
        result.post_processor = processors.TemplateProcessing(
            single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, bos)]
        )
    return result


def _from_bytes() -> tokenizers.Tokenizer:
    """A byte-level vocabulary in the order of the bytes, without merges."""
    # GPT-2's byte alphabet: printable bytes are themselves, the others are characters from 256.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + i) for i, byte in enumerate(unprintable)}
    result = tokenizers.Tokenizer(models.BPE({characters[b]: b for b in range(256)}, []))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens(["<s>", "</s>"])  # 256 and 257
    return result


def _from_sentencepiece(tokenizer: SentencePieceTokenizer) -> Iterator[tokenizers.Tokenizer]:
    """The SentencePiece model as BPE, with and without a blank prepended to the text.

    Pieces have real blanks, so that U+2581 in a text is not a blank and is encoded as bytes.
    (Unigram models differ: the two libraries break ties between segmentations differently.)
    """
    pieces = tokenizer.pieces()
    names = [piece.text.replace(BLANK, " ") for piece in pieces]
    vocab = {name: i for i, name in enumerate(names)}
    if len(vocab) < len(names):  # two pieces have the same text
        return
    kinds = {name: piece.kind for name, piece in zip(names, pieces, strict=True)}
    special = [name for name, kind in kinds.items() if kind == "special"]
    scores = {name: pieces[i].score for name, i in vocab.items() if kinds[name] == "text"}
    merges = _merges(vocab, scores)
    unknown = "<unk>" if "<unk>" in special else None
    for prefix in (False, True):
        result = tokenizers.Tokenizer(
            models.BPE(vocab, merges, unk_token=unknown, byte_fallback=True, fuse_unk=True)
        )
        steps: list[Any] = [decoders.ByteFallback(), decoders.Fuse()]
        if prefix:
            result.normalizer = normalizers.Prepend(" ")
            steps.append(decoders.Strip(" ", 1, 0))
        result.decoder = decoders.Sequence(steps)
        added = [tokenizers.AddedToken(name, special=True, normalized=False) for name in special]
        result.add_special_tokens(added)
        yield result


def _merges(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs of pieces that concatenate to a third, by descending score of the third."""
    result = []
    for name, score in scores.items():
        for split in range(1, len(name)):
            left, right = name[:split], name[split:]
            if left in scores and right in scores:
                result.append((-score, vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(result)]
