"""Many prompts in one run, read together where they stand at the same place, written together."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tttjax.data.streams import clean_text, read_text
from tttjax.errors import UserError
from tttjax.inference.engine import Session
from tttjax.inference.generator import GeneratedToken, Generator, Request
from tttjax.inference.sampling import Sampling
from tttjax.runs.load import LoadedModel


def read_prompts(path: str) -> list[str]:
    """A prompt a line, as a JSON string or an object with "prompt"; empty lines are skipped.

    Raises UserError, with the line, for anything else.
    """
    prompts = []
    # Not splitlines: JSON strings may hold other characters that it takes for ends of lines.
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
                f"{path}, line {number}, has no prompt: it must be a JSON string, or an object "
                f'with one as "prompt", and not empty'
            )
        prompts.append(clean_text(prompt, f"{path}, line {number}: the prompt"))
    if not prompts:
        raise UserError(f"{path} has no prompts in it")
    return prompts


def generate_all(
    opened: LoadedModel,
    session: Session,
    prompts: Sequence[np.ndarray],
    requests: Sequence[tuple[Sampling, int, tuple[str, ...], int]],
    *,
    batch: int,
    learn: bool,
) -> Iterator[dict[str, Any]]:
    """The texts that follow each prompt, in order, as what `to_record` makes of them.

    requests: of every prompt, (sampling, most tokens, stop strings, seed). batch: texts written
    together, at the least those of one prompt.
    """
    size = max(1, batch // len(requests))
    for first in range(0, len(prompts), size):
        part = prompts[first : first + size]
        read = opened.engine.read_batch([session] * len(part), part)
        asked = [
            Request(begun, *request, prompt_T)
            for (begun, _), prompt_T in zip(read, part, strict=True)
            for request in requests
        ]
        pieces: list[list[GeneratedToken]] = [[] for _ in asked]
        for piece in Generator(opened.engine, opened.tokenizer, asked, learn=learn):
            pieces[piece.request].append(piece)
        for i, text in enumerate(pieces):
            prompt, sample = divmod(i, len(requests))
            yield {"prompt": first + prompt, "sample": sample, **to_record(text)}


def to_record(pieces: Sequence[GeneratedToken]) -> dict[str, Any]:
    """A text that was written: itself, its tokens, their log-probabilities, and why it ended."""
    return {
        "text": "".join(piece.text for piece in pieces),
        "tokens": [piece.token for piece in pieces],
        "logprobs": [piece.logprob for piece in pieces],
        "finished": pieces[-1].finished,
    }
