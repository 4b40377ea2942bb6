"""Measurement: compiled programs run alternately, round after round; results are medians.

A machine that is busy for a while slows all programs alike, so their ratios stay.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any, TypeVar

import jax

from tttjax.errors import UserError, is_out_of_memory

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


def median_seconds(runs: Mapping[Key, Callable[[], Any]], rounds: int) -> dict[Key, float]:
    """The median time of each run over `rounds` rounds, after a first round to warm caches.

    A run returns the arrays to wait for. Runs that exceed the device's memory are omitted.
    Raises UserError for no rounds.
    """
    check_rounds(rounds)
    seconds: dict[Key, list[float]] = {key: [] for key in runs}
    for _ in range(rounds + 1):
        for key in list(seconds):
            start = time.perf_counter()
            if none_if_out_of_memory(partial(_finish, runs[key])):
                seconds[key].append(time.perf_counter() - start)
            else:
                del seconds[key]
    return {key: statistics.median(times[1:]) for key, times in seconds.items()}


def _finish(run: Callable[[], Any]) -> bool:
    jax.block_until_ready(run())
    return True


def none_if_out_of_memory(make: Callable[[], Result]) -> Result | None:
    """The result of `make`; None if it exceeds the device's memory."""
    try:
        return make()
    except RuntimeError as error:
        if is_out_of_memory(error):
            return None
        raise


def quotient(a: float | None, b: float | None) -> float | None:
    """a / b; None if one of them was not measured."""
    return None if a is None or b is None else a / b


def cell(value: float | None, fmt: str, scale: float = 1) -> str:
    """A table cell: `value` times `scale` in this format; for None a dash of the same width."""
    if value is None:
        return "-".rjust(len(format(0.0, fmt)))
    return format(scale * value, fmt)


def check_rounds(rounds: int) -> None:
    """Raises UserError for no rounds. Call it before compiling."""
    if rounds < 1:
        raise UserError(f"rounds={rounds} must be at least 1.")


def temporary_bytes(program: Any) -> int | None:
    """Peak temporary memory of a compiled program on one device, without arguments and outputs.

    As the compiler reports it; None if it does not.
    """
    analysis = program.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def peak_bytes(program: Any) -> int | None:
    """Peak memory of a compiled program on one device; donated buffers count once."""
    analysis = program.memory_analysis()
    if analysis is None:
        return None
    return (
        analysis.argument_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
    )


def mebibytes(size: int | None, digits: int = 0) -> str:
    """A table cell in MiB."""
    return "?" if size is None else f"{size / 2**20:,.{digits}f}"
