"""Shards hold the documents exactly; damage and the wrong tokenizer are refused by name."""

import json
import shutil

import numpy as np
import pytest

from tttjax.data.file_checks import check_sums
from tttjax.data.shards import MANIFEST, open_prepared, read_manifest
from tttjax.data.tokenizers.base import ByteTokenizer
from tttjax.errors import UserError


@pytest.fixture
def copy(prepared, tmp_path):
    return shutil.copytree(prepared.folder, tmp_path / "copy")


def test_documents_have_bounds_bytes_and_names(corpus, prepared):
    texts = {f"texts/{path.name}": path.read_bytes() for path in corpus.iterdir()}
    names = []
    for name in prepared.splits:
        split = prepared.split(name)
        documents = list(split.documents())
        assert len(documents) == split.num_documents
        assert documents[-1].stop == split.num_tokens
        for document in documents:
            tokens = split.read(document.start, document.stop)
            assert tokens[0] == prepared.tokenizer.bos_id
            assert tokens[1:].astype(np.uint8).tobytes() == texts[document.name]
            assert document.num_bytes == len(texts[document.name])
            names.append(document.name)
        assert split.num_bytes == sum(d.num_bytes for d in documents)
    assert sorted(names) == sorted(texts)
    assert len(prepared.splits["train"]["shards"]) > 1


def test_reading_across_shards(prepared):
    split = prepared.split("train")
    whole = split.read(0, split.num_tokens)
    rng = np.random.default_rng(0)
    for start, stop in np.sort(rng.integers(0, split.num_tokens, (200, 2)), axis=1):
        np.testing.assert_array_equal(split.read(start, stop), whole[start:stop])


def test_unknown_split(prepared):
    with pytest.raises(UserError, match=r"no documents in the split 'test' \(it has: train, val\)"):
        prepared.split("test")


def test_truncated_missing_and_lengthened_shards(copy):
    shard = copy / "train-00000.tokens"
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    with pytest.raises(UserError, match=r"train-00000\.tokens is truncated"):
        open_prepared(copy, verify=False)
    shard.write_bytes(content + b"xx")
    with pytest.raises(UserError, match=r"train-00000\.tokens is too long"):
        open_prepared(copy, verify=False)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00000\.tokens is missing"):
        open_prepared(copy, verify=False)


@pytest.mark.parametrize("part", ["tokens", "documents", "names"])
def test_one_flipped_bit_is_found(copy, part):
    path = copy / f"val-00000.{part}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"val-00000\.{part} is corrupt"):
        open_prepared(copy)  # small, so it is read through without being asked
    open_prepared(copy, verify=False)
    with pytest.raises(UserError, match="is corrupt"):
        check_sums(copy, read_manifest(copy))


def test_wrong_tokenizer(copy, prepared):
    with pytest.raises(UserError, match="made by another tokenizer"):
        open_prepared(copy, fingerprint="0" * 64)
    open_prepared(copy, fingerprint=ByteTokenizer().fingerprint())
    config = copy / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps({"kind": "ids", "vocab_size": 264, "bos_id": 256, "eos_id": 257}))
    with pytest.raises(UserError, match="is not the one that made the data"):
        open_prepared(copy)


def test_folders_that_are_not_prepared_data(tmp_path, copy):
    with pytest.raises(UserError, match="does not exist"):
        open_prepared(tmp_path / "none")
    with pytest.raises(UserError, match="is not a prepared data set"):
        open_prepared(tmp_path)
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        open_prepared(copy)
    (copy / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        open_prepared(copy)
