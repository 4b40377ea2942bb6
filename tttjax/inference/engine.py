"""Sessions that read and write: prompts in, tokens out, learning on the way.

A session stands in two places. `learned` is the context after the last chunk that was learned from;
`now` is that after all tokens, of which at most one chunk is `pending`. As soon as a chunk is full
and the token after it is known, the chunk is read once more from `learned`, with learning, and the
two places fall together. So what is learned does not depend on how the tokens came: in one piece,
in several, or one at a time.

Texts are cut into pieces of a few sizes: whole chunks by `CHUNKS_PER_CALL` and 1, the rest by
powers of `PIECE`. Sessions that stand at the same place and have the same piece before them read it
together, in batches of powers of two, so every function is compiled once for each of few shapes.
While tokens are drawn, all sessions go on together, a token each, whatever their places.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np

from tttjax.errors import UserError
from tttjax.inference.decode import DecodeState, axes, from_decode_state, to_decode_state, write
from tttjax.inference.prefill import (
    Context,
    InferenceModel,
    Weights,
    divide,
    extend,
    logits,
    read_chunks,
    start,
)
from tttjax.inference.session import NO_MARKS, NO_TOKENS, PrefillRequest, Session
from tttjax.runtime.memory import device_memory
from tttjax.ttt.chunk import ChunkRecords
from tttjax.types import Array, Params, PyTree

STATIC_ROOM = 128
MOST_TOGETHER = 32  # sessions that read a piece together: each has its own fast weights and windows


class Engine:
    """A model that reads and writes. max_length: tokens that full attention has room for."""

    def __init__(self, reader: InferenceModel, params: Params, max_length: int):
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

        return jax.jit(partial(write, self.reader), donate_argnums=1)

    @cached_property
    def _open(self):
        return jax.jit(partial(to_decode_state, self.reader, room=self.room))

    @cached_property
    def _close(self):
        return jax.jit(partial(from_decode_state, self.reader))

    @property
    def room(self) -> int:
        """Tokens that are written at most before a context is opened anew."""
        return self.reader.chunk_size or STATIC_ROOM

    # --- reading --------------------------------------------------------------------------------

    @cached_property
    def _fresh(self) -> Context:
        make = jax.jit(partial(start, self.reader, batch=1, max_length=self.max_length))
        arrays = jax.tree.leaves(jax.eval_shape(make, self._params))
        size, limit = sum(x.size * x.dtype.itemsize for x in arrays), device_memory()
        if size > limit:
            raise UserError(
                f"a session with room for {self.max_length} tokens needs {size / 1e9:,.1f} GB of "
                f"the device's {limit / 1e9:,.1f} GB: give a smaller --max-length (full attention "
                "keeps so many tokens; a window keeps model.window_size)"
            )
        return make(self._params)

    @cached_property
    def has_whole(self) -> bool:
        """Whether something keeps all tokens, and so has room for `max_length` of them only."""
        cut = self.reader.learner.cut
        return "whole" in jax.tree.leaves((cut.keeps(), cut.parallel_kinds()))

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
        if self.has_whole and already + len(tokens) > self.max_length:
            raise UserError(
                f"full attention has room for {self.max_length} tokens, and this takes "
                f"{already + len(tokens)}; give --max-length={already + len(tokens)}"
            )

    def read(
        self, session: Session, token_T: np.ndarray, *, learn: bool = True
    ) -> tuple[Session, list[ChunkRecords]]:
        """The session after further tokens, and what the chunks showed that became full.

        learn: False reads these tokens without making them targets, also later.
        Raises UserError for tokens that the model does not have, or has no room for.
        """
        (found,) = self.read_batch([session], [token_T], learn=learn)
        return found

    def read_batch(
        self, sessions: Sequence[Session], texts: Sequence[np.ndarray], *, learn: bool = True
    ) -> list[tuple[Session, list[ChunkRecords]]]:
        """`read` of each session's own tokens, of any lengths."""
        for session, token_T in zip(sessions, texts, strict=True):
            self.check(token_T, session.tokens)
        size = self.reader.chunk_size
        readings = [
            PrefillRequest.of(session, token_T.astype(np.int32), learn, size)
            for session, token_T in zip(sessions, texts, strict=True)
        ]
        self._finish(readings)
        return [(reading.session, reading.seen) for reading in readings]

    def _finish(self, readings: Sequence["PrefillRequest"]) -> None:
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

    def _learn(self, batch: Sequence["PrefillRequest"], length: int) -> None:
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

    def _extend_all(self, batch: Sequence["PrefillRequest"], length: int) -> None:
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
            else:
                reading.session = read.settled()

    # --- writing --------------------------------------------------------------------------------

    def start_batch(self, sessions: Sequence[Session]) -> "DecodeBatch":
        """The sessions as a group that goes on a token at a time."""
        return DecodeBatch(self, sessions)


class DecodeBatch:
    """Sessions that go on together, open for writing; their contexts are in one array each.

    Of each is kept beside: its tokens and marks, and the context that it was opened after, which is
    the one that was learned from last, if anything is learned.
    """

    def __init__(self, engine: Engine, sessions: Sequence[Session]):
        if not engine.reader.chunk_size:
            sessions = [session.settled() for session in sessions]
        self._engine = engine
        self._resting: set[int] = set()
        self._beside = [self._kept(session) for session in sessions]
        self._first = [session.tokens - len(session.pending) for session in sessions]
        self._writing = _stack([self._opened(session) for session in sessions])
        self.logit_RV = jnp.stack([_known(session.logit_V) for session in sessions])

    def _kept(self, session: Session) -> Session:
        """Without fast weights, which are in `_writing`, and without what nobody will look at."""
        past = session.learned._replace(fast=None)
        if not self._engine.reader.chunk_size:
            past = session.now._replace(fast=None)
            cut = self._engine.reader.learner.cut
            past = past._replace(
                below={
                    **past.below,
                    "blocks": _windows(cut.parallel_kinds(), past.below["blocks"]),
                },
                above={**past.above, "blocks": _windows(cut.keeps(), past.above["blocks"])},
            )
        return replace(session, learned=past, now=past, logit_V=None)

    def _opened(self, session: Session) -> DecodeState:
        past = session.learned if self._engine.reader.chunk_size else session.now
        return self._engine._open(past, session.now, len(session.pending))

    def _reopen(self, r: int, session: Session) -> None:
        self._beside[r] = self._kept(session)
        self._first[r] = session.tokens - len(session.pending)
        self._writing = _put(self._writing, self._opened(session), r)

    def step(self, tokens: Sequence[int], *, learn: bool = True) -> None:
        """A token for each; those whose chunk is full learn from it first.

        learn: False reads these tokens without making them targets, also later.
        """
        engine = self._engine
        awake = [r for r in range(len(tokens)) if r not in self._resting]
        for r in awake:
            engine.check([tokens[r]], self._beside[r].tokens)
        full = [r for r in awake if self._beside[r].tokens - self._first[r] == engine.room]
        if engine.reader.chunk_size:
            self._learn(full, tokens, learn)
        else:
            for r in full:
                self._reopen(r, self.session(r))
        for r in awake:
            self._beside[r] = self._add(self._beside[r], tokens[r], learn)
        self._writing, self.logit_RV = engine._step(
            engine.weights, self._writing, jnp.asarray(tokens, jnp.int32)
        )

    def _learn(self, full: Sequence[int], tokens: Sequence[int], learn: bool) -> None:
        """Full chunks are learned from; the new tokens are their last targets."""
        size, readings = self._engine.reader.chunk_size, []
        for r in full:
            beside, new = self._beside[r], np.array([tokens[r]], np.int32)
            session = replace(beside, learned=self._learned(r))
            reading = PrefillRequest.of(session, new, learn, size)
            reading.pieces = [piece for piece in reading.pieces if piece.chunks]
            readings.append(reading)
        self._engine._finish(readings)
        for r, reading in zip(full, readings, strict=True):
            self._reopen(r, reading.session)

    def _add(self, beside: Session, token: int, learn: bool) -> Session:
        """With a token more."""
        beside = replace(beside, tokens=beside.tokens + 1)
        if not self._engine.reader.chunk_size:
            return beside
        pending = np.append(beside.pending, np.int32(token))
        return replace(beside, pending=pending, counted=np.append(beside.counted, learn))

    def _learned(self, r: int) -> Context:
        """What session r has learned; its fast weights change nowhere but in learning."""
        fast = jax.tree.map(lambda x: x[None], _take(self._writing, r).fast)
        return self._beside[r].learned._replace(fast=fast)

    def rest(self, r: int) -> None:
        """Session r, taken out before, goes on no more: its tokens count for nothing."""
        self._resting.add(r)

    def session(self, r: int) -> Session:
        """One of them as it is now."""
        beside = self._beside[r]
        past, writing = beside.learned, _take(self._writing, r)
        now = self._engine._close(past, writing, beside.tokens - self._first[r])
        learned = self._learned(r) if self._engine.reader.chunk_size else now
        return replace(beside, learned=learned, now=now, logit_V=self.logit_RV[r])


def _windows(kinds: PyTree, blocks: PyTree) -> PyTree:
    """Windows of a state as they are; of what else there is, no more than the axes of rows."""
    return jax.tree.map(
        lambda kind, x: x if kind == "window" else jnp.zeros(x.shape[:2]), kinds, blocks
    )


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


def _stack(writings: Sequence[DecodeState]) -> DecodeState:
    where = axes(writings[0])
    return jax.tree.map(lambda axis, *leaves: jnp.stack(leaves, axis), where, *writings)


@partial(jax.jit, donate_argnums=0)
def _put(stacked: DecodeState, one: DecodeState, r: Array) -> DecodeState:
    put = jax.lax.dynamic_update_index_in_dim
    return jax.tree.map(lambda x, y, axis: put(x, y, r, axis), stacked, one, axes(one))


@jax.jit
def _take(stacked: DecodeState, r: Array) -> DecodeState:
    take = partial(jax.lax.dynamic_index_in_dim, keepdims=False)
    return jax.tree.map(lambda x, axis: take(x, r, axis), stacked, axes(stacked))
