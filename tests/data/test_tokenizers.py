"""Tokenizers restore every byte, count bytes exactly, and survive saving and loading."""

import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf

from tttjax.data.text_spans import encode_text
from tttjax.data.tokenizers.base import ByteTokenizer, IdsTokenizer, load_tokenizer
from tttjax.data.tokenizers.huggingface import HuggingFaceTokenizer
from tttjax.data.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece
from tttjax.errors import UserError

AWKWARD = [
    "",
    " ",
    "\n\n\n",
    "  leading and   inner blanks\t\ttabs \r\n windows",
    "e\u0301 \ufb01 \uff11 \u2581 \u2585 \u2047 ☃ 😀 漢字",
    "<s> </s> <unk> <0x41> <|begin_of_text|>",
    "nul \x00 and \x7f",
    "\ufeffmark",
]


def training_texts():
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [(folder / f"{name}.py").read_text("utf-8") for name in ("argparse", "ast", "typing")]


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("sp") / "small.model"
    path.write_bytes(train_sentencepiece(training_texts(), 500))
    return path


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory):
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(params=["bytes", "sentencepiece", "huggingface"])
def tokenizer(request, sentencepiece_file, tokenizer_json):
    if request.param == "bytes":
        return ByteTokenizer()
    if request.param == "sentencepiece":
        return SentencePieceTokenizer(sentencepiece_file)
    return HuggingFaceTokenizer(tokenizer_json)


def test_every_text_is_restored_with_its_byte_counts(tokenizer):
    rng = random.Random(0)
    characters = [chr(c) for c in (*range(128), *range(0xA0, 0x180), 0x2581, 0x1F600, 0x4E2D)]
    texts = AWKWARD + ["".join(rng.choices(characters, k=300)) for _ in range(50)]
    assert tokenizer.lossless
    num_bytes_V = tokenizer.token_bytes()
    assert num_bytes_V.shape == (tokenizer.vocab_size,)
    for text in texts:
        tokens = tokenizer.encode(text)
        assert tokens.dtype == np.int32
        assert tokenizer.decode(tokens) == text
        assert num_bytes_V[tokens].sum() == len(text.encode())
        np.testing.assert_array_equal(tokens, tokenizer.encode(text.encode()))
        # No text encodes to the tokens between documents.
        assert not np.isin(tokens, [tokenizer.bos_id, tokenizer.eos_id]).any()


def test_special_tokens_have_no_bytes_and_no_text(tokenizer):
    bounds = np.array([tokenizer.bos_id, *tokenizer.encode("a b"), tokenizer.eos_id])
    assert tokenizer.decode(bounds) == "a b"
    assert tokenizer.token_bytes()[bounds[[0, -1]]].tolist() == [0, 0]


def test_saving_and_loading(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert (loaded.kind, loaded.vocab_size) == (tokenizer.kind, tokenizer.vocab_size)
    np.testing.assert_array_equal(loaded.encode("x = [1, 2]"), tokenizer.encode("x = [1, 2]"))


def test_long_texts_are_encoded_in_spans(tokenizer):
    text = "def f(x):\n    return x + 1\n\n" * 6000 + "x" * 70000
    assert tokenizer.decode(encode_text(tokenizer, text)) == text


def test_fingerprints_tell_tokenizers_apart(sentencepiece_file, tokenizer_json):
    prints = {
        ByteTokenizer().fingerprint(),
        SentencePieceTokenizer(sentencepiece_file).fingerprint(),
        HuggingFaceTokenizer(tokenizer_json).fingerprint(),
        HuggingFaceTokenizer(tokenizer_json, bos_id=7).fingerprint(),
        IdsTokenizer(512, 510, 511).fingerprint(),
        IdsTokenizer(513, 510, 511).fingerprint(),
    }
    assert len(prints) == 6


def test_a_normalising_model_is_not_called_lossless(tmp_path):
    tokenizer = hf.Tokenizer(hf.models.WordLevel({"<s>": 0, "a": 1, "<unk>": 2}, "<unk>"))
    tokenizer.normalizer = hf.normalizers.Lowercase()
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert not HuggingFaceTokenizer(tmp_path / "tokenizer.json").lossless


def test_files_that_are_no_tokenizers(tmp_path, tokenizer_json):
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    with pytest.raises(UserError, match=r"bad\.json is not a Hugging Face"):
        HuggingFaceTokenizer(bad)
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        SentencePieceTokenizer(bad)
    with pytest.raises(UserError, match=r"none\.model: No such file"):
        SentencePieceTokenizer(tmp_path / "none.model")
    with pytest.raises(UserError, match="BOS id 9999 is outside the vocabulary"):
        HuggingFaceTokenizer(tokenizer_json, bos_id=9999)
    with pytest.raises(UserError, match="no readable tokenizer"):
        load_tokenizer(tmp_path)
    plain = hf.Tokenizer(hf.models.WordLevel({"a": 0}, "a"))
    plain.save(str(tmp_path / "plain.json"))
    with pytest.raises(UserError, match="give its id with --bos-id"):
        HuggingFaceTokenizer(tmp_path / "plain.json")
    with pytest.raises(UserError, match="token ids of an unknown tokenizer"):
        IdsTokenizer(512, 510, 511).encode("text")


@pytest.mark.parametrize(
    ("text", "size", "sentence"),
    [
        ("a few words only", 50000, r"enough for \d+ pieces; use a smaller --vocab-size"),
        ("the cat sat on the mat " * 99, 1024, r"enough for \d+ pieces; .*--tokenizer=bytes"),
        ("".join(map(chr, range(0x4E00, 0x5300))), 600, r"alone need \d+ pieces; use a larger"),
        ("", 500, "it is empty; .*--tokenizer=bytes"),
    ],
)
def test_a_vocabulary_that_does_not_fit_the_text(text, size, sentence, capfd):
    with pytest.raises(UserError, match=f"vocabulary of {size} on this text: .*{sentence}") as info:
        train_sentencepiece([text], size)
    assert ".cc(" not in str(info.value)
    assert capfd.readouterr().err == ""
