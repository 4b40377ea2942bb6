"""Tokens one at a time give the text that all at once give; counts of bytes are exact or denied."""

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
    return "".join([*map(stream.add, map(int, tokens)), stream.rest()])


def test_encoded_text_comes_back(name):
    tokenizer = family(name)
    for text in (TEXT, *SCRIPTS.values()):
        found = tokenizer.decode(tokenizer.encode(text))
        if name == "add_prefix_space":
            assert found == " " + text
        elif name != "unigram":  # which normalises
            assert found == text


def test_decoding_agrees_with_the_library(name):
    tokenizer = family(name)
    for text in (TEXT, "a", " a", "  a b ", *SCRIPTS.values()):
        tokens = tokenizer.encode(text).tolist()
        if tokenizer.kind == "sentencepiece":
            assert tokenizer.decode(tokens) == tokenizer._processor.decode(tokens)
        elif tokenizer.kind == "huggingface":
            assert tokenizer.decode(tokens) == tokenizer._tokenizer.decode(tokens)


def test_a_stream_goes_on_from_any_place(name):
    tokenizer = family(name)
    for text in SCRIPTS.values():
        tokens = tokenizer.encode(text).tolist()
        whole = tokenizer.decode(tokens)
        assert streamed(tokenizer, tokens) == whole
        for at in range(1, len(tokens)):
            head = TextStream(tokenizer)
            shown = "".join(map(head.add, tokens[:at]))
            assert whole.startswith(shown)
            # The characters that are whole before the place, then all others: nothing else.
            assert shown + streamed(tokenizer, tokens[at:], tokens[:at]) == whole
            assert streamed(tokenizer, tokens[at:], tokens[max(0, at - 8) : at]) in whole


def test_a_limit_costs_the_incomplete_character_alone(name):
    tokenizer = family(name)
    for text in SCRIPTS.values():
        tokens = tokenizer.encode(text).tolist()
        whole = tokenizer.decode(tokens)
        for limit in range(1, len(tokens)):
            found = tokenizer.decode(tokens[:limit])
            assert found == streamed(tokenizer, tokens[:limit])
            if whole.startswith(found):
                continue
            assert found.endswith("\ufffd")
            assert whole.startswith(found[:-1])


def test_random_tokens_stream_as_they_decode(name):
    tokenizer = family(name)
    rng = np.random.default_rng(0)
    tokens = rng.integers(tokenizer.vocab_size, size=400).tolist()
    assert streamed(tokenizer, tokens) == tokenizer.decode(tokens)


def test_a_blank_after_a_prompt_is_kept(name):
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
