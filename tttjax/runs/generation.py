"""Batched generation from a list of prompts."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tttjax.data.streams import clean_text, read_text
from tttjax.errors import UserError
from tttjax.inference.engine import Session
from tttjax.inference.generator import GeneratedToken, Generator, Request
from tttjax.inference.options import Sampling
from tttjax.runs.load import LoadedModel


def read_prompts(path: str) -> list[str]:
    """The prompts of a JSON Lines file: a string a line, or an object with "prompt".

    Empty lines are skipped. Raises UserError, with the line number, for anything else.
    """
    prompts = []
    # Not splitlines: it also splits at characters that JSON strings may hold, such as U+2028.
    lines = read_text(path).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}, is not JSON ({error}).") from error
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, str) or not prompt:
            raise UserError(
                f"{path}, line {number}, has no prompt: write a non-empty JSON string, or an "
                'object with "prompt"'
            )
        prompts.append(clean_text(prompt, f"{path}, line {number}: the prompt"))
    if not prompts:
        raise UserError(f"{path} has no prompts in it")
    return prompts


def generate_all(
    loaded: LoadedModel,
    session: Session,
    prompts: Sequence[np.ndarray],
    requests: Sequence[tuple[Sampling, int, tuple[str, ...], int]],
    *,
    batch: int,
    learn: bool,
) -> Iterator[dict[str, Any]]:
    """The continuations of each prompt, in order, as records for JSON (`to_record`).

    requests: for every prompt, (sampling, max_tokens, stop strings, seed). batch: batch size; all
    samples of one prompt are always in one batch.
    """
    size = max(1, batch // len(requests))
    for first in range(0, len(prompts), size):
        part = prompts[first : first + size]
        prefilled = loaded.engine.read_batch([session] * len(part), part)
        batch_requests = [
            Request(prompt_session, *request, prompt_T)
            for (prompt_session, _), prompt_T in zip(prefilled, part, strict=True)
            for request in requests
        ]
        texts: list[list[GeneratedToken]] = [[] for _ in batch_requests]
        for token in Generator(loaded.engine, loaded.tokenizer, batch_requests, learn=learn):
            texts[token.request].append(token)
        for i, text in enumerate(texts):
            prompt, sample = divmod(i, len(requests))
            yield {"prompt": first + prompt, "sample": sample, **to_record(text)}


def to_record(tokens: Sequence[GeneratedToken]) -> dict[str, Any]:
    """A generated text: text, tokens, log-probabilities, and the reason it ended."""
    return {
        "text": "".join(token.text for token in tokens),
        "tokens": [token.token for token in tokens],
        "logprobs": [token.logprob for token in tokens],
        "finished": tokens[-1].finish_reason,
    }
