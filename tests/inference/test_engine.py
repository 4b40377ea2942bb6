"""However tokens come, in pieces or singly, alone or in a group: the same logits and weights."""

import jax.numpy as jnp
import pytest
from helpers.inference import LENGTH, SYSTEMS, make_engine
from helpers.small import worst

import tttjax.inference.engine
from tttjax.inference.engine import Engine
from tttjax.inference.session import pieces


def test_pieces_are_few_and_add_up():
    assert pieces(0) == []
    assert pieces(7) == [4, 1, 1, 1]
    assert pieces(2049) == [1024, 1024, 1]
    assert all(sum(pieces(n)) == n for n in range(300))


def check_same(found, expected):
    """Two sessions, to the rounding of float64."""
    assert found.tokens == expected.tokens
    assert (found.pending == expected.pending).all()
    assert worst(found.learned, expected.learned) < 1e-11
    assert worst(found.now, expected.now) < 1e-11
    assert (found.logit_V is None) == (expected.logit_V is None)
    if found.logit_V is not None:
        assert worst(found.logit_V, expected.logit_V) < 1e-11


@pytest.mark.parametrize("name", SYSTEMS)
def test_any_way_of_reading_gives_the_same(x64, name):
    engine, token = make_engine(name)
    whole = [engine.read(engine.start(), token[r])[0] for r in range(2)]

    split = engine.start()
    for part in (token[0, :5], token[0, 5:6], token[0, 6:]):
        split, _ = engine.read(split, part)
    assert worst(split.logit_V, whole[0].logit_V) < 1e-11
    assert worst(split.learned, whole[0].learned) < 1e-11

    # Two sequences that stand at different places, a token at a time.
    group = engine.start_batch(
        [engine.read(engine.start(), token[r, : 3 + 2 * r])[0] for r in (0, 1)]
    )
    for i in range(LENGTH - 3):
        group.step([int(token[0, 3 + i]), int(token[1, min(5 + i, LENGTH - 1)])])
        if i == LENGTH - 6:
            second = group.session(1)
    first = group.session(0)
    for found, expected in ((first, whole[0]), (second, whole[1])):
        assert found.tokens == LENGTH
        check_same(found, expected)


@pytest.mark.parametrize("name", ["ttt_e2e", "static"])
def test_without_learning_a_group_goes_on_beyond_its_room(x64, monkeypatch, name):
    """From a session that has learned where it could, so that tokens are pending."""
    learning, token = make_engine(name)
    monkeypatch.setattr(tttjax.inference.engine, "STATIC_ROOM", 3)
    engine = Engine(learning.reader._replace(chunk_size=0), learning._params, max_length=64)
    begun, _ = learning.read(learning.start(), token[0, :7])
    group = engine.start_batch([begun])
    for t in token[0, 7:18]:
        group.step([int(t)])
    found, (expected, _) = group.session(0), engine.read(begun, token[0, 7:18])
    assert found.tokens == expected.tokens == 18
    assert len(found.pending) == len(expected.pending) == 0
    assert worst(found.logit_V, expected.logit_V) < 1e-11
    assert worst(found.now, expected.now) < 1e-11
    assert worst(found.learned, expected.learned) < 1e-11


@pytest.mark.parametrize("name", ["ttt_e2e", "hybrid"])
def test_texts_of_any_lengths_are_read_together(x64, monkeypatch, name):
    engine, token = make_engine(name)
    begun, _ = engine.read(engine.start(), token[1, :3])
    sessions = [engine.start(), engine.start(), begun, engine.start()]
    texts = [token[0], token[1, :9], token[0, :7], token[0, :0]]
    batches: list[int] = []
    read_chunks = engine._read_chunks

    def counting(weights, context, token_BT, *args, **kwargs):
        batches.append(len(token_BT))
        return read_chunks(weights, context, token_BT, *args, **kwargs)

    alone = [engine.read(s, text) for s, text in zip(sessions, texts, strict=True)]
    monkeypatch.setitem(vars(engine), "_read_chunks", counting)
    start_batch = engine.read_batch(sessions, texts)
    assert max(batches) == 2  # those that stand at the same place
    for (found, seen), (expected, seen_alone) in zip(start_batch, alone, strict=True):
        check_same(found, expected)
        assert len(seen) == len(seen_alone)
        if seen:
            assert worst(seen, seen_alone) < 1e-11
    assert start_batch[3][0].logit_V is None


def test_learning_happens_once_a_chunk_and_its_last_target_are_known(x64):
    engine, token = make_engine("ttt_e2e")
    four, _ = engine.read(engine.start(), token[0, :4])
    assert len(four.pending) == 4
    assert worst(four.learned.fast, engine.start().learned.fast) == 0
    five, seen = engine.read(four, token[0, 4:5])
    assert len(five.pending) == 1
    assert worst(five.learned.fast, four.learned.fast) > 0
    assert jnp.concatenate([s.loss_NB for s in seen]).shape == (1, 1)
