"""Scores of continuations equal those of reading token by token."""

import jax
import numpy as np
import pytest
from helpers.exhaustive import only
from helpers.inference import make_engine
from helpers.small import worst

from tttjax.errors import UserError
from tttjax.inference.scoring import Scorer, score_batch

pytestmark = pytest.mark.slow


def by_hand(engine, session, token_T, learn=True):
    """Teacher forcing with `Engine.read` alone; the session after it, and losses and ranks."""
    nll, top = [], []
    for token in token_T:
        logprob_V = jax.nn.log_softmax(session.logit_V)
        nll.append(-float(logprob_V[token]))
        top.append(int(np.sum(np.asarray(logprob_V) > logprob_V[token])) == 0)
        session, _ = engine.read(session, np.array([token], np.int32), learn=learn)
    return session, np.array(nll), np.array(top)


@pytest.mark.parametrize("name", ["ttt_e2e", "static"])
def test_scorer_equals_token_by_token_reading(x64, name):
    """Chunks are of 4 tokens: continuations begin and end inside and at the end of chunks."""
    engine, token = make_engine(name)
    scorer, some_top = Scorer(engine), False
    for read, more in ((3, 12), (4, 4), (6, 1)):
        session, _ = engine.read(engine.start(), token[0, :read])
        text = token[0, read : read + more]
        after, score = scorer.score(session, text)
        expected, nll, top = by_hand(engine, session, text)
        np.testing.assert_allclose(score.nll_T, nll, atol=1e-10)
        assert score.is_top_T.tolist() == top.tolist()
        assert after.tokens == expected.tokens == read + more
        assert after.uncommitted.tolist() == expected.uncommitted.tolist()
        assert worst(after.logit_V, expected.logit_V) < 1e-10
        assert worst(after.learned, expected.learned) < 1e-10
        top_token = np.array([int(np.argmax(session.logit_V))])
        some_top |= bool(scorer.score(session, top_token)[1].is_top_T.all())
    assert some_top


@pytest.mark.parametrize("name", only(["ttt_e2e"], ["ttt_e2e", "hybrid"]))
def test_score_batch_equals_single_scores(x64, name):
    engine, token = make_engine(name)
    sessions = [engine.read(engine.start(), token[r, :end])[0] for r, end in ((0, 3), (1, 7))]
    texts = [token[0, 3:12], token[1, 7:9], token[1, :0]]
    sessions.append(sessions[0])
    scores = score_batch(engine, sessions, texts)
    for session, text, score in zip(sessions, texts, scores, strict=True):
        _, nll, top = by_hand(engine, session, text)
        np.testing.assert_allclose(score.nll_T, nll, atol=1e-10)
        assert score.is_top_T.tolist() == top.tolist()
    assert [len(score.nll_T) for score in scores] == [9, 2, 0]


def test_learn_false_changes_later_scores(x64):
    engine, token = make_engine("ttt_e2e")
    session, _ = engine.read(engine.start(), token[0, :3])
    text = token[0, 3:15]
    for learn in (True, False):
        _, nll, _ = by_hand(engine, session, text, learn)
        np.testing.assert_allclose(
            Scorer(engine).score(session, text, learn=learn)[1].nll_T, nll, atol=1e-10
        )
        (score,) = score_batch(engine, [session], [text], learn=learn)
        np.testing.assert_allclose(score.nll_T, nll, atol=1e-10)
    assert np.abs(nll - by_hand(engine, session, text)[1])[2:].max() > 1e-6


def test_empty_batches_and_sessions(x64):
    engine, token = make_engine("static")
    assert score_batch(engine, [], []) == []
    with pytest.raises(ValueError, match="at least one token"):
        Scorer(engine).score(engine.start(), token[0])
    session, _ = engine.read(engine.start(), token[0, :2])
    with pytest.raises(UserError, match="vocabulary of 11"):
        score_batch(engine, [session], [np.array([11])])
    with pytest.raises(UserError, match="vocabulary of 11"):
        Scorer(engine).score(session, np.array([11]))
