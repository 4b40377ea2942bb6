"""Encoding a long text span by span gives the tokens of the whole text."""

import random

import numpy as np
import pytest
from helpers.families import FAMILIES, SCRIPTS, family

from tttjax.data import documents, text_spans
from tttjax.data.documents import TextSpan, file_spans
from tttjax.data.inputs import list_inputs
from tttjax.data.text_spans import encode_span, encode_spans, encode_text
from tttjax.errors import UserError

pytestmark = pytest.mark.slow

SIZE = 12_000
RANDOM = random.Random(0)
WORDS = [
    *SCRIPTS["Latin"].split(),
    *SCRIPTS["Devanagari"].split(),
    "cat",
    "don't",
    "日本語",
    "x" * 30,
]
ENDS = (" ", "  ", "\n", "\n\n", " \n", ".\n\n", ", ", "\r\n")
TEXTS = {
    "lines": "".join(RANDOM.choice(WORDS) + RANDOM.choice(ENDS) for _ in range(SIZE // 6)),
    "one line repeated": "the cat\n" * (SIZE // 8),
    "no newlines": " ".join(RANDOM.choice(WORDS) for _ in range(SIZE // 6)),
    "no spaces": "".join(RANDOM.choice(SCRIPTS["CJK"] + SCRIPTS["Thai"]) for _ in range(SIZE)),
    "letters": "".join(RANDOM.choice("acgt") for _ in range(SIZE)),
    "digits": "".join(RANDOM.choice("0123456789") for _ in range(SIZE)),
    "one letter": "x" * SIZE,
    "one space": " " * SIZE,
    "emoji": SCRIPTS["emoji"].replace(" ", "") * (SIZE // 18),
}


@pytest.fixture(params=FAMILIES)
def tokenizer(request):
    return family(request.param)


@pytest.fixture(autouse=True)
def short_spans(monkeypatch):
    monkeypatch.setattr(text_spans, "SPAN_CHARS", 2000)


def spans(text, folder):
    (folder / "a.txt").write_text(text, encoding="utf-8", newline="")
    (file,) = list_inputs([folder / "a.txt"])
    return list(file_spans(file))


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_spans_have_the_tokens_of_the_whole(tokenizer, text):
    np.testing.assert_array_equal(encode_text(tokenizer, text), tokenizer.encode(text))


def test_ordinary_text_is_encoded_in_spans(tokenizer, monkeypatch):
    longest = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: longest.append(len(text)) or encode(text))
    for name in ("lines", "no newlines", "one line repeated"):
        encode_text(tokenizer, TEXTS[name])
    assert (max(longest) < SIZE / 2) == tokenizer.splittable


@pytest.mark.parametrize("kind", ["lines", "no newlines", "no spaces", "letters"])
def test_file_spans_have_the_tokens_of_the_document(tokenizer, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_BLOCK", 1 << 12)
    text = TEXTS[kind] * 3
    document = spans(text, tmp_path)
    assert len(document) > 2
    if not tokenizer.splittable:
        with pytest.raises(UserError, match=r"a\.txt is too long .* sentencepiece tokenizer"):
            [encode_span(tokenizer, span) for span in document]
        return
    encoded = [encode_span(tokenizer, span) for span in document]
    tokens = np.concatenate([tokens for tokens, _ in encoded])
    np.testing.assert_array_equal(tokens, tokenizer.encode(text))
    assert sum(size for _, size in encoded) == len(text.encode())


def test_a_document_without_split_points_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_BLOCK", 1 << 12)
    first, *_ = spans(TEXTS["digits"] * 2, tmp_path)
    with pytest.raises(UserError, match=r"the huggingface tokenizer .* no token boundary"):
        encode_span(family("Llama 3"), first)


def test_without_split_points_text_is_encoded_at_once(monkeypatch):
    # Tokens are pairs of characters, so their boundaries depend on where the text starts.
    class Pairs:
        splittable = True

        def encode(self, text):
            return np.array([hash(text[i : i + 2]) for i in range(0, len(text), 2)])

    text = "".join(RANDOM.choice("ab") for _ in range(SIZE + 1))
    np.testing.assert_array_equal(encode_text(Pairs(), text), Pairs().encode(text))


def test_texts_are_encoded_together_as_one_by_one(tokenizer):
    texts = ["", "one", TEXTS["lines"], " two \n", TEXTS["digits"][:50]]
    together = [TextSpan("name", text) for text in texts]
    for text, (tokens, num_bytes) in zip(texts, encode_spans(tokenizer, together), strict=True):
        np.testing.assert_array_equal(tokens, tokenizer.encode(text))
        assert num_bytes == len(text.encode())
