"""Export of tokenizers as `tokenizer.json`: same tokens, same decoded text."""

import json

import pytest
import tokenizers

from tttjax.data.tokenizers.base import ByteTokenizer, IdsTokenizer, load_tokenizer
from tttjax.data.tokenizers.huggingface import HuggingFaceTokenizer
from tttjax.data.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece
from tttjax.interop.huggingface.tokenizer_files import NATIVE_DIR, SAMPLE, write_tokenizer

TEXTS = [SAMPLE, "for i in range(10):\n    print(i, '\u2581')\n" * 20]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind in ("bpe", "unigram"):
        (folder / f"{kind}.model").write_bytes(train_sentencepiece(TEXTS, 340, model_type=kind))
    return folder


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_exported_tokenizers_give_the_same_tokens(kind, folder, tmp_path):
    ours = ByteTokenizer() if kind == "bytes" else SentencePieceTokenizer(folder / "bpe.model")
    assert write_tokenizer(ours, tmp_path) == ""
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("", "x", " \u2581 <0x41> ☃\n", *TEXTS):
        ids = theirs.encode(text).ids
        assert ids == [ours.bos_id, *ours.encode(text).tolist()]
        assert theirs.decode(ids) == text
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["bos_token"] == theirs.id_to_token(ours.bos_id)
    # The name of a special token in a text is plain text, as in tttjax.
    theirs.encode_special_tokens = settings["split_special_tokens"]
    assert theirs.encode("</s>", add_special_tokens=False).ids == ours.encode("</s>").tolist()


def test_a_tokenizer_without_equivalent_is_saved_natively(folder, tmp_path):
    ours = SentencePieceTokenizer(folder / "unigram.model")
    assert "no tokenizer with exactly the same tokens" in write_tokenizer(ours, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [NATIVE_DIR]
    assert load_tokenizer(tmp_path / NATIVE_DIR).fingerprint() == ours.fingerprint()
    assert "token ids" in write_tokenizer(IdsTokenizer(9, 0, 1), tmp_path / "none")


def test_a_hugging_face_tokenizer_is_copied(folder, tmp_path):
    write_tokenizer(ByteTokenizer(), tmp_path)
    source = tmp_path / "tokenizer.json"
    (tmp_path / "out").mkdir()
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert write_tokenizer(HuggingFaceTokenizer(source), tmp_path / "out") == ""
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == source.read_bytes()
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>")
