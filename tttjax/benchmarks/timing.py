"""How everything here is measured: compiled programs in turn, round after round, and medians.

So a machine that is busy for a while slows all programs alike, and their ratios stay.
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
    """The median time of each run over `rounds` rounds; a first round warms caches.

    A run returns what has to be ready for it to be over; one for which the device's memory turns
    out to be too small is not in the result. Raises UserError for no rounds.
    """
    check_rounds(rounds)
    seconds: dict[Key, list[float]] = {key: [] for key in runs}
    for _ in range(rounds + 1):
        for key in list(seconds):
            start = time.perf_counter()
            if if_it_fits(partial(_finish, runs[key])):
                seconds[key].append(time.perf_counter() - start)
            else:
                del seconds[key]
    return {key: statistics.median(times[1:]) for key, times in seconds.items()}


def _finish(run: Callable[[], Any]) -> bool:
    jax.block_until_ready(run())
    return True


def if_it_fits(make: Callable[[], Result]) -> Result | None:
    """What `make` gives; None if the device's memory is too small for it."""
    try:
        return make()
    except RuntimeError as error:
        if is_out_of_memory(error):
            return None
        raise


def quotient(a: float | None, b: float | None) -> float | None:
    """a / b; None where one of them was not measured."""
    return None if a is None or b is None else a / b


def cell(value: float | None, layout: str, scale: float = 1) -> str:
    """For a table: `value` times `scale` in this layout; a dash in as many columns for None."""
    if value is None:
        return "-".rjust(len(format(0.0, layout)))
    return format(scale * value, layout)


def check_rounds(rounds: int) -> None:
    """Raises UserError for no rounds: asked for before programs are compiled."""
    if rounds < 1:
        raise UserError(f"rounds={rounds} must be at least 1.")


def temporary_bytes(program: Any) -> int | None:
    """What a compiled program holds at its peak besides arguments and results, on one device.

    By the compiler's own account; None where it gives none.
    """
    analysis = program.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def held_bytes(program: Any) -> int | None:
    """What a compiled program holds at its peak, on one device; donated buffers count once."""
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
    """For a table."""
    return "?" if size is None else f"{size / 2**20:,.{digits}f}"
