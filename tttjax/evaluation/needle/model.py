"""Runs needle prompts on a model: generates answers and scores their likelihood."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tttjax.data.tokenizers.base import Tokenizer
from tttjax.evaluation.needle.prompts import Prompt
from tttjax.inference.engine import Engine
from tttjax.inference.generator import Generator, Request
from tttjax.inference.options import Sampling
from tttjax.inference.prefill import make_inference_model
from tttjax.inference.scoring import Score, score_batch
from tttjax.inference.session import Session
from tttjax.runs.eval_setup import EvalSetup

MORE_TOKENS = 16  # generated beyond the length of the value
LONGEST_VALUE = 64  # tokens; a UUID has 36 characters


@dataclass(frozen=True)
class Likelihood:
    """Likelihood of a value after a prompt, with teacher forcing.

    logprob: nats per token, at most 0. top: fraction of its tokens that were the argmax.
    """

    logprob: float
    top: float

    @classmethod
    def of(cls, score: Score) -> "Likelihood":
        return cls(-float(np.mean(score.nll_T)), float(np.mean(score.is_top_T)))


@dataclass(frozen=True)
class Answer:
    """A model's answer to a prompt.

    text: greedy continuation. value: likelihood of the correct value. absent: of the same value
    after the prompt without the needle. decoy: of another value after the prompt with the needle.
    """

    text: str
    value: Likelihood
    absent: Likelihood
    decoy: Likelihood


NeedleModel = Callable[[Sequence[Prompt]], list[Answer]]


class EngineModel:
    """Answers batches of prompts with the engine of an eval setup."""

    def __init__(self, setup: EvalSetup, tokenizer: Tokenizer, longest: int):
        """longest: tokens of the longest prompt; sets the capacity of full attention."""
        inference_model = make_inference_model(
            setup.model, setup.inner, setup.lr, learn=setup.learn
        )
        self._engine = Engine(inference_model, setup.params, longest + LONGEST_VALUE + MORE_TOKENS)
        self._tokenizer = tokenizer

    def __call__(self, prompts: Sequence[Prompt]) -> list[Answer]:
        engine = self._engine
        # The prefix before the needle is prefilled once for both prompts, with and without needle.
        starts = [prompt.needle[0] for prompt in prompts]
        prefixes = [prompt.token_T[:at] for prompt, at in zip(prompts, starts, strict=True)]
        prefix_sessions = self._prefill([engine.start() for _ in prompts], prefixes)
        suffixes = [prompt.control_T[at:] for prompt, at in zip(prompts, starts, strict=True)]
        answers_A = [prompt.answer_A for prompt in prompts]
        absent = score_batch(engine, self._prefill(prefix_sessions, suffixes), answers_A)
        suffixes = [prompt.token_T[at:] for prompt, at in zip(prompts, starts, strict=True)]
        prompt_sessions = self._prefill(prefix_sessions, suffixes)
        del prefix_sessions
        value = score_batch(engine, prompt_sessions, answers_A)
        decoy = score_batch(engine, prompt_sessions, [prompt.decoy_A for prompt in prompts])
        texts = self._generate(prompt_sessions, answers_A)
        return [
            Answer(text, *map(Likelihood.of, scores))
            for text, *scores in zip(texts, value, absent, decoy, strict=True)
        ]

    def _prefill(self, sessions: Sequence[Session], texts: Sequence[np.ndarray]) -> list[Session]:
        return [session for session, _ in self._engine.read_batch(sessions, texts)]

    def _generate(self, sessions: Sequence[Session], answers: Sequence[np.ndarray]) -> list[str]:
        requests = [
            Request(session, Sampling(temperature=0), len(answer_A) + MORE_TOKENS)
            for session, answer_A in zip(sessions, answers, strict=True)
        ]
        texts = [""] * len(requests)
        for piece in Generator(self._engine, self._tokenizer, requests):
            texts[piece.request] += piece.text
        return texts
