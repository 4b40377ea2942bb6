"""Incremental decoding equals decoding at once; byte counts are exact if `lossless`."""

import random

import numpy as np
import pytest
from helpers.families import FAMILIES, LOSSLESS, PREFIXED, SCRIPTS, family

from tttjax.data.tokenizers.base import UNKNOWN, TextStream, is_lossless

TEXT = "".join(SCRIPTS.values())


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


def streamed(tokenizer, tokens, before=()):
    stream = TextStream(tokenizer, before)
    return "".join([*map(stream.add, map(int, tokens)), stream.flush()])


def test_encoded_text_comes_back(name):
    tokenizer = family(name)
    for text in (TEXT, *SCRIPTS.values()):
        result = tokenizer.decode(tokenizer.encode(text))
        if name == "add_prefix_space":
            assert result == " " + text
        elif name != "unigram":  # which normalises
            assert result == text


def test_decoding_agrees_with_the_library(name):
    tokenizer = family(name)
    for text in (TEXT, "a", " a", "  a b ", *SCRIPTS.values()):
        tokens = tokenizer.encode(text).tolist()
        if tokenizer.kind == "sentencepiece":
            assert tokenizer.decode(tokens) == tokenizer._processor.decode(tokens)
        elif tokenizer.kind == "huggingface":
            assert tokenizer.decode(tokens) == tokenizer._tokenizer.decode(tokens)


def test_a_stream_continues_at_any_token(name):
    tokenizer = family(name)
    for text in SCRIPTS.values():
        tokens = tokenizer.encode(text).tolist()
        whole = tokenizer.decode(tokens)
        assert streamed(tokenizer, tokens) == whole
        for i in range(1, len(tokens)):
            head = TextStream(tokenizer)
            head_text = "".join(map(head.add, tokens[:i]))
            assert whole.startswith(head_text)
            # The complete characters before the split, then all others.
            assert head_text + streamed(tokenizer, tokens[i:], tokens[:i]) == whole
            assert streamed(tokenizer, tokens[i:], tokens[max(0, i - 8) : i]) in whole


def test_truncation_loses_only_the_incomplete_character(name):
    tokenizer = family(name)
    for text in SCRIPTS.values():
        tokens = tokenizer.encode(text).tolist()
        whole = tokenizer.decode(tokens)
        for limit in range(1, len(tokens)):
            result = tokenizer.decode(tokens[:limit])
            assert result == streamed(tokenizer, tokens[:limit])
            if whole.startswith(result):
                continue
            assert result.endswith("\ufffd")
            assert whole.startswith(result[:-1])


def test_random_tokens_stream_as_they_decode(name):
    tokenizer = family(name)
    rng = np.random.default_rng(0)
    tokens = rng.integers(tokenizer.vocab_size, size=400).tolist()
    assert streamed(tokenizer, tokens) == tokenizer.decode(tokens)


def test_the_space_after_a_prompt_stays(name):
    tokenizer = family(name)
    prompt, both = tokenizer.encode("The cat"), tokenizer.encode("The cat sat")
    np.testing.assert_array_equal(both[: len(prompt)], prompt)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for before in (prompt, [*bos, *prompt], [UNKNOWN]):
        assert streamed(tokenizer, both[len(prompt) :], before) == " sat"
    if name in PREFIXED:
        assert streamed(tokenizer, tokenizer.encode("sat"), bos) == "sat"


def test_lossless_means_that_bytes_are_exact(name):
    tokenizer = family(name)
    assert tokenizer.lossless == is_lossless(tokenizer) == (name in LOSSLESS)
    rng = random.Random(0)
    texts = [TEXT, "sat", " sat", "川 と", *("".join(rng.choices(TEXT, k=50)) for _ in range(20))]
    counts_V = tokenizer.token_bytes()
    for text in texts if tokenizer.lossless else ():
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert counts_V[tokens].sum() == len(text.encode())
