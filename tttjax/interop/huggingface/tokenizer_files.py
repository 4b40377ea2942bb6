"""A tokenizer as `tokenizer.json`, so that transformers gives the same tokens, token for token.

A Hugging Face tokenizer goes as it is. Bytes and SentencePiece are said in the terms of the
`tokenizers` library, and compared on texts that tell tokenizers apart before they are used.
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

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
ASIDE = "tttjax_tokenizer"  # where a tokenizer lies that transformers cannot load exactly
BLANK = "\u2581"
SAMPLE = """\
Reading is learning: what a page says changes how the next one is read. In 1905, a clerk in Bern
wrote four papers; the third was 30 pages long.

    def f(x):
\treturn {"sum": x + 1, 'list': [x, 2.5e-3]}  # blanks   in runs

Straße, naïve, e\u0301t\u00e9, Ωmega, Привет, 你好世界, \u2581, \ufb01ne, 😀!\r
"""


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> str:
    """Writes what transformers loads; else our own folder, and then the reason in a sentence."""
    if tokenizer.kind == "ids":
        return "there is no tokenizer to export: the data came as token ids"
    found: tokenizers.Tokenizer | None
    if tokenizer.kind == "huggingface":
        tokenizer.save(folder)  # its settings are replaced below
        found = tokenizers.Tokenizer.from_file(str(folder / FILE))
    else:
        found = _equivalent(tokenizer)
        if found is None:
            tokenizer.save(folder / ASIDE)
            return (
                "transformers has no tokenizer with exactly the same tokens as this SentencePiece "
                f"model: it lies in {ASIDE}/, for the sentencepiece library"
            )
        found.save(str(folder / FILE))
    (folder / SETTINGS).write_text(json.dumps(_settings(tokenizer, found), indent=2) + "\n")
    return ""


def special_tokens(tokenizer: Tokenizer) -> dict[str, int | list[int] | None]:
    """Ids under the names of `config.json`: a list of EOS where several end a text."""
    end = tokenizer.eos_id if tokenizer.eos_id is not None else tokenizer.bos_id
    several = list(tokenizer.eos_ids) if len(tokenizer.eos_ids) > 1 else None
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": several or tokenizer.eos_id,
        "pad_token_id": end,
    }


def _settings(tokenizer: Tokenizer, found: tokenizers.Tokenizer) -> dict[str, Any]:
    ids = special_tokens(tokenizer) | {"eos_token_id": tokenizer.eos_id}  # this file names one
    named = {
        name.removesuffix("_id"): found.id_to_token(i)
        for name, i in ids.items()
        if isinstance(i, int)
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: token for name, token in named.items() if token is not None},
        "clean_up_tokenization_spaces": False,
        # As here, the name of a special token in a text is text.
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
        if all(_same(tokenizer, candidate, text) for text in texts):
            return _with_bos(candidate, tokenizer.bos_id)
    return None


def _same(tokenizer: Tokenizer, other: tokenizers.Tokenizer, text: str) -> bool:
    ours = tokenizer.encode(text).tolist()
    ids = other.encode(text, add_special_tokens=False).ids
    return ids == ours and other.decode(ids) == tokenizer.decode(ours)


def _random_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """What random tokens say, so that most of the vocabulary is tried in odd company."""
    rng = np.random.default_rng(0)
    for _ in range(8):
        tokens = rng.integers(tokenizer.vocab_size, size=1000)
        yield tokenizer.decode(tokens).replace("\ufffd", "")


def _with_bos(found: tokenizers.Tokenizer, bos: int | None) -> tokenizers.Tokenizer:
    """Begins every text with BOS, as reading does here."""
    if bos is not None:
        name = found.id_to_token(bos)
        found.post_processor = processors.TemplateProcessing(
            single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, bos)]
        )
    return found


def _from_bytes() -> tokenizers.Tokenizer:
    """A byte-level vocabulary in the order of the bytes, without merges."""
    # The alphabet is sorted by the characters that stand for bytes; printable ones are themselves.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    found = tokenizers.Tokenizer(models.BPE({characters[b]: b for b in range(256)}, []))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens(["<s>", "</s>"])  # 256 and 257
    return found


def _from_sentencepiece(tokenizer: SentencePieceTokenizer) -> Iterator[tokenizers.Tokenizer]:
    """The pieces as BPE, with and without a blank put in front of a text.

    Pieces keep real blanks here, so that U+2581 in a text is no blank and falls to its bytes.
    (Unigram models: the two libraries choose differently among equally likely ways to cut a text.)
    """
    pieces = tokenizer.pieces()
    names = [piece.text.replace(BLANK, " ") for piece in pieces]
    vocab = {name: i for i, name in enumerate(names)}
    if len(vocab) < len(names):  # two pieces would become one
        return
    kinds = {name: piece.kind for name, piece in zip(names, pieces, strict=True)}
    special = [name for name, kind in kinds.items() if kind == "special"]
    scores = {name: pieces[i].score for name, i in vocab.items() if kinds[name] == "text"}
    merges = _merges(vocab, scores)
    unknown = "<unk>" if "<unk>" in special else None
    for prefix in (False, True):
        found = tokenizers.Tokenizer(
            models.BPE(vocab, merges, unk_token=unknown, byte_fallback=True, fuse_unk=True)
        )
        steps: list[Any] = [decoders.ByteFallback(), decoders.Fuse()]
        if prefix:
            found.normalizer = normalizers.Prepend(" ")
            steps.append(decoders.Strip(" ", 1, 0))
        found.decoder = decoders.Sequence(steps)
        added = [tokenizers.AddedToken(name, special=True, normalized=False) for name in special]
        found.add_special_tokens(added)
        yield found


def _merges(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs of pieces of text that make a third, the best of these first."""
    found = []
    for name, score in scores.items():
        for cut in range(1, len(name)):
            left, right = name[:cut], name[cut:]
            if left in scores and right in scores:
                found.append((-score, vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]
