"""Asking a model for needles: what it writes, and how likely it found the right answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tttjax.data.tokenizers.base import Tokenizer
from tttjax.evaluation.needle.prompts import Prompt
from tttjax.inference.engine import Engine
from tttjax.inference.generator import Generator, Request
from tttjax.inference.prefill import make_inference_model
from tttjax.inference.sampling import Sampling
from tttjax.inference.scoring import Score, score_batch
from tttjax.inference.session import Session
from tttjax.runs.run import EvalSetup

MORE_TOKENS = 16  # that are written beyond as many as the value has
LONGEST_VALUE = 64  # tokens; a UUID has 36 characters


@dataclass(frozen=True)
class Likelihood:
    """Of a value after a prompt, all its tokens given.

    logprob: nats per token, up to 0. top: part of the tokens that were the likeliest.
    """

    logprob: float
    top: float

    @classmethod
    def of(cls, score: Score) -> "Likelihood":
        return cls(-float(np.mean(score.nll_T)), float(np.mean(score.is_top_T)))


@dataclass(frozen=True)
class Answer:
    """What a model makes of a prompt.

    text: written after it, greedily. value: likelihood of the right value. absent: of the same
    value where there was no needle. decoy: of another value after the prompt with the needle.
    """

    text: str
    value: Likelihood
    absent: Likelihood
    decoy: Likelihood


NeedleModel = Callable[[Sequence[Prompt]], list[Answer]]


class EngineModel:
    """Asks a way of reading, several prompts at a time."""

    def __init__(self, way: EvalSetup, tokenizer: Tokenizer, longest: int):
        """longest: tokens of a prompt, for which full attention needs room."""
        reader = make_inference_model(way.model, way.inner, way.lr, learn=way.learn)
        self._engine = Engine(reader, way.params, longest + LONGEST_VALUE + MORE_TOKENS)
        self._tokenizer = tokenizer

    def __call__(self, prompts: Sequence[Prompt]) -> list[Answer]:
        engine = self._engine
        # What comes before the needle is read once for both prompts, with it and without.
        starts = [prompt.needle[0] for prompt in prompts]
        heads = [prompt.token_T[:at] for prompt, at in zip(prompts, starts, strict=True)]
        begun = self._read([engine.start() for _ in prompts], heads)
        rests = [prompt.control_T[at:] for prompt, at in zip(prompts, starts, strict=True)]
        answers_A = [prompt.answer_A for prompt in prompts]
        absent = score_batch(engine, self._read(begun, rests), answers_A)
        rests = [prompt.token_T[at:] for prompt, at in zip(prompts, starts, strict=True)]
        read = self._read(begun, rests)
        del begun
        value = score_batch(engine, read, answers_A)
        decoy = score_batch(engine, read, [prompt.decoy_A for prompt in prompts])
        texts = self._write(read, answers_A)
        return [
            Answer(text, *map(Likelihood.of, scores))
            for text, *scores in zip(texts, value, absent, decoy, strict=True)
        ]

    def _read(self, sessions: Sequence[Session], texts: Sequence[np.ndarray]) -> list[Session]:
        return [session for session, _ in self._engine.read_batch(sessions, texts)]

    def _write(self, sessions: Sequence[Session], answers: Sequence[np.ndarray]) -> list[str]:
        requests = [
            Request(session, Sampling(temperature=0), len(answer_A) + MORE_TOKENS)
            for session, answer_A in zip(sessions, answers, strict=True)
        ]
        texts = [""] * len(requests)
        for piece in Generator(self._engine, self._tokenizer, requests):
            texts[piece.request] += piece.text
        return texts
