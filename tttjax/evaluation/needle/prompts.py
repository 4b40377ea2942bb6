"""Prompts of an exact number of tokens, with a needle hidden at a known place.

RULER's single-needle tasks (Hsieh et al. 2024, arXiv 2404.06654): somewhere in a long text there is
one sentence with a value, and after the text it is asked for. A prompt is

    BOS  introduction  haystack ... needle ... haystack  question

The haystack fills it up to the asked length, with the needle between two of its sentences; what
is too much is cut from the haystack's beginning, so that the text is tokenised as a whole.
"""

import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tttjax.data.tokenizers.base import Tokenizer
from tttjax.errors import UserError
from tttjax.evaluation.needle.haystack import LONGEST_SENTENCE, Haystack

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
class NeedleTask:
    """title: RULER's name. in_noise: whether its haystack is noise, whatever text there is."""

    name: str
    title: str
    kind: str
    in_noise: bool = False


TASKS = {
    task.name: task
    for task in (
        NeedleTask("passkey", "S-NIAH-1 (pass-key)", "number", in_noise=True),
        NeedleTask("number", "S-NIAH-2 (number)", "number"),
        NeedleTask("uuid", "S-NIAH-3 (UUID)", "uuid"),
    )
}


@dataclass(frozen=True)
class PromptSpec:
    """Which prompt: fully determines it, together with seed, haystack and tokenizer.

    length: tokens of the prompt. depth: part of the haystack before the needle, from 0 to 1.
    number: of the sample, from 0.
    """

    task: NeedleTask
    length: int
    depth: float
    number: int


@dataclass(frozen=True)
class Prompt:
    """token_T: int32, everything up to the answer. control_T: the same without the needle.

    needle: its first token and the one after its last. question: its first token. answer_A: the
    value's tokens as they go on after the prompt; decoy_A: those of another value, drawn in the
    same way, that occurs nowhere.
    """

    place: PromptSpec
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
        """Where the needle is, for attention over the last `window` tokens, a query's own included.

        "inside": every query that predicts a token of the answer sees all of the needle.
        "outside": from the question on, no query sees any of it. "edge": neither. (0: no window;
        then always inside.)
        """
        last_query = len(self.token_T) + len(self.answer_A) - 2
        if not window or self.needle[0] > last_query - window:
            return "inside"
        return "outside" if self.needle[1] - 1 <= self.question - window else "edge"


def make_prompt(place: PromptSpec, haystack: Haystack, seed: int) -> Prompt:
    """The prompt of a place: the same whenever it is made, and whatever others there are.

    Raises UserError if the length leaves no room for a haystack.
    """
    rng, tokenizer = _generator(place, seed), haystack.tokenizer
    key = f"{rng.choice(FIRST_WORDS)}-{rng.choice(SECOND_WORDS)}"
    value = decoy = draw_value(place.task, rng)
    while decoy == value:
        decoy = draw_value(place.task, rng)
    words = {"kind": place.task.kind, "key": key, "value": value}
    needle, question = NEEDLE.format(**words), QUESTION.format(**words)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    head_T = np.concatenate((begin, tokenizer.encode(INTRODUCTION.format(**words))))
    used = len(head_T) + len(tokenizer.encode(" " + needle + question))
    room = place.length - used
    if room < LEAST_HAYSTACK:
        raise UserError(
            f"a context of {place.length} tokens is too short for the task {place.task.name}, whose"
            f" needle and question alone take {used}; give --context-lengths of at least "
            f"{used + 2 * LEAST_HAYSTACK}"
        )
    first = int(rng.integers(len(haystack.sentences)))
    after = haystack.after(first, round((1 - place.depth) * room))
    body_T, span = _hide(needle, question, first, after, haystack, place.length - len(head_T))
    start, stop = (len(head_T) + at for at in span)
    token_T = np.concatenate((head_T, body_T)).astype(np.int32)
    asked = _find(tokenizer, token_T, question.strip())
    if asked is None:
        raise _unfaithful(tokenizer, question.strip())
    # Instead of the needle, the sentences that would follow the haystack.
    more = haystack.after(first + len(after), 2 * (stop - start) + 4 * LONGEST_SENTENCE)
    filler_T = tokenizer.encode(" " + " ".join(more))[: stop - start]
    return Prompt(
        place=place,
        token_T=token_T,
        control_T=np.concatenate((token_T[:start], filler_T, token_T[stop:])).astype(np.int32),
        needle=(start, stop),
        question=asked[0],
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
    """UserError if it does not give back needles, so that no answer could be recognised."""
    for task in tasks:
        value = draw_value(task, np.random.default_rng(0))
        needle = NEEDLE.format(
            kind=task.kind, key=f"{FIRST_WORDS[0]}-{SECOND_WORDS[0]}", value=value
        )
        if needle not in tokenizer.decode(tokenizer.encode(needle)):
            raise _unfaithful(tokenizer, needle)


def _unfaithful(tokenizer: Tokenizer, text: str) -> UserError:
    back = tokenizer.decode(tokenizer.encode(text))
    return UserError(
        f"the tokenizer does not keep the text of the task: {text!r} comes back as {back!r}, so a "
        "right answer could not be told; needle tests need another tokenizer"
    )


def _generator(place: PromptSpec, seed: int) -> np.random.Generator:
    name = zlib.crc32(place.task.name.encode())
    return np.random.default_rng([seed, name, place.length, round(1e6 * place.depth), place.number])


def _hide(
    needle: str,
    question: str,
    first: int,
    after: list[str],
    haystack: Haystack,
    length: int,
) -> tuple[np.ndarray, tuple[int, int]]:
    """(haystack with needle and question, `length` tokens; first token of the needle, and stop)."""
    tokenizer = haystack.tokenizer
    while True:
        behind = " ".join([needle, *after]) + question
        before = length - len(tokenizer.encode(behind))
        if before >= 0:
            body_T = _fill(behind, first, before, haystack, length)
            span = _find(tokenizer, body_T, needle)
            if span is not None:
                return body_T, span
        if not after:
            raise _unfaithful(tokenizer, needle)
        after = after[:-1]  # together they had more tokens than one by one


def _fill(behind: str, first: int, before: int, haystack: Haystack, length: int) -> np.ndarray:
    """`length` tokens that end with `behind`, which has `before` fewer."""
    wanted = before
    while True:
        text = " ".join([*haystack.before(first, wanted), behind])
        body_T = haystack.tokenizer.encode(text)
        if len(body_T) >= length:
            return body_T[len(body_T) - length :]
        wanted += length - len(body_T)  # together they had fewer tokens than one by one


def _after(tokenizer: Tokenizer, text: str, more: str) -> np.ndarray:
    """Tokens with which `more` goes on after `text`."""
    text_T, both_T = tokenizer.encode(text), tokenizer.encode(text + more)
    if np.array_equal(both_T[: len(text_T)], text_T):
        return both_T[len(text_T) :]
    return tokenizer.encode(more)


def _find(tokenizer: Tokenizer, token_T: np.ndarray, text: str) -> tuple[int, int] | None:
    """The fewest tokens in which `text` stands: the first, and the one after the last."""
    most = len(text.encode()) + 8  # tokens that it can take: each is a byte or more

    def holds(start: int, stop: int) -> bool:
        return text in tokenizer.decode(token_T[max(0, start) : stop])

    if not holds(0, len(token_T)):
        return None
    stop = _first(lambda low, stop: holds(low - most, stop), 0, len(token_T))
    back = _first(lambda _, back: holds(stop - back, stop), 0, min(most, stop))
    return stop - back, stop


def _first(is_enough: Callable[[int, int], bool], low: int, high: int) -> int:
    """The smallest x in (low, high] with is_enough(low, x); high must be."""
    while high - low > 1:
        middle = (low + high) // 2
        if is_enough(low, middle):
            high = middle
        else:
            low = middle
    return high
