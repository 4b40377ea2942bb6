"""How likely a given continuation is: every token's loss, and whether it was the likeliest.

Like writing, but the tokens are given (teacher forcing): token i is judged by what was read before
it, the continuation's own earlier tokens included, and they are learned from by the same rule.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tttjax.inference.engine import Engine
from tttjax.inference.prefill import Context, Weights, extend, logits
from tttjax.inference.session import Session, pieces
from tttjax.types import Array

LARGEST_PIECE = 256  # tokens whose logits are in memory at once


class Score(NamedTuple):
    """Of every token: its loss in nats, and whether it was the likeliest."""

    nll_T: np.ndarray
    is_top_T: np.ndarray

    @classmethod
    def join(cls, parts: Sequence["Score"]) -> "Score":
        """Of tokens that follow each other."""
        if not parts:
            return cls(np.zeros(0), np.zeros(0, bool))
        return cls(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def judge(logit_TV: Array, token_T: Array) -> tuple[Array, Array]:
    """(-log p of each token under its logits, whether none has a larger logit)."""
    own_T = jnp.take_along_axis(logit_TV, token_T[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logit_TV, axis=-1) - own_T, own_T >= jnp.max(logit_TV, axis=-1)


_judge = jax.jit(judge)


def score_together(
    engine: Engine, sessions: Sequence[Session], texts: Sequence[np.ndarray], *, learn: bool = True
) -> list[Score]:
    """Of a short continuation for each session, of any lengths: all go on together, token by token.

    The sessions must have read something, and stay as they are. Their number is rounded up to a
    power of two, so that few sizes are compiled.
    Raises UserError for tokens that the model does not have, or has no room for.
    """
    for session, token_T in zip(sessions, texts, strict=True):
        engine.check(token_T, session.tokens)
    if not any(map(len, texts)):
        return [Score.join([]) for _ in texts]
    count = len(sessions)
    size = 1 << (count - 1).bit_length()
    group = engine.start_batch([*sessions, *[sessions[-1]] * (size - count)])
    lengths = [len(token_T) for token_T in texts] + [0] * (size - count)
    token_RT = np.zeros((size, max(lengths)), np.int32)
    for row, token_T in zip(token_RT, texts, strict=False):
        row[: len(token_T)] = token_T
    found = []
    for at in range(max(lengths)):
        found.append(_judge(group.logit_RV, jnp.asarray(token_RT[:, at])))
        for r, length in enumerate(lengths):
            if length <= at + 1:
                group.rest(r)
        if at + 1 < max(lengths):
            group.step(token_RT[:, at].tolist(), learn=learn)
    nll_TR, top_TR = (np.stack([np.asarray(x) for x in xs]) for xs in zip(*found, strict=True))
    return [Score(nll_TR[:n, r], top_TR[:n, r]) for r, n in enumerate(lengths[:count])]


class Scorer:
    """Scores continuations of any length, a session at a time, in pieces of few sizes."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def score(
        self, session: Session, token_T: np.ndarray, *, learn: bool = True
    ) -> tuple[Session, Score]:
        """The session after further tokens, and the score of each of them.

        Raises ValueError if nothing has been read, UserError as `Engine.read` does.
        """
        _first(session)
        self._engine.check(token_T, session.tokens)
        token_T, parts = token_T.astype(np.int32), []
        while len(token_T):
            count = self._together(session, len(token_T))
            if count:
                session, score = self._piece(session, token_T[:count], learn)
            else:  # a chunk is full, and the next token its last target
                count = 1
                score = Score(*map(np.asarray, _judge(_first(session), jnp.asarray(token_T[:1]))))
                session, _ = self._engine.read(session, token_T[:1], learn=learn)
            parts.append(score)
            token_T = token_T[count:]
        return session, Score.join(parts)

    def _together(self, session: Session, length: int) -> int:
        """How many of so many tokens are read at once, at most to the end of their chunk."""
        size = self._engine.reader.chunk_size
        room = size - len(session.pending) if size else length
        return next(iter(pieces(min(room, length, LARGEST_PIECE))), 0)

    @cached_property
    def _extend(self):
        reader = self._engine.reader

        def run(weights: Weights, context: Context, logit_V: Array, token_T: Array):
            now, h_BTD = extend(reader, weights, context, token_T[None])
            logit_TV = logits(reader, weights, now, h_BTD)[0]
            before_TV = jnp.concatenate((logit_V[None], logit_TV[:-1]))
            return now, logit_TV[-1], *judge(before_TV, token_T)

        return jax.jit(run)

    def _piece(self, session: Session, token_T: np.ndarray, learn: bool) -> tuple[Session, Score]:
        """Tokens that do not go beyond the present chunk."""
        now, logit_V, nll_T, top_T = self._extend(
            self._engine.weights, session.now, _first(session)[0], jnp.asarray(token_T)
        )
        read = replace(session, now=now, tokens=session.tokens + len(token_T), logit_V=logit_V)
        score = Score(np.asarray(nll_T), np.asarray(top_T))
        if not self._engine.reader.chunk_size:
            return read.settled(), score
        pending = np.concatenate((session.pending, token_T))
        counted = np.concatenate((session.counted, np.full(len(token_T), learn)))
        return replace(read, pending=pending, counted=counted), score


def _first(session: Session) -> Array:
    """Logits [1, V] of the token after everything that was read."""
    if session.logit_V is None:
        raise ValueError("nothing has been read: the first token has no probability")
    return session.logit_V[None]
