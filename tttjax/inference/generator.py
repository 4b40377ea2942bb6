"""Text from a model, token by token: sampling, stop strings, several requests at a time."""

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
from tttjax.inference.sampling import Sampling, SamplingParams, choose, stack
from tttjax.types import Array

CONTEXT = 8  # tokens before the text, of which the last may have begun a character


@dataclass(frozen=True)
class Request:
    """A session to go on with, and how.

    prompt: tokens to which the repetition penalty applies from the start. The text goes on from
    the last of them: a blank between them and the first new token is part of it.
    """

    session: Session
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    seed: int = 0
    prompt: Sequence[int] | np.ndarray = ()


@dataclass(frozen=True)
class GeneratedToken:
    """A token that was written. request: its place in the list. logprob: by the model itself.

    text: what can be shown now; a character or a stop string that may be on its way is held back.
    finished: "" while there is more to come, else "length", "stop" or "eos".
    """

    request: int
    token: int
    logprob: float
    text: str
    finished: str = ""


class Transcript:
    """Text of tokens as they come, after those `before`, up to a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], before: Sequence[int] = ()):
        self._stream, self._stop = TextStream(tokenizer, before), tuple(stop)
        self._held = ""

    def add(self, token: int) -> tuple[str, bool]:
        """(text that can be shown now, whether a stop string came)."""
        self._held += self._stream.add(token)
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            return self._held[: min(found)], True
        return self._release(self._on_its_way()), False

    def rest(self) -> str:
        """What was held back, when nothing more will come."""
        self._held += self._stream.rest()
        return self._release(0)

    def _on_its_way(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        return max(
            (n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n])),
            default=0,
        )

    def _release(self, kept: int) -> str:
        end = len(self._held) - kept
        text, self._held = self._held[:end], self._held[end:]
        return text


def _before(request: Request, tokenizer: Tokenizer) -> list[int]:
    """The last tokens that a request's text goes on from; none where it begins one."""
    session = request.session
    for known in (request.prompt, session.pending):
        had_text = (
            int(token)
            for token in reversed(known)
            if tokenizer.bytes_after(int(token), UNKNOWN) is not None
        )
        if last := list(islice(had_text, CONTEXT)):
            return last[::-1]
    # Tokens that are no longer at hand; one alone is BOS.
    return [UNKNOWN] if session.tokens > 1 else []


@partial(jax.jit, donate_argnums=2)
def _draw(seed_R: Array, place_R: Array, seen_RV: Array, logit_RV: Array, wishes: SamplingParams):
    """(tokens [R], log-probabilities [R], what has occurred with them in it)."""

    def one(seed, place, seen_V, logit_V, wish):
        key = jax.random.fold_in(jax.random.key(seed), place)
        token, logprob = choose(key, logit_V, seen_V, wish)
        return token, logprob, seen_V.at[token].set(True)

    return jax.vmap(one)(seed_R, place_R, seen_RV, logit_RV, wishes)


class Generator:
    """Requests that are written together; iterate over it, then ask for the sessions.

    A request's text depends on its own seed and session alone, not on those beside it.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        requests: Sequence[Request],
        *,
        learn: bool = True,
    ):
        """learn: whether the tokens that are written are learned from, like those that are read.

        Raises UserError for a request without a token to begin with.
        """
        for request in requests:
            if request.session.logit_V is None:
                raise UserError("nothing has been read: a prompt needs at least one token")
            if request.max_tokens < 1:
                raise UserError(f"max_tokens={request.max_tokens} must be at least 1.")
            if not 0 <= request.seed < 2**32:
                raise UserError(f"seed={request.seed} must be from 0 to {2**32 - 1}.")
            if "" in request.stop:
                raise UserError("a stop string is empty, and would end every text at once")
        self._engine, self._tokenizer, self._requests = engine, tokenizer, list(requests)
        self._learn = learn
        self.sessions: list[Session] = [request.session for request in requests]

    def __iter__(self) -> Iterator[GeneratedToken]:
        transcripts = [
            Transcript(self._tokenizer, r.stop, _before(r, self._tokenizer)) for r in self._requests
        ]
        active = list(range(len(self._requests)))
        draws: _Draws | None = None
        while active:
            group = self._engine.start_batch([self.sessions[r] for r in active])
            draws = draws or _Draws(self._requests, self._tokenizer, group.logit_RV.shape[1])
            at_work = set(active)
            # The group shrinks by halves, so that few sizes are compiled.
            while 2 * len(at_work) > len(active):
                tokens, logprobs = draws.next(group.logit_RV)
                group.step(tokens, learn=self._learn)
                for place, r in enumerate(active):
                    if r not in at_work:
                        continue
                    text = transcripts[r]
                    piece = self._piece(r, tokens[place], logprobs[place], draws.number, text)
                    if piece.finished:
                        self.sessions[r] = group.session(place)
                        group.rest(place)
                        at_work.remove(r)
                    yield piece
            places = [place for place, r in enumerate(active) if r in at_work]
            for place in places:
                self.sessions[active[place]] = group.session(place)
            active = [active[place] for place in places]
            draws.keep(places)

    def _piece(
        self, r: int, token: int, logprob: float, number: int, text: Transcript
    ) -> GeneratedToken:
        if token in self._tokenizer.eos_ids:
            return GeneratedToken(r, token, logprob, text.rest(), "eos")
        shown, stopped = text.add(token)
        if stopped:
            return GeneratedToken(r, token, logprob, shown, "stop")
        if number == self._requests[r].max_tokens:
            return GeneratedToken(r, token, logprob, shown + text.rest(), "length")
        return GeneratedToken(r, token, logprob, shown)


class _Draws:
    """What drawing keeps between tokens. number: of tokens drawn so far, of every request.

    A draw's random numbers follow from the seed and the place in the sequence, so that a text goes
    on from a saved session as it would have gone on.
    """

    def __init__(self, requests: Sequence[Request], tokenizer: Tokenizer, vocab: int):
        self.number = 0
        self._place_R = jnp.asarray([r.session.tokens for r in requests], jnp.uint32)
        self._is_token_V = jnp.arange(vocab) < tokenizer.vocab_size
        self._wishes = stack([request.sampling for request in requests])
        self._seed_R = jnp.asarray([request.seed for request in requests], jnp.uint32)
        seen_RV = np.zeros((len(requests), vocab), bool)
        for row, request in zip(seen_RV, requests, strict=True):
            row[np.asarray(request.prompt, np.int64)] = True
        self._seen_RV = jnp.asarray(seen_RV)

    def next(self, logit_RV: Array) -> tuple[list[int], list[float]]:
        """A token for each request, and its log-probability."""
        place_R = self._place_R + self.number
        logit_RV = jnp.where(self._is_token_V, logit_RV, -jnp.inf)
        tokens, logprobs, self._seen_RV = _draw(
            self._seed_R, place_R, self._seen_RV, logit_RV, self._wishes
        )
        self.number += 1
        return np.asarray(tokens).tolist(), np.asarray(logprobs).tolist()

    def keep(self, places: Sequence[int]) -> None:
        """Goes on with the requests at these places alone."""
        rows = np.asarray(places, np.int64)
        kept = self._wishes, self._seed_R, self._place_R, self._seen_RV
        kept = jax.tree.map(lambda x: x[rows], kept)
        self._wishes, self._seed_R, self._place_R, self._seen_RV = kept
