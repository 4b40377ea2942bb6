"""Text generation: sampling, stop strings and batches of requests."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np

from tttjax.data.tokenizers.base import UNKNOWN, TextStream, Tokenizer
from tttjax.errors import UserError
from tttjax.inference.engine import Engine, Session
from tttjax.inference.options import Sampling
from tttjax.inference.sampling import SamplingParams, sample_token, stack
from tttjax.types import Array

CONTEXT = 8  # tokens before the text, which may end within a character


@dataclass(frozen=True)
class Request:
    """A session to continue, and its options.

    prompt: tokens to which the repetition penalty applies from the start. The text continues from
    the last of them: a blank between it and the first new token is part of the text.
    """

    session: Session
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    seed: int = 0
    prompt: Sequence[int] | np.ndarray = ()


@dataclass(frozen=True)
class GeneratedToken:
    """A generated token. request: index in the list. logprob: under the model, before filters.

    text: what can be printed now; an incomplete character or stop string is held back.
    finish_reason: "" for all but the last token, else "length", "stop" or "eos".
    """

    request: int
    token: int
    logprob: float
    text: str
    finish_reason: str = ""


class Transcript:
    """Decodes tokens to text as they come, after the tokens `before`, up to a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], before: Sequence[int] = ()):
        self._stream, self._stop = TextStream(tokenizer, before), tuple(stop)
        self._held = ""

    def add(self, token: int) -> tuple[str, bool]:
        """(text that can be printed now, whether a stop string occurred)."""
        self._held += self._stream.add(token)
        starts = [start for start in map(self._held.find, self._stop) if start >= 0]
        if starts:
            return self._held[: min(starts)], True
        return self._release(self._partial_stop_length()), False

    def flush(self) -> str:
        """The text held back, after the last token."""
        self._held += self._stream.flush()
        return self._release(0)

    def _partial_stop_length(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        return max(
            (n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n])),
            default=0,
        )

    def _release(self, held: int) -> str:
        end = len(self._held) - held
        text, self._held = self._held[:end], self._held[end:]
        return text


def _before(request: Request, tokenizer: Tokenizer) -> list[int]:
    """The last tokens that the text continues from; empty at the start of a text."""
    session = request.session
    for tokens in (request.prompt, session.uncommitted):
        had_text = (
            int(token)
            for token in reversed(tokens)
            if tokenizer.bytes_after(int(token), UNKNOWN) is not None
        )
        if last := list(islice(had_text, CONTEXT)):
            return last[::-1]
    # The tokens are no longer stored; a single one is BOS.
    return [UNKNOWN] if session.tokens > 1 else []


@partial(jax.jit, donate_argnums=2)
def _sample(
    seed_R: Array, position_R: Array, occurred_RV: Array, logit_RV: Array, params: SamplingParams
) -> tuple[Array, Array, Array]:
    """(tokens [R], log-probabilities [R], `occurred_RV` with these tokens)."""

    def one(
        seed: Array, position: Array, occurred_V: Array, logit_V: Array, params: SamplingParams
    ) -> tuple[Array, Array, Array]:
        key = jax.random.fold_in(jax.random.key(seed), position)
        token, logprob = sample_token(key, logit_V, occurred_V, params)
        return token, logprob, occurred_V.at[token].set(True)

    return jax.vmap(one)(seed_R, position_R, occurred_RV, logit_RV, params)


class Generator:
    """Generates for several requests at once: iterate over it, then take `sessions`.

    A request's text depends only on its own seed and session, not on the batch.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        requests: Sequence[Request],
        *,
        learn: bool = True,
    ):
        """learn: whether generated tokens are targets of inner updates, like prompt tokens.

        Raises UserError for a session without tokens and for options out of range.
        """
        for request in requests:
            if request.session.logit_V is None:
                raise UserError("a prompt needs at least one token")
            if not isinstance(request.max_tokens, int) or request.max_tokens < 1:
                raise UserError(
                    f"max_tokens={request.max_tokens!r} must be an integer, at least 1."
                )
            if not isinstance(request.seed, int) or not 0 <= request.seed < 2**32:
                raise UserError(f"seed={request.seed!r} must be an integer from 0 to {2**32 - 1}.")
            if "" in request.stop:
                raise UserError("a stop string is empty, and would end every text at once")
        self._engine, self._tokenizer, self._requests = engine, tokenizer, list(requests)
        self._learn = learn
        self.sessions: list[Session] = [request.session for request in requests]

    def __iter__(self) -> Iterator[GeneratedToken]:
        transcripts = [
            Transcript(self._tokenizer, r.stop, _before(r, self._tokenizer)) for r in self._requests
        ]
        rows = list(range(len(self._requests)))  # the request in every row of the batch
        sampler: _Sampler | None = None
        while rows:
            batch = self._engine.start_batch([self.sessions[r] for r in rows])
            sampler = sampler or _Sampler(self._requests, self._tokenizer, batch.logit_RV.shape[1])
            active = set(rows)
            # The batch shrinks by halves, so that few sizes are compiled.
            while 2 * len(active) > len(rows):
                tokens, logprobs = sampler.next(batch.logit_RV)
                batch.step(tokens, learn=self._learn)
                for row, r in enumerate(rows):
                    if r not in active:
                        continue
                    text = transcripts[r]
                    generated = self._generated_token(
                        r, tokens[row], logprobs[row], sampler.number, text
                    )
                    if generated.finish_reason:
                        self.sessions[r] = batch.session(row)
                        batch.deactivate(row)
                        active.remove(r)
                    yield generated
            remaining = [row for row, r in enumerate(rows) if r in active]
            for row in remaining:
                self.sessions[rows[row]] = batch.session(row)
            rows = [rows[row] for row in remaining]
            sampler.select(remaining)

    def _generated_token(
        self, r: int, token: int, logprob: float, number: int, text: Transcript
    ) -> GeneratedToken:
        if token in self._tokenizer.eos_ids:
            return GeneratedToken(r, token, logprob, text.flush(), "eos")
        new_text, stopped = text.add(token)
        if stopped:
            return GeneratedToken(r, token, logprob, new_text, "stop")
        if number == self._requests[r].max_tokens:
            return GeneratedToken(r, token, logprob, new_text + text.flush(), "length")
        return GeneratedToken(r, token, logprob, new_text)


class _Sampler:
    """The state of sampling. number: tokens sampled so far for every request.

    Random numbers depend only on the seed and the position, so that a text continues from a saved
    session as without the interruption.
    """

    def __init__(self, requests: Sequence[Request], tokenizer: Tokenizer, vocab: int):
        self.number = 0
        self._position_R = jnp.asarray([r.session.tokens for r in requests], jnp.uint32)
        self._is_token_V = jnp.arange(vocab) < tokenizer.vocab_size
        self._params = stack([request.sampling for request in requests])
        self._seed_R = jnp.asarray([request.seed for request in requests], jnp.uint32)
        occurred_RV = np.zeros((len(requests), vocab), bool)
        for row, request in zip(occurred_RV, requests, strict=True):
            row[np.asarray(request.prompt, np.int64)] = True
        self._occurred_RV = jnp.asarray(occurred_RV)

    def next(self, logit_RV: Array) -> tuple[list[int], list[float]]:
        """A token for each request, and its log-probability."""
        position_R = self._position_R + self.number
        logit_RV = jnp.where(self._is_token_V, logit_RV, -jnp.inf)
        tokens, logprobs, self._occurred_RV = _sample(
            self._seed_R, position_R, self._occurred_RV, logit_RV, self._params
        )
        self.number += 1
        return np.asarray(tokens).tolist(), np.asarray(logprobs).tolist()

    def select(self, rows: Sequence[int]) -> None:
        """Keeps only the requests in these rows."""
        index = np.asarray(rows, np.int64)
        state = self._params, self._seed_R, self._position_R, self._occurred_RV
        state = jax.tree.map(lambda x: x[index], state)
        self._params, self._seed_R, self._position_R, self._occurred_RV = state
