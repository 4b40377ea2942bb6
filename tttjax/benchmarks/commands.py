"""Benchmark of whole commands, run alternately."""

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tttjax.benchmarks.timing import check_rounds
from tttjax.errors import UserError

OUT = "{out}"
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss


@dataclass(frozen=True)
class Figure:
    """One figure of a command. ratios: per round, to the first command.

    number: of the command, from 1.
    """

    number: int
    command: str
    name: str
    median: float
    ratio: float
    ratios: tuple[float, ...]


def bench_commands(
    commands: Sequence[str],
    rounds: int = 5,
    figures: str = "",
    log: Callable[[str], object] | None = None,
) -> list[Figure]:
    """Runs the commands alternately and compares time, memory and other figures.

    Arguments:
      commands: split like shell words, run without a shell. `{out}` is replaced by a new folder
        for each run.
      figures: "FILE:KEY,KEY": numbers of a JSON file that every run writes, besides wall_seconds,
        cpu_seconds and peak_bytes (of the largest process).
      log: called with a line after each run.

    Raises:
      UserError: no rounds, fewer than two commands, a command that fails or cannot be started, a
        figure that is missing or not a positive number.
    """
    check_rounds(rounds)
    if len(commands) < 2:
        raise UserError("give at least two commands, each in quotes")
    split = [_split(command) for command in commands]
    path, _, keys = figures.rpartition(":")
    if figures and not (path and keys):
        raise UserError(f"--figures={figures} must be FILE:KEY,KEY")
    values_of: list[list[dict[str, float]]] = [[] for _ in commands]
    for number in range(rounds + 1):
        for i, command in enumerate(commands):
            values = _run(command, split[i], path, keys.split(",") if keys else [])
            if number:
                values_of[i].append(values)
            if log:
                label = f"round {number} of {rounds}" if number else "warm-up"
                log(f"{label}, command {i + 1}: {values['wall_seconds']:.1f} s")
    return [
        _figure(number, command, name, runs, values_of[0])
        for number, (command, runs) in enumerate(zip(commands, values_of, strict=True), start=1)
        for name in runs[0]
    ]


def _figure(
    number: int,
    command: str,
    name: str,
    runs: list[dict[str, float]],
    first: list[dict[str, float]],
) -> Figure:
    values = [run[name] for run in runs]
    ratios = tuple(a / b[name] for a, b in zip(values, first, strict=True))
    return Figure(
        number, command, name, statistics.median(values), statistics.median(ratios), ratios
    )


def _split(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"`{command}` cannot be split into words: {error}") from error
    if not words:
        raise UserError("a command is empty")
    return words


def _run(command: str, words: Sequence[str], path: str, keys: Sequence[str]) -> dict[str, float]:
    """Runs one command to its end and returns its figures by name."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as output:
        arguments = [word.replace(OUT, f"{folder}/out") for word in words]
        start = time.perf_counter()
        try:
            process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        except OSError as error:
            raise UserError(f"`{command}` cannot be started: {error.strerror}") from error
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            last = (output.read().strip().splitlines() or ["no output"])[-1]
            raise UserError(f"`{command}` ended with exit code {process.returncode}: {last}")
        return {
            "wall_seconds": seconds,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_bytes": float(usage.ru_maxrss * MAXRSS_BYTES),
            **_read_figures(Path(path.replace(OUT, f"{folder}/out")), keys),
        }


def _read_figures(path: Path, keys: Sequence[str]) -> dict[str, float]:
    if not keys:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        values = {key: float(content[key]) for key in keys}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path.name} of a run has no numbers {', '.join(keys)}: {error}"
        ) from error
    if not all(value > 0 for value in values.values()):
        raise UserError(f"{path.name} of a run has figures that are not positive: {values}")
    return values


def format_table(results: Sequence[Figure]) -> str:
    """The results as a text table, grouped by figure."""
    names = list(dict.fromkeys(result.name for result in results))
    lines = [f"{r.number}: {r.command}" for r in results if r.name == names[0]]
    lines.append(f"{'':20}    {'median':>14}  {'ratio':>6}  {'smallest':>8}  {'largest':>8}")
    for name in names:
        for result in (result for result in results if result.name == name):
            lines.append(
                f"{name:20}  {result.number} {result.median:14,.4g}  "
                f"{result.ratio:6.3f}  {min(result.ratios):8.3f}  {max(result.ratios):8.3f}"
            )
    return "\n".join(lines)
