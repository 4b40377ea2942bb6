"""Scores given continuations: the loss of every token, and whether it was the most likely.

Like decoding with given tokens (teacher forcing): token i is scored after all tokens before it, and
inner updates follow the same rule.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tttjax.inference.engine import Engine
from tttjax.inference.prefill import Context, Weights, extend, logits
from tttjax.inference.session import Session, bucket_sizes
from tttjax.types import Array

LARGEST_SCORED = 256  # tokens whose logits are in memory at once


class Score(NamedTuple):
    """For every token: its loss in nats, and whether it was the most likely."""

    nll_T: np.ndarray
    is_top_T: np.ndarray

    @classmethod
    def join(cls, parts: Sequence["Score"]) -> "Score":
        """The score of consecutive tokens."""
        if not parts:
            return cls(np.zeros(0), np.zeros(0, bool))
        return cls(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def nll_and_top(logit_TV: Array, token_T: Array) -> tuple[Array, Array]:
    """(-log p of each token under its logits, whether none has a larger logit)."""
    own_T = jnp.take_along_axis(logit_TV, token_T[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logit_TV, axis=-1) - own_T, own_T >= jnp.max(logit_TV, axis=-1)


_nll_and_top = jax.jit(nll_and_top)


def score_batch(
    engine: Engine, sessions: Sequence[Session], texts: Sequence[np.ndarray], *, learn: bool = True
) -> list[Score]:
    """Scores a short continuation of each session, of any lengths, one token at a time.

    The sessions must have at least one token; they are not changed. Their number is rounded up to a
    power of two, so that few sizes are compiled.
    Raises UserError for tokens outside the vocabulary or beyond `max_length`.
    """
    for session, token_T in zip(sessions, texts, strict=True):
        engine.check(token_T, session.tokens)
    if not any(map(len, texts)):
        return [Score.join([]) for _ in texts]
    count = len(sessions)
    size = 1 << (count - 1).bit_length()
    batch = engine.start_batch([*sessions, *[sessions[-1]] * (size - count)])
    lengths = [len(token_T) for token_T in texts] + [0] * (size - count)
    token_RT = np.zeros((size, max(lengths)), np.int32)
    for row, token_T in zip(token_RT, texts, strict=False):
        row[: len(token_T)] = token_T
    scores = []
    for at in range(max(lengths)):
        scores.append(_nll_and_top(batch.logit_RV, jnp.asarray(token_RT[:, at])))
        for r, length in enumerate(lengths):
            if length <= at + 1:
                batch.deactivate(r)
        if at + 1 < max(lengths):
            batch.step(token_RT[:, at].tolist(), learn=learn)
    nll_TR, top_TR = (np.stack([np.asarray(x) for x in xs]) for xs in zip(*scores, strict=True))
    return [Score(nll_TR[:n, r], top_TR[:n, r]) for r, n in enumerate(lengths[:count])]


class Scorer:
    """Scores continuations of any length, one session at a time, in buckets of few sizes."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def score(
        self, session: Session, token_T: np.ndarray, *, learn: bool = True
    ) -> tuple[Session, Score]:
        """The session after more tokens, and their score.

        Raises ValueError for a session without tokens, UserError as `Engine.read` does.
        """
        _last_logits(session)
        self._engine.check(token_T, session.tokens)
        token_T, parts = token_T.astype(np.int32), []
        while len(token_T):
            count = self._bucket_size(session, len(token_T))
            if count:
                session, score = self._score_bucket(session, token_T[:count], learn)
            else:  # the chunk is full, and the next token is its last target
                count = 1
                score = Score(
                    *map(np.asarray, _nll_and_top(_last_logits(session), jnp.asarray(token_T[:1])))
                )
                session, _ = self._engine.read(session, token_T[:1], learn=learn)
            parts.append(score)
            token_T = token_T[count:]
        return session, Score.join(parts)

    def _bucket_size(self, session: Session, length: int) -> int:
        """How many of `length` tokens are scored at once, at most to the end of their chunk."""
        size = self._engine.inference_model.chunk_size
        capacity = size - len(session.uncommitted) if size else length
        return next(iter(bucket_sizes(min(capacity, length, LARGEST_SCORED))), 0)

    @cached_property
    def _extend(self) -> Callable[..., tuple[Context, Array, Array, Array]]:
        inference_model = self._engine.inference_model

        def run(
            weights: Weights, context: Context, logit_V: Array, token_T: Array
        ) -> tuple[Context, Array, Array, Array]:
            now, h_BTD = extend(inference_model, weights, context, token_T[None])
            logit_TV = logits(inference_model, weights, now, h_BTD)[0]
            before_TV = jnp.concatenate((logit_V[None], logit_TV[:-1]))
            return now, logit_TV[-1], *nll_and_top(before_TV, token_T)

        return jax.jit(run)

    def _score_bucket(
        self, session: Session, token_T: np.ndarray, learn: bool
    ) -> tuple[Session, Score]:
        """Scores tokens within the current chunk."""
        now, logit_V, nll_T, top_T = self._extend(
            self._engine.weights, session.now, _last_logits(session)[0], jnp.asarray(token_T)
        )
        result = replace(session, now=now, tokens=session.tokens + len(token_T), logit_V=logit_V)
        score = Score(np.asarray(nll_T), np.asarray(top_T))
        if not self._engine.inference_model.chunk_size:
            return result.commit(), score
        uncommitted = np.concatenate((session.uncommitted, token_T))
        is_target = np.concatenate((session.is_target, np.full(len(token_T), learn)))
        return replace(result, uncommitted=uncommitted, is_target=is_target), score


def _last_logits(session: Session) -> Array:
    """Logits [1, V] of the next token."""
    if session.logit_V is None:
        raise ValueError("the session is empty: read at least one token before scoring")
    return session.logit_V[None]
