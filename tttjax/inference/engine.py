"""Sessions that read and write: prompts in, tokens out, learning on the way.

A session stands in two places. `learned` is the context after the last chunk that was learned from;
`now` is that after all tokens, of which at most one chunk is `pending`. As soon as a chunk is full
and the token after it is known, the chunk is read once more from `learned`, with learning, and the
two places fall together. So what is learned does not depend on how the tokens came: in one piece,
in several, or one at a time.

Texts are read a session at a time, since each fills the machine. While tokens are drawn, all
sessions go on together, a token each, whatever their places. Every function is compiled once per
shape: whole chunks in pieces of `CHUNKS_AT_ONCE` and 1, the rest in powers of `PIECE`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np

from tttjax.chunk_step import Records
from tttjax.errors import UserError
from tttjax.inference.reading import (
    Context,
    Reader,
    Weights,
    divide,
    extend,
    logits,
    read_chunks,
    start,
)
from tttjax.types import Array, Params, PyTree

CHUNKS_AT_ONCE = 8
PIECE = 4  # the rest of a text is read in pieces of 1, 4, 16, ... tokens
LARGEST_PIECE = 1024
NO_TOKENS, NO_MARKS = np.zeros(0, np.int32), np.zeros(0, bool)


@dataclass(frozen=True)
class Session:
    """One sequence: what was read of it and learned from it. Never changed, always replaced.

    pending: int32 [n], the tokens read since `learned`; counted: bool [n], whether each is one to
    learn from. tokens: all that were read. logit_V: of the next token, float32 (None: nothing has
    been read).
    """

    learned: Context
    now: Context
    pending: np.ndarray
    counted: np.ndarray
    tokens: int
    logit_V: Array | None


def pieces(length: int) -> list[int]:
    """Sizes that add up to `length`: powers of PIECE, the largest first."""
    sizes, size = [], LARGEST_PIECE
    while length:
        count, length = divmod(length, size)
        sizes += [size] * count
        size //= PIECE
    return sizes


class Engine:
    """A model that reads and writes. max_length: tokens that full attention has room for."""

    def __init__(self, reader: Reader, params: Params, max_length: int):
        self.reader, self.max_length = reader, max_length
        self.weights = divide(reader, params)
        self._params = params

    # --- compiled functions ---------------------------------------------------------------------

    @cached_property
    def _read_chunks(self):
        return jax.jit(partial(read_chunks, self.reader), static_argnames="at_start")

    @cached_property
    def _extend(self):
        def run(weights: Weights, context: Context, token_BT: Array, at_start: bool):
            context, h_BTD = extend(self.reader, weights, context, token_BT, at_start=at_start)
            return context, logits(self.reader, weights, context, h_BTD[:, -1:])[:, 0]

        return jax.jit(run, static_argnames="at_start")

    @cached_property
    def _step(self):
        """A token each for R sessions that stand at different places."""

        def one(weights: Weights, context: Context, token: Array):
            context, h_BTD = extend(self.reader, weights, context, token[None, None])
            return context, logits(self.reader, weights, context, h_BTD)[0, 0]

        return jax.jit(jax.vmap(one, in_axes=(None, 0, 0)), donate_argnums=1)

    # --- reading --------------------------------------------------------------------------------

    @cached_property
    def _fresh(self) -> Context:
        make = jax.jit(partial(start, self.reader, batch=1, max_length=self.max_length))
        return make(self._params)

    @cached_property
    def _has_whole(self) -> bool:
        """Whether something keeps all tokens, and so has room for `max_length` of them only."""
        cut = self.reader.learner.cut
        return "whole" in jax.tree.leaves((cut.keeps(), cut.keeps_below()))

    def start(self) -> Session:
        """A session of which nothing has been read."""
        return Session(self._fresh, self._fresh, NO_TOKENS, NO_MARKS, 0, None)

    def check(self, tokens: Sequence[int] | np.ndarray, already: int) -> None:
        """UserError if tokens after so many others are outside the vocabulary, or too many."""
        vocab = self.reader.learner.cut.model.vocab_size
        least, most = (np.min(tokens), np.max(tokens)) if len(tokens) else (0, 0)
        if least < 0 or most >= vocab:
            raise UserError(
                f"tokens from {least} to {most} are not all in the model's vocabulary of {vocab}; "
                "use the tokenizer that it was trained with"
            )
        if self._has_whole and already + len(tokens) > self.max_length:
            raise UserError(
                f"full attention has room for {self.max_length} tokens, and this takes "
                f"{already + len(tokens)}; give --max-length={already + len(tokens)}"
            )

    def read(
        self, session: Session, token_T: np.ndarray, *, learn: bool = True
    ) -> tuple[Session, list[Records]]:
        """The session after further tokens, and what the chunks showed that became full.

        learn: False reads these tokens without making them targets, also later.
        Raises UserError for tokens that the model does not have, or has no room for.
        """
        self.check(token_T, session.tokens)
        seen: list[Records] = []
        size, token_T = self.reader.chunk_size, token_T.astype(np.int32)
        known_T = np.concatenate((session.pending, token_T))
        counted_T = np.concatenate((session.counted, np.full(len(token_T), learn)))
        number = (len(known_T) - 1) // size if size else 0
        if number and len(token_T):
            end = number * size
            session, seen = self._learn(session, known_T[: end + 1], counted_T[: end + 1])
            token_T = known_T[end:]
            counted_T = counted_T[end:]
        else:
            counted_T = counted_T[len(session.pending) :]
        for count in pieces(len(token_T)):
            session = self._extend_one(session, token_T[:count], counted_T[:count])
            token_T, counted_T = token_T[count:], counted_T[count:]
        return session, seen

    def _learn(
        self, session: Session, known_T: np.ndarray, counted_T: np.ndarray
    ) -> tuple[Session, list[Records]]:
        """Reads whole chunks from `learned`; the last of the known tokens is only a target."""
        size, seen = self.reader.chunk_size, []
        context, at = session.learned, 0
        first = session.tokens - len(session.pending)
        while at < len(known_T) - 1:
            left = (len(known_T) - 1 - at) // size
            end = at + size * (CHUNKS_AT_ONCE if left >= CHUNKS_AT_ONCE else 1)
            context, found = self._read_chunks(
                self.weights,
                context,
                jnp.asarray(known_T[None, at:end]),
                jnp.asarray(known_T[None, end]),
                jnp.asarray(counted_T[None, at + 1 : end + 1]),
                at_start=first + at == 0,
            )
            seen.append(found)
            at = end
        return Session(context, context, NO_TOKENS, NO_MARKS, first + at, None), seen

    def _extend_one(self, session: Session, token_T: np.ndarray, counted_T: np.ndarray) -> Session:
        now, logit_BV = self._extend(
            self.weights, session.now, jnp.asarray(token_T[None]), at_start=session.tokens == 0
        )
        read = replace(session, now=now, tokens=session.tokens + len(token_T), logit_V=logit_BV[0])
        if not self.reader.chunk_size:  # of a session that did learn, nothing is pending any more
            return replace(read, learned=now, pending=NO_TOKENS, counted=NO_MARKS)
        return replace(
            read,
            pending=np.concatenate((session.pending, token_T)),
            counted=np.concatenate((session.counted, counted_T)),
        )

    # --- writing --------------------------------------------------------------------------------

    def together(self, sessions: Sequence[Session]) -> "Group":
        """The sessions as a group that goes on a token at a time."""
        return Group(self, sessions)


class Group:
    """Sessions that go on together. Holds their contexts in one array each."""

    def __init__(self, engine: Engine, sessions: Sequence[Session]):
        self._engine = engine
        self._resting: set[int] = set()
        # Their present contexts are in `_now` alone, and those learned from only if any are.
        if engine.reader.chunk_size:
            self._rest = [replace(session, now=session.learned) for session in sessions]
        else:
            self._rest = [replace(engine.start(), tokens=s.tokens) for s in sessions]
        self._now = _stack([session.now for session in sessions])
        self.logit_RV = jnp.stack([_known(session.logit_V) for session in sessions])

    def step(self, tokens: Sequence[int], *, learn: bool = True) -> None:
        """A token for each; those whose chunk is full learn from it first.

        learn: False reads these tokens without making them targets, also later.
        """
        engine = self._engine
        awake = [r for r in range(len(tokens)) if r not in self._resting]
        for r in awake:
            engine.check([tokens[r]], self._rest[r].tokens)
        for r in awake:
            self._rest[r] = self._add(r, tokens[r], learn)
        self._now, self.logit_RV = engine._step(
            engine.weights, self._now, jnp.asarray(tokens, jnp.int32)
        )

    def _add(self, r: int, token: int, learn: bool) -> Session:
        """What is kept of session r once it has the token; `_now` learns here, and reads later."""
        session, size = self._rest[r], self._engine.reader.chunk_size
        if not size:
            return replace(session, tokens=session.tokens + 1)
        known_T = np.append(session.pending, np.int32(token))
        counted_T = np.append(session.counted, learn)
        if len(session.pending) == size:
            session, _ = self._engine._learn(session, known_T, counted_T)
            self._now = _put(self._now, session.now, r)
            known_T, counted_T = known_T[-1:], counted_T[-1:]
        return replace(session, tokens=session.tokens + 1, pending=known_T, counted=counted_T)

    def rest(self, r: int) -> None:
        """Session r, taken out before, goes on no more: its tokens count for nothing."""
        self._resting.add(r)

    def session(self, r: int) -> Session:
        """One of them as it is now."""
        rest = self._rest[r]
        now = jax.tree.map(lambda x: x[r], self._now)
        learned = rest.learned if self._engine.reader.chunk_size else now
        return replace(rest, learned=learned, now=now, logit_V=self.logit_RV[r])


def _known(logit_V: Array | None) -> Array:
    if logit_V is None:
        raise ValueError("a session must have read something before it can go on")
    return logit_V


def _stack(trees: Iterable[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@partial(jax.jit, donate_argnums=0)
def _put(stacked: PyTree, one: PyTree, r: Array) -> PyTree:
    return jax.tree.map(lambda x, y: x.at[r].set(y), stacked, one)
