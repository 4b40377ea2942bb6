"""Prompts of an exact number of tokens, with a needle at a known position.

RULER's single-needle tasks (Hsieh et al. 2024, arXiv 2404.06654): one sentence of a long text holds
a value, and the question after the text asks for it. A prompt is

    BOS  introduction  haystack ... needle ... haystack  question

The haystack fills the prompt to the requested length, with the needle between two sentences. The
text is tokenized as a whole, then excess tokens are dropped from the start of the haystack.
"""

import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tttjax.data.tokenizers.base import Tokenizer
from tttjax.errors import UserError
from tttjax.evaluation.needle.haystack import LONGEST_SENTENCE, Haystack
from tttjax.evaluation.needle.tasks import NeedleTask

INTRODUCTION = "A special magic {kind} is hidden in the text below. Remember it.\n"
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
QUESTION = (
    "\nWhat is the special magic {kind} for {key} in the text above? "
    "The special magic {kind} for {key} is:"
)
LEAST_HAYSTACK = 16  # tokens
FIRST = (
    "amber bold calm dusty early faint gentle hollow iron jolly keen loud misty noble pale quiet"
)
SECOND = "anchor basket candle door engine feather garden hammer island jacket kettle ladder mirror"
FIRST_WORDS, SECOND_WORDS = FIRST.split(), SECOND.split()


@dataclass(frozen=True)
class PromptSpec:
    """Determines a prompt, together with seed, haystack and tokenizer.

    length: tokens of the prompt. depth: fraction of the haystack before the needle, 0 to 1.
    number: sample index, from 0.
    """

    task: NeedleTask
    length: int
    depth: float
    number: int


@dataclass(frozen=True)
class Prompt:
    """A needle prompt.

    token_T: int32, the prompt up to the answer. control_T: the same length without the needle.
    needle: token span [start, stop). question: index of its first token. answer_A: tokens of the
    value as a continuation of the prompt. decoy_A: those of another random value that is not in
    the prompt.
    """

    spec: PromptSpec
    token_T: np.ndarray
    control_T: np.ndarray
    needle: tuple[int, int]
    question: int
    value: str
    answer_A: np.ndarray
    decoy_A: np.ndarray

    @property
    def distance(self) -> int:
        """Tokens between the needle and the question."""
        return self.question - self.needle[1]

    def region(self, window: int) -> str:
        """Position of the needle relative to attention over `window` tokens (query included).

        "inside": every query that predicts an answer token attends to the whole needle.
        "outside": from the question on, no query attends to any of it. "edge": neither.
        window=0: no window, always inside.
        """
        last_query = len(self.token_T) + len(self.answer_A) - 2
        if not window or self.needle[0] > last_query - window:
            return "inside"
        return "outside" if self.needle[1] - 1 <= self.question - window else "edge"


def make_prompt(spec: PromptSpec, haystack: Haystack, seed: int) -> Prompt:
    """The prompt of a spec; deterministic, and independent of other prompts.

    Raises UserError if the length is too short for a haystack.
    """
    rng, tokenizer = _generator(spec, seed), haystack.tokenizer
    key = f"{rng.choice(FIRST_WORDS)}-{rng.choice(SECOND_WORDS)}"
    value = decoy = draw_value(spec.task, rng)
    while decoy == value:
        decoy = draw_value(spec.task, rng)
    words = {"kind": spec.task.kind, "key": key, "value": value}
    needle, question = NEEDLE.format(**words), QUESTION.format(**words)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    head_T = np.concatenate((begin, tokenizer.encode(INTRODUCTION.format(**words))))
    used = len(head_T) + len(tokenizer.encode(" " + needle + question))
    haystack_length = spec.length - used
    if haystack_length < LEAST_HAYSTACK:
        raise UserError(
            f"a context of {spec.length} tokens is too short for the task {spec.task.name}, whose"
            f" needle and question alone take {used}; give --context-lengths of at least "
            f"{used + 2 * LEAST_HAYSTACK}"
        )
    first = int(rng.integers(len(haystack.sentences)))
    after = haystack.after(first, round((1 - spec.depth) * haystack_length))
    body_T, span = _insert_needle(
        needle, question, first, after, haystack, spec.length - len(head_T)
    )
    start, stop = (len(head_T) + at for at in span)
    token_T = np.concatenate((head_T, body_T)).astype(np.int32)
    question_span = _find(tokenizer, token_T, question.strip())
    if question_span is None:
        raise _lossy_tokenizer(tokenizer, question.strip())
    # The control replaces the needle by the next sentences of the haystack.
    more = haystack.after(first + len(after), 2 * (stop - start) + 4 * LONGEST_SENTENCE)
    filler_T = tokenizer.encode(" " + " ".join(more))[: stop - start]
    return Prompt(
        spec=spec,
        token_T=token_T,
        control_T=np.concatenate((token_T[:start], filler_T, token_T[stop:])).astype(np.int32),
        needle=(start, stop),
        question=question_span[0],
        value=value,
        answer_A=_after(tokenizer, question, " " + value),
        decoy_A=_after(tokenizer, question, " " + decoy),
    )


def draw_value(task: NeedleTask, rng: np.random.Generator) -> str:
    """A number of seven digits, or a random UUID."""
    if task.kind == "number":
        return str(rng.integers(10**6, 10**7))
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def check_tokenizer(tokenizer: Tokenizer, tasks: list[NeedleTask]) -> None:
    """Raises UserError if decoding does not restore needles: answers could not be recognised."""
    for task in tasks:
        value = draw_value(task, np.random.default_rng(0))
        needle = NEEDLE.format(
            kind=task.kind, key=f"{FIRST_WORDS[0]}-{SECOND_WORDS[0]}", value=value
        )
        if needle not in tokenizer.decode(tokenizer.encode(needle)):
            raise _lossy_tokenizer(tokenizer, needle)


def _lossy_tokenizer(tokenizer: Tokenizer, text: str) -> UserError:
    back = tokenizer.decode(tokenizer.encode(text))
    return UserError(
        f"the tokenizer does not keep the text of the task: {text!r} decodes as {back!r}; needle "
        "tests need another tokenizer"
    )


def _generator(spec: PromptSpec, seed: int) -> np.random.Generator:
    name = zlib.crc32(spec.task.name.encode())
    return np.random.default_rng([seed, name, spec.length, round(1e6 * spec.depth), spec.number])


def _insert_needle(
    needle: str,
    question: str,
    first: int,
    after: list[str],
    haystack: Haystack,
    length: int,
) -> tuple[np.ndarray, tuple[int, int]]:
    """(`length` tokens of haystack, needle and question; token span of the needle)."""
    tokenizer = haystack.tokenizer
    while True:
        ending = " ".join([needle, *after]) + question
        before = length - len(tokenizer.encode(ending))
        if before >= 0:
            body_T = _fill(ending, first, before, haystack, length)
            span = _find(tokenizer, body_T, needle)
            if span is not None:
                return body_T, span
        if not after:
            raise _lossy_tokenizer(tokenizer, needle)
        after = after[:-1]  # joined they have more tokens than one by one


def _fill(ending: str, first: int, before: int, haystack: Haystack, length: int) -> np.ndarray:
    """`length` tokens that end with `ending`, which is `before` tokens shorter."""
    tokens = before
    while True:
        text = " ".join([*haystack.before(first, tokens), ending])
        body_T = haystack.tokenizer.encode(text)
        if len(body_T) >= length:
            return body_T[len(body_T) - length :]
        tokens += length - len(body_T)  # joined they have fewer tokens than one by one


def _after(tokenizer: Tokenizer, text: str, more: str) -> np.ndarray:
    """Tokens of `more` as a continuation of `text`."""
    text_T, both_T = tokenizer.encode(text), tokenizer.encode(text + more)
    if np.array_equal(both_T[: len(text_T)], text_T):
        return both_T[len(text_T) :]
    return tokenizer.encode(more)


def _find(tokenizer: Tokenizer, token_T: np.ndarray, text: str) -> tuple[int, int] | None:
    """Shortest token span [start, stop) whose text contains `text`; None if there is none."""
    max_tokens = len(text.encode()) + 8  # each token has at least one byte

    def holds(start: int, stop: int) -> bool:
        return text in tokenizer.decode(token_T[max(0, start) : stop])

    if not holds(0, len(token_T)):
        return None
    stop = _smallest(lambda low, stop: holds(low - max_tokens, stop), 0, len(token_T))
    back = _smallest(lambda _, back: holds(stop - back, stop), 0, min(max_tokens, stop))
    return stop - back, stop


def _smallest(is_enough: Callable[[int, int], bool], low: int, high: int) -> int:
    """Smallest x in (low, high] with is_enough(low, x), which must hold for `high`."""
    while high - low > 1:
        middle = (low + high) // 2
        if is_enough(low, middle):
            high = middle
        else:
            low = middle
    return high
