"""Held-out sequences lie within documents, spread over them, and repeat no target."""

import numpy as np
import pytest

from tttjax.data.held_out import eval_documents, eval_sequences
from tttjax.data.preparation import prepare
from tttjax.errors import UserError


@pytest.fixture(scope="module")
def data(corpus, tmp_path_factory):
    """All ten documents held out but one."""
    return prepare([corpus], tmp_path_factory.mktemp("held") / "d", val_fraction=0.999)


def test_sequences_spread_over_documents_first(data):
    split = data.split("val")
    starts, stops = split.document_bounds()
    long = np.flatnonzero(stops - starts >= 251)
    held = eval_sequences(data, length=250, num=1000)
    assert sorted(held.document[: len(long)]) == list(long)
    assert (held.offset[: len(long)] == 0).all()
    assert len(held) == ((stops - starts - 1) // 250).sum()
    for tokens, document, offset in zip(held.tokens, held.document, held.offset, strict=True):
        start = starts[document] + offset
        assert start + 251 <= stops[document]
        np.testing.assert_array_equal(tokens, split.read(start, start + 251))
    positions = set(zip(held.document.tolist(), held.offset.tolist(), strict=True))
    assert len(positions) == len(held)
    assert held.batch().mask.all()  # a document has no BOS inside


def test_seed_and_number(data):
    few, again = (eval_sequences(data, length=100, num=4) for _ in range(2))
    other = eval_sequences(data, length=100, num=4, seed=1)
    np.testing.assert_array_equal(few.tokens, again.tokens)
    assert few.document.tolist() != other.document.tolist()
    assert [len(batch.inputs) for batch in few.batches(3)] == [3, 1]


def test_shorter_contexts_of_the_same_documents(data):
    long = eval_sequences(data, length=800, num=3)
    short = eval_sequences(data, length=100, num=3, min_document_tokens=801)
    np.testing.assert_array_equal(short.document, long.document)
    np.testing.assert_array_equal(short.tokens, long.tokens[:, :101])


def test_bytes_of_targets_add_up_to_the_documents(data):
    held = eval_documents(data, max_length=4000)
    split = data.split("val")
    counted = held.target_bytes(data.tokenizer.token_bytes()).sum(axis=1)
    np.testing.assert_array_equal(counted, split.document_bytes()[held.document])
    assert held.batch().inputs.min() >= 0


def test_too_long_a_context(data):
    with pytest.raises(UserError, match=r"has 5001 tokens \(the longest has 33\d\d\)"):
        eval_sequences(data, length=5000, num=1)
    with pytest.raises(UserError, match="num=0"):
        eval_sequences(data, length=10, num=0)
    with pytest.raises(UserError, match="has 9999 targets"):
        eval_documents(data, max_length=10, min_length=9999)
