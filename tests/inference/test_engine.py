"""Prefill and decoding agree: tokens at once or one by one, alone or in a batch."""

import jax.numpy as jnp
import pytest
from helpers.inference import LENGTH, SYSTEMS, make_engine
from helpers.small import worst

import tttjax.inference.engine
from tttjax.inference.engine import Engine
from tttjax.inference.session import bucket_sizes

pytestmark = pytest.mark.slow


def test_bucket_sizes_add_up():
    assert bucket_sizes(0) == []
    assert bucket_sizes(7) == [4, 1, 1, 1]
    assert bucket_sizes(2049) == [1024, 1024, 1]
    assert all(sum(bucket_sizes(n)) == n for n in range(300))


def check_same(result, expected):
    """Two sessions, to the rounding of float64."""
    assert result.tokens == expected.tokens
    assert (result.uncommitted == expected.uncommitted).all()
    assert worst(result.learned, expected.learned) < 1e-11
    assert worst(result.now, expected.now) < 1e-11
    assert (result.logit_V is None) == (expected.logit_V is None)
    if result.logit_V is not None:
        assert worst(result.logit_V, expected.logit_V) < 1e-11


@pytest.mark.parametrize("name", SYSTEMS)
def test_prefill_in_parts_and_decoding_agree(x64, name):
    engine, token = make_engine(name)
    full = [engine.read(engine.start(), token[r])[0] for r in range(2)]

    split = engine.start()
    for part in (token[0, :5], token[0, 5:6], token[0, 6:]):
        split, _ = engine.read(split, part)
    assert worst(split.logit_V, full[0].logit_V) < 1e-11
    assert worst(split.learned, full[0].learned) < 1e-11

    # Two sequences at different positions, one token at a time.
    batch = engine.start_batch(
        [engine.read(engine.start(), token[r, : 3 + 2 * r])[0] for r in (0, 1)]
    )
    for i in range(LENGTH - 3):
        batch.step([int(token[0, 3 + i]), int(token[1, min(5 + i, LENGTH - 1)])])
        if i == LENGTH - 6:
            second = batch.session(1)
    first = batch.session(0)
    for result, expected in ((first, full[0]), (second, full[1])):
        assert result.tokens == LENGTH
        check_same(result, expected)


@pytest.mark.parametrize("name", ["ttt_e2e", "static"])
def test_static_batch_decodes_beyond_its_capacity(x64, monkeypatch, name):
    """Starts from a session of a learning engine, with uncommitted tokens."""
    learning, token = make_engine(name)
    monkeypatch.setattr(tttjax.inference.engine, "STATIC_CAPACITY", 3)
    engine = Engine(
        learning.inference_model._replace(chunk_size=0), learning._params, max_length=64
    )
    started, _ = learning.read(learning.start(), token[0, :7])
    batch = engine.start_batch([started])
    for t in token[0, 7:18]:
        batch.step([int(t)])
    result, (expected, _) = batch.session(0), engine.read(started, token[0, 7:18])
    assert result.tokens == expected.tokens == 18
    assert len(result.uncommitted) == len(expected.uncommitted) == 0
    assert worst(result.logit_V, expected.logit_V) < 1e-11
    assert worst(result.now, expected.now) < 1e-11
    assert worst(result.learned, expected.learned) < 1e-11


@pytest.mark.parametrize("name", ["ttt_e2e", "hybrid"])
def test_read_batch_of_different_lengths_equals_single_reads(x64, monkeypatch, name):
    engine, token = make_engine(name)
    started, _ = engine.read(engine.start(), token[1, :3])
    sessions = [engine.start(), engine.start(), started, engine.start()]
    texts = [token[0, :9], token[1, :6], token[0, :4], token[0, :0]]
    batches: list[int] = []
    read_chunks = engine._read_chunks

    def counting(weights, context, token_BT, *args, **kwargs):
        batches.append(len(token_BT))
        return read_chunks(weights, context, token_BT, *args, **kwargs)

    alone = [engine.read(s, text) for s, text in zip(sessions, texts, strict=True)]
    monkeypatch.setitem(vars(engine), "_read_chunks", counting)
    results = engine.read_batch(sessions, texts)
    assert max(batches) == 2  # sessions at the same position
    for (result, records), (expected, records_alone) in zip(results, alone, strict=True):
        check_same(result, expected)
        assert len(records) == len(records_alone)
        if records:
            assert worst(records, records_alone) < 1e-11
    assert results[3][0].logit_V is None


def test_update_waits_for_last_target_of_chunk(x64):
    engine, token = make_engine("ttt_e2e")
    four, _ = engine.read(engine.start(), token[0, :4])
    assert len(four.uncommitted) == 4
    assert worst(four.learned.fast, engine.start().learned.fast) == 0
    five, records = engine.read(four, token[0, 4:5])
    assert len(five.uncommitted) == 1
    assert worst(five.learned.fast, four.learned.fast) > 0
    assert jnp.concatenate([s.loss_NB for s in records]).shape == (1, 1)
