"""How everything here is measured: compiled programs in turn, round after round, and medians.

So a machine that is busy for a while slows all programs alike, and their ratios stay.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax

from tttjax.errors import UserError

Key = TypeVar("Key", bound=Hashable)


def median_seconds(runs: Mapping[Key, Callable[[], Any]], rounds: int) -> dict[Key, float]:
    """The median time of each run over `rounds` rounds; a first round warms caches.

    A run returns what has to be ready for it to be over. Raises UserError for no rounds.
    """
    check_rounds(rounds)
    seconds: dict[Key, list[float]] = {key: [] for key in runs}
    for _ in range(rounds + 1):
        for key, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[key].append(time.perf_counter() - start)
    return {key: statistics.median(times[1:]) for key, times in seconds.items()}


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
