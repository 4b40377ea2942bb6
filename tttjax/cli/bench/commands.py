"""Time whole programs against each other: two checkouts, or any other commands.

  tttjax bench commands \\
      'env PYTHONPATH=../before python -m tttjax train --config=tiny.py --workdir={out}' \\
      'env PYTHONPATH=. python -m tttjax train --config=tiny.py --workdir={out}' \\
      --figures={out}/summary.json:step_seconds,first_step_seconds

The commands run in turn, round after round, so that a busy machine slows all alike; a first round
warms caches and is not counted. {out} is a folder of its own for each run, removed afterwards.
Besides time and memory of the process, --figures reads numbers from a JSON file that each run
writes. Printed are medians over the rounds and, to the first command, the median of the ratios of
each round with the smallest and the largest of them.
"""

import argparse
import json
from dataclasses import asdict

from tttjax.benchmarks.commands import _log, bench_commands, table
from tttjax.cli.bench.options import add_measuring


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax bench commands`."""
    add = parser.add_argument
    add("commands", nargs="+", metavar="COMMAND", help="a whole command line, in quotes")
    add(
        "--figures",
        default="",
        metavar="FILE:KEY,KEY",
        help="numbers to compare from a JSON file that each run writes, such as "
        "{out}/summary.json:step_seconds",
    )
    add_measuring(parser, "counted runs of each")


def run(args: argparse.Namespace) -> int:
    """`tttjax bench commands` from parsed arguments; the exit code."""
    results = bench_commands(args.commands, args.rounds, args.figures, log=_log)
    print(json.dumps([asdict(result) for result in results]) if args.json else table(results))
    return 0
