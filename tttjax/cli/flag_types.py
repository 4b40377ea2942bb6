"""Types of command-line flags for argparse's `type=`: 32-bit numbers, and lists."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import Any

from tttjax.config.limits import (
    FLOAT_WORDS,
    INT_MAX,
    INT_MIN,
    INT_WORDS,
    SEED_MAX,
    fits_float,
    read_number,
)


def int32(text: str) -> int:
    """An int32, in decimal notation."""
    return _integer_between(text, INT_MIN, INT_MAX)


def uint32(text: str) -> int:
    """A uint32, in decimal notation."""
    return _integer_between(text, 0, SEED_MAX)


def float32(text: str) -> float:
    """A finite, normal float32, or 0."""
    value = read_number(text)
    if value is None or not fits_float(value):
        raise ArgumentTypeError(f"{text!r} must be {FLOAT_WORDS}")
    return float(value)


def list_of(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Comma-separated values."""

    def parse(text: str) -> tuple[Any, ...]:
        return tuple(kind(word.strip()) for word in text.split(",") if word.strip())

    parse.__name__ = f"list of {kind.__name__}"  # for argparse errors
    return parse


def _integer_between(text: str, low: int, high: int) -> int:
    value = read_number(text)
    if not isinstance(value, int) or not low <= value <= high:
        raise ArgumentTypeError(f"{text!r} must be {INT_WORDS} from {low} to {high}")
    return value
