"""The inference engine: batched prefill and decoding of sessions, with inner updates.

A session has two contexts. `learned` is the one after the last chunk with an inner update; `now` is
the one after all tokens, of which at most one chunk is `uncommitted`. Once a chunk is full and the
token after it is known, the chunk is processed again from `learned`, with its update, and both
contexts are equal. So the updates do not depend on how the tokens arrive: at once, in parts, or one
at a time.

Prefill splits texts into buckets of few sizes: full chunks by `CHUNKS_PER_CALL` and 1, remaining
tokens by powers of `BUCKET_BASE`. Sessions at the same position with the same next bucket form
batches of powers of two, so that few shapes are compiled. Decoding advances all sessions of a batch
by one token, at any positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np

from tttjax.errors import UserError
from tttjax.inference.decode import (
    DecodeState,
    decode_axes,
    decode_step,
    from_decode_state,
    to_decode_state,
)
from tttjax.inference.prefill import (
    Context,
    InferenceModel,
    Weights,
    extend,
    init_context,
    logits,
    read_chunks,
    split_weights,
)
from tttjax.inference.session import NO_TARGETS, NO_TOKENS, PrefillRequest, Session
from tttjax.runtime.memory import device_memory
from tttjax.ttt.chunk import ChunkRecords
from tttjax.types import Array, Params, PyTree

STATIC_CAPACITY = 128  # of a decode cache, in tokens, without inner updates
MAX_BATCH = 32  # sessions per prefill call: each has its own fast weights and windows


class Engine:
    """Prefill and decoding with compiled functions.

    max_length: capacity of full attention, in tokens.
    """

    def __init__(self, inference_model: InferenceModel, params: Params, max_length: int):
        self.inference_model, self.max_length = inference_model, max_length
        self.weights = split_weights(inference_model, params)
        self._params = params

    # --- compiled functions ---------------------------------------------------------------------

    @cached_property
    def _read_chunks(self) -> Callable[..., tuple[Context, ChunkRecords]]:
        return jax.jit(partial(read_chunks, self.inference_model), static_argnames="at_start")

    @cached_property
    def _extend(self) -> Callable[..., tuple[Context, Array]]:
        def run(
            weights: Weights, context: Context, token_BT: Array, at_start: bool
        ) -> tuple[Context, Array]:
            context, h_BTD = extend(
                self.inference_model, weights, context, token_BT, at_start=at_start
            )
            return context, logits(self.inference_model, weights, context, h_BTD[:, -1:])[:, 0]

        return jax.jit(run, static_argnames="at_start")

    @cached_property
    def _step(self) -> Callable[..., tuple[DecodeState, Array]]:
        """One token each for R sessions at any positions."""
        return jax.jit(partial(decode_step, self.inference_model), donate_argnums=1)

    @cached_property
    def _to_decode_state(self) -> Callable[..., DecodeState]:
        return jax.jit(partial(to_decode_state, self.inference_model, capacity=self.capacity))

    @cached_property
    def _from_decode_state(self) -> Callable[..., Context]:
        return jax.jit(partial(from_decode_state, self.inference_model))

    @property
    def capacity(self) -> int:
        """Tokens that a decode cache holds before it is rebuilt."""
        return self.inference_model.chunk_size or STATIC_CAPACITY

    # --- prefill --------------------------------------------------------------------------------

    @cached_property
    def _empty_context(self) -> Context:
        make = jax.jit(
            partial(init_context, self.inference_model, batch=1, max_length=self.max_length)
        )
        arrays = jax.tree.leaves(jax.eval_shape(make, self._params))
        size, limit = sum(x.size * x.dtype.itemsize for x in arrays), device_memory()
        if size > limit:
            raise UserError(
                f"a session with a capacity of {self.max_length} tokens needs {size / 1e9:,.1f} GB "
                f"of the device's {limit / 1e9:,.1f} GB: lower max_length (--max-length; "
                "full attention caches all tokens; a window caches model.window_size)"
            )
        return make(self._params)

    @cached_property
    def has_full_attention(self) -> bool:
        """Whether a layer caches all tokens, at most `max_length`."""
        split = self.inference_model.chunk_model.split
        caches = jax.tree.leaves((split.parallel_caches, split.sequential_caches))
        return any(cache.grows for cache in caches)

    def start(self) -> Session:
        """A session before the first token."""
        return Session(self._empty_context, self._empty_context, NO_TOKENS, NO_TARGETS, 0, None)

    def check(self, tokens: Sequence[int] | np.ndarray, position: int) -> None:
        """UserError if tokens from `position` on are too many or outside the vocabulary."""
        vocab = self.inference_model.chunk_model.split.model.config.vocab_size
        smallest, largest = (np.min(tokens), np.max(tokens)) if len(tokens) else (0, 0)
        if smallest < 0 or largest >= vocab:
            raise UserError(
                f"tokens from {smallest} to {largest} are not all in the model's vocabulary of "
                f"{vocab}; use the tokenizer that it was trained with"
            )
        if self.has_full_attention and position + len(tokens) > self.max_length:
            raise UserError(
                f"full attention has a capacity of {self.max_length} tokens, and this takes "
                f"{position + len(tokens)}; raise max_length (--max-length) to that"
            )

    def read(
        self, session: Session, token_T: np.ndarray, *, learn: bool = True
    ) -> tuple[Session, list[ChunkRecords]]:
        """The session after more tokens, and the records of the chunks they completed.

        learn: False excludes these tokens from the targets of any update, also later.
        Raises UserError for tokens outside the vocabulary or beyond `max_length`.
        """
        (result,) = self.read_batch([session], [token_T], learn=learn)
        return result

    def read_batch(
        self, sessions: Sequence[Session], texts: Sequence[np.ndarray], *, learn: bool = True
    ) -> list[tuple[Session, list[ChunkRecords]]]:
        """`read` for several sessions, with texts of any lengths."""
        for session, token_T in zip(sessions, texts, strict=True):
            self.check(token_T, session.tokens)
        size = self.inference_model.chunk_size
        requests = [
            PrefillRequest.of(session, token_T.astype(np.int32), learn, size)
            for session, token_T in zip(sessions, texts, strict=True)
        ]
        self._prefill(requests)
        return [(request.session, request.records) for request in requests]

    def _prefill(self, requests: Sequence["PrefillRequest"]) -> None:
        """Processes all buckets, the earliest position first, so that batches grow."""
        while remaining := [request for request in requests if request.buckets]:
            first = min(remaining, key=lambda request: request.position)
            position, bucket = first.position, first.buckets[0]
            same = [r for r in remaining if r.position == position and r.buckets[0] == bucket]
            batch = same[: _power_of_two(len(same))]
            run = self._prefill_chunks if bucket.chunks else self._prefill_tokens
            run(batch, bucket.tokens)
            for request in batch:
                del request.buckets[0]

    def _prefill_chunks(self, batch: Sequence["PrefillRequest"], length: int) -> None:
        """Processes full chunks with their updates, from `learned`."""
        rows = [request.take(length) for request in batch]
        context, records = self._read_chunks(
            self.weights,
            _join([request.session.learned for request in batch]),
            jnp.asarray(np.stack([token_T for token_T, _ in rows])),
            jnp.asarray([request.token_T[0] for request in batch]),  # only a target
            # `is_target` says whether a token is a target, which belongs to the token before it.
            jnp.asarray(
                [
                    np.append(is_target_T[1:], request.is_target_T[0])
                    for request, (_, is_target_T) in zip(batch, rows, strict=True)
                ]
            ),
            at_start=batch[0].position == 0,
        )
        for i, request in enumerate(batch):
            one = context if len(batch) == 1 else _part(context, i)
            tokens = request.position + length
            request.session = Session(one, one, NO_TOKENS, NO_TARGETS, tokens, None)
            request.records.append(jax.tree.map(lambda x, i=i: x[:, i : i + 1], records))

    def _prefill_tokens(self, batch: Sequence["PrefillRequest"], length: int) -> None:
        """Processes tokens of an incomplete chunk, without update, from `now`."""
        rows = [request.take(length) for request in batch]
        now, logit_BV = self._extend(
            self.weights,
            _join([request.session.now for request in batch]),
            jnp.asarray(np.stack([token_T for token_T, _ in rows])),
            at_start=batch[0].position == 0,
        )
        for i, (request, (token_T, is_target_T)) in enumerate(zip(batch, rows, strict=True)):
            session = request.session
            one = now if len(batch) == 1 else _part(now, i)
            result = replace(session, now=one, tokens=session.tokens + length, logit_V=logit_BV[i])
            if self.inference_model.chunk_size:
                request.session = replace(
                    result,
                    uncommitted=np.concatenate((session.uncommitted, token_T)),
                    is_target=np.concatenate((session.is_target, is_target_T)),
                )
            else:
                request.session = result.commit()

    # --- decoding -------------------------------------------------------------------------------

    def start_batch(self, sessions: Sequence[Session]) -> "DecodeBatch":
        """A batch that decodes the sessions, one token at a time."""
        return DecodeBatch(self, sessions)


class DecodeBatch:
    """Sessions that are decoded together; their decode states are stacked.

    `_sessions[r].learned` is the context at which the decode cache of session r begins: after its
    last update, or the current one for a model without updates.
    """

    def __init__(self, engine: Engine, sessions: Sequence[Session]):
        if not engine.inference_model.chunk_size:
            sessions = [session.commit() for session in sessions]
        self._engine = engine
        self._inactive: set[int] = set()
        self._sessions = [self._without_fast(session) for session in sessions]
        self._starts = [session.tokens - len(session.uncommitted) for session in sessions]
        self._state = _stack([self._decode_state(session) for session in sessions])
        self.logit_RV = jnp.stack([_require_logits(session.logit_V) for session in sessions])

    def _without_fast(self, session: Session) -> Session:
        """A session without fast weights, which are in `_state`, and without unused arrays."""
        committed = session.learned._replace(fast=None)
        if not self._engine.inference_model.chunk_size:
            committed = session.now._replace(fast=None)
            split = self._engine.inference_model.chunk_model.split
            committed = committed._replace(
                parallel=_base_for_decode(split.parallel_caches, committed.parallel),
                sequential=_base_for_decode(split.sequential_caches, committed.sequential),
            )
        return replace(session, learned=committed, now=committed, logit_V=None)

    def _decode_state(self, session: Session) -> DecodeState:
        committed = session.learned if self._engine.inference_model.chunk_size else session.now
        return self._engine._to_decode_state(committed, session.now, len(session.uncommitted))

    def _reset(self, r: int, session: Session) -> None:
        self._sessions[r] = self._without_fast(session)
        self._starts[r] = session.tokens - len(session.uncommitted)
        self._state = _put(self._state, self._decode_state(session), r)

    def step(self, tokens: Sequence[int], *, learn: bool = True) -> None:
        """Appends one token to each session; updates first the weights of those with a full chunk.

        learn: as of `Engine.read`.
        """
        engine = self._engine
        active = [r for r in range(len(tokens)) if r not in self._inactive]
        for r in active:
            engine.check([tokens[r]], self._sessions[r].tokens)
        full = [r for r in active if self._sessions[r].tokens - self._starts[r] == engine.capacity]
        if engine.inference_model.chunk_size:
            self._update_full_chunks(full, tokens, learn)
        else:
            for r in full:
                self._reset(r, self.session(r))
        for r in active:
            self._sessions[r] = self._add(self._sessions[r], tokens[r], learn)
        self._state, self.logit_RV = engine._step(
            engine.weights, self._state, jnp.asarray(tokens, jnp.int32)
        )

    def _update_full_chunks(self, full: Sequence[int], tokens: Sequence[int], learn: bool) -> None:
        """Updates fast weights from full chunks; the new tokens are their last targets."""
        size, requests = self._engine.inference_model.chunk_size, []
        for r in full:
            session, new = self._sessions[r], np.array([tokens[r]], np.int32)
            session = replace(session, learned=self._learned(r))
            request = PrefillRequest.of(session, new, learn, size)
            request.buckets = [bucket for bucket in request.buckets if bucket.chunks]
            requests.append(request)
        self._engine._prefill(requests)
        for r, request in zip(full, requests, strict=True):
            self._reset(r, request.session)

    def _add(self, session: Session, token: int, learn: bool) -> Session:
        """The session with one more token."""
        session = replace(session, tokens=session.tokens + 1)
        if not self._engine.inference_model.chunk_size:
            return session
        uncommitted = np.append(session.uncommitted, np.int32(token))
        return replace(
            session, uncommitted=uncommitted, is_target=np.append(session.is_target, learn)
        )

    def _learned(self, r: int) -> Context:
        """The context of session r after its last update, with its fast weights."""
        fast = jax.tree.map(lambda x: x[None], _take(self._state, r).fast)
        return self._sessions[r].learned._replace(fast=fast)

    def deactivate(self, r: int) -> None:
        """Ends session r: its further tokens are ignored. Take the session out first."""
        self._inactive.add(r)

    def session(self, r: int) -> Session:
        """Session r in its current state."""
        session = self._sessions[r]
        committed, state = session.learned, _take(self._state, r)
        now = self._engine._from_decode_state(committed, state, session.tokens - self._starts[r])
        learned = self._learned(r) if self._engine.inference_model.chunk_size else now
        return replace(session, learned=learned, now=now, logit_V=self.logit_RV[r])


def _base_for_decode(caches: PyTree, state: PyTree) -> PyTree:
    """The state of a part with what `Cache.from_decode_cache` needs of it."""
    blocks = jax.tree.map(
        lambda cache, arrays: jax.tree.map(cache.base_for_decode, arrays), caches, state["blocks"]
    )
    return {**state, "blocks": blocks}


def _power_of_two(count: int) -> int:
    """The largest power of two that is at most `count` and MAX_BATCH."""
    return 1 << (min(count, MAX_BATCH).bit_length() - 1)


def _join(contexts: Sequence[Context]) -> Context:
    """Contexts at the same position as one batch."""
    if len(contexts) == 1:
        return contexts[0]
    joined = _concatenate(contexts)
    first = contexts[0]
    parallel = {**joined.parallel, "position": first.parallel["position"]}
    return joined._replace(
        parallel=parallel,
        sequential={**joined.sequential, "position": first.sequential["position"]},
    )


@jax.jit
def _concatenate(contexts: Sequence[Context]) -> Context:
    return jax.tree.map(
        lambda *leaves: jnp.concatenate(jax.tree.map(jnp.atleast_1d, leaves)), *contexts
    )


@jax.jit
def _part(context: Context, i: Array) -> Context:
    """One sequence of a batch."""

    def take(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1), tree)

    def state(part: PyTree) -> PyTree:
        return {**part, "blocks": take(part["blocks"])}

    return Context(
        state(context.parallel),
        state(context.sequential),
        take(context.fast),
        take(context.rule_state),
    )


def _require_logits(logit_V: Array | None) -> Array:
    if logit_V is None:
        raise ValueError("the session is empty: prefill at least one token before decoding")
    return logit_V


@jax.jit
def _stack(states: Sequence[DecodeState]) -> DecodeState:
    axes = decode_axes(states[0])
    return jax.tree.map(lambda axis, *leaves: jnp.stack(leaves, axis), axes, *states)


@partial(jax.jit, donate_argnums=0)
def _put(stacked: DecodeState, one: DecodeState, r: Array) -> DecodeState:
    put = jax.lax.dynamic_update_index_in_dim
    return jax.tree.map(lambda x, y, axis: put(x, y, r, axis), stacked, one, decode_axes(one))


@jax.jit
def _take(stacked: DecodeState, r: Array) -> DecodeState:
    take = partial(jax.lax.dynamic_index_in_dim, keepdims=False)
    return jax.tree.map(lambda x, axis: take(x, r, axis), stacked, decode_axes(stacked))
