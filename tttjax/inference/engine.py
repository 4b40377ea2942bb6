"""Sessions that read and write: prompts in, tokens out, learning on the way.

A session stands in two places. `learned` is the context after the last chunk that was learned from;
`now` is that after all tokens, of which at most one chunk is `pending`. As soon as a chunk is full
and the token after it is known, the chunk is read once more from `learned`, with learning, and the
two places fall together. So what is learned does not depend on how the tokens came: in one piece,
in several, or one at a time.

Texts are cut into pieces of a few sizes: whole chunks by `CHUNKS_AT_ONCE` and 1, the rest by powers
of `PIECE`. Sessions that stand at the same place and have the same piece before them read it
together, in batches of powers of two, so every function is compiled once for each of few shapes.
While tokens are drawn, all sessions go on together, a token each, whatever their places.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
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
from tttjax.inference.session import NO_MARKS, NO_TOKENS, Reading, Session
from tttjax.types import Array, Params, PyTree

MOST_TOGETHER = 32  # sessions that read a piece together: each has its own fast weights and windows


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
        (found,) = self.read_together([session], [token_T], learn=learn)
        return found

    def read_together(
        self, sessions: Sequence[Session], texts: Sequence[np.ndarray], *, learn: bool = True
    ) -> list[tuple[Session, list[Records]]]:
        """`read` of each session's own tokens, of any lengths."""
        for session, token_T in zip(sessions, texts, strict=True):
            self.check(token_T, session.tokens)
        size = self.reader.chunk_size
        readings = [
            Reading.of(session, token_T.astype(np.int32), learn, size)
            for session, token_T in zip(sessions, texts, strict=True)
        ]
        self._finish(readings)
        return [(reading.session, reading.seen) for reading in readings]

    def _finish(self, readings: Sequence["Reading"]) -> None:
        """Reads all pieces; those furthest behind first, so that the others' company grows."""
        while left := [reading for reading in readings if reading.pieces]:
            place = min(reading.place for reading in left)
            first = next(reading for reading in left if reading.place == place)
            alike = [r for r in left if r.place == place and r.pieces[0] == first.pieces[0]]
            batch = alike[: _power_of_two(len(alike))]
            run = self._learn if first.pieces[0].chunks else self._extend_all
            run(batch, first.pieces[0].tokens)
            for reading in batch:
                del reading.pieces[0]

    def _learn(self, batch: Sequence["Reading"], length: int) -> None:
        """Reads whole chunks, from `learned`."""
        taken = [reading.take(length) for reading in batch]
        context, found = self._read_chunks(
            self.weights,
            _join([reading.session.learned for reading in batch]),
            jnp.asarray(np.stack([token_T for token_T, _ in taken])),
            jnp.asarray([reading.token_T[0] for reading in batch]),  # only a target
            # A token's mark says whether it is a target, of the token before it.
            jnp.asarray(
                [
                    np.append(counted_T[1:], reading.counted_T[0])
                    for reading, (_, counted_T) in zip(batch, taken, strict=True)
                ]
            ),
            at_start=batch[0].place == 0,
        )
        for i, reading in enumerate(batch):
            one = context if len(batch) == 1 else _part(context, i)
            tokens = reading.place + length
            reading.session = Session(one, one, NO_TOKENS, NO_MARKS, tokens, None)
            reading.seen.append(jax.tree.map(lambda x, i=i: x[:, i : i + 1], found))

    def _extend_all(self, batch: Sequence["Reading"], length: int) -> None:
        """Reads tokens of a chunk that is not full yet, from `now`."""
        taken = [reading.take(length) for reading in batch]
        now, logit_BV = self._extend(
            self.weights,
            _join([reading.session.now for reading in batch]),
            jnp.asarray(np.stack([token_T for token_T, _ in taken])),
            at_start=batch[0].place == 0,
        )
        for i, (reading, (token_T, counted_T)) in enumerate(zip(batch, taken, strict=True)):
            session = reading.session
            one = now if len(batch) == 1 else _part(now, i)
            read = replace(session, now=one, tokens=session.tokens + length, logit_V=logit_BV[i])
            if self.reader.chunk_size:
                reading.session = replace(
                    read,
                    pending=np.concatenate((session.pending, token_T)),
                    counted=np.concatenate((session.counted, counted_T)),
                )
            else:  # of a session that did learn, nothing is pending any more
                reading.session = replace(read, learned=one, pending=NO_TOKENS, counted=NO_MARKS)

    # --- writing --------------------------------------------------------------------------------

    def together(self, sessions: Sequence[Session]) -> "Group":
        """The sessions as a group that goes on a token at a time."""
        return Group(self, sessions)


class Group:
    """Sessions that go on together. Holds their contexts in one array each."""

    def __init__(self, engine: Engine, sessions: Sequence[Session]):
        self._engine = engine
        self._resting: set[int] = set()
        # Present contexts and fast weights are in `_now` alone; of what was learned from, only
        # windows and states are kept beside, and only if something will be learned.
        self._rest = [self._beside(session) for session in sessions]
        self._now = _stack([session.now for session in sessions])
        self.logit_RV = jnp.stack([_known(session.logit_V) for session in sessions])

    def _beside(self, session: Session) -> Session:
        learned = session.learned._replace(fast=None, rule_state=None)
        if not self._engine.reader.chunk_size:
            learned = Context(None, None, None, None)
        return replace(session, learned=learned, now=learned)

    def step(self, tokens: Sequence[int], *, learn: bool = True) -> None:
        """A token for each; those whose chunk is full learn from it first.

        learn: False reads these tokens without making them targets, also later.
        """
        engine = self._engine
        awake = [r for r in range(len(tokens)) if r not in self._resting]
        for r in awake:
            engine.check([tokens[r]], self._rest[r].tokens)
        self._learn_full([r for r in awake if self._is_full(r)], tokens, learn)
        for r in awake:
            self._rest[r] = self._add(r, tokens[r], learn)
        self._now, self.logit_RV = engine._step(
            engine.weights, self._now, jnp.asarray(tokens, jnp.int32)
        )

    def _is_full(self, r: int) -> bool:
        size = self._engine.reader.chunk_size
        return bool(size) and len(self._rest[r].pending) == size

    def _learn_full(self, full: Sequence[int], tokens: Sequence[int], learn: bool) -> None:
        """Full chunks are learned from; the new tokens are their last targets."""
        size = self._engine.reader.chunk_size
        readings = []
        for r in full:
            session = replace(self._rest[r], learned=self._learned(r))
            new = np.array([tokens[r]], np.int32)
            reading = Reading.of(session, new, learn, size)
            reading.pieces = [piece for piece in reading.pieces if piece.chunks]
            readings.append(reading)
        self._engine._finish(readings)
        for r, reading in zip(full, readings, strict=True):
            self._now = _put(self._now, reading.session.now, r)
            self._rest[r] = self._beside(reading.session)

    def _add(self, r: int, token: int, learn: bool) -> Session:
        """What is kept of session r once it has the token, that `_now` reads later."""
        session = replace(self._rest[r], tokens=self._rest[r].tokens + 1)
        if not self._engine.reader.chunk_size:
            return session
        pending = np.append(session.pending, np.int32(token))
        return replace(session, pending=pending, counted=np.append(session.counted, learn))

    def _learned(self, r: int) -> Context:
        """What session r has learned; its fast weights change nowhere but in learning."""
        now, beside = self._now, self._rest[r].learned
        fast, rule_state = jax.tree.map(lambda x: x[r], (now.fast, now.rule_state))
        return beside._replace(fast=fast, rule_state=rule_state)

    def rest(self, r: int) -> None:
        """Session r, taken out before, goes on no more: its tokens count for nothing."""
        self._resting.add(r)

    def session(self, r: int) -> Session:
        """One of them as it is now."""
        now = jax.tree.map(lambda x: x[r], self._now)
        learned = self._learned(r) if self._engine.reader.chunk_size else now
        return replace(self._rest[r], learned=learned, now=now, logit_V=self.logit_RV[r])


def _power_of_two(count: int) -> int:
    """The largest that is at most `count` and MOST_TOGETHER."""
    return 1 << (min(count, MOST_TOGETHER).bit_length() - 1)


def _join(contexts: Sequence[Context]) -> Context:
    """Contexts at the same place as one of their whole batch."""
    if len(contexts) == 1:
        return contexts[0]
    joined = _concatenate(contexts)
    first = contexts[0]
    below = {**joined.below, "position": first.below["position"]}
    return joined._replace(below=below, above={**joined.above, "position": first.above["position"]})


@jax.jit
def _concatenate(contexts: Sequence[Context]) -> Context:
    return jax.tree.map(
        lambda *leaves: jnp.concatenate(jax.tree.map(jnp.atleast_1d, leaves)), *contexts
    )


@jax.jit
def _part(context: Context, i: Array) -> Context:
    """One sequence of a batch."""

    def cut(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1), tree)

    def state(half: PyTree) -> PyTree:
        return {**half, "blocks": cut(half["blocks"])}

    return Context(
        state(context.below), state(context.above), cut(context.fast), cut(context.rule_state)
    )


def _known(logit_V: Array | None) -> Array:
    if logit_V is None:
        raise ValueError("a session must have read something before it can go on")
    return logit_V


def _stack(trees: Iterable[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@partial(jax.jit, donate_argnums=0)
def _put(stacked: PyTree, one: PyTree, r: Array) -> PyTree:
    return jax.tree.map(lambda x, y: x.at[r].set(y), stacked, one)
