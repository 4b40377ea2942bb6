"""Compare run time and memory of commands, for example of two checkouts.

  tttjax bench commands \\
      'env PYTHONPATH=../before python -m tttjax train --config=tiny.py --workdir={out}' \\
      'env PYTHONPATH=. python -m tttjax train --config=tiny.py --workdir={out}' \\
      --figures={out}/summary.json:step_seconds,first_step_seconds

The commands run alternately, so that a busy machine affects all alike; a first round warms caches
and is not counted. {out} is a new folder for each run, removed afterwards. --figures compares
numbers from a JSON file that each run writes, besides time and memory of the process. The table has
medians over the rounds, and the median, smallest and largest ratio to the first command.
"""

import argparse
import json
import sys
from dataclasses import asdict

from tttjax.cli.bench.options import add_measuring


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax bench commands`."""
    add = parser.add_argument
    add("commands", nargs="+", metavar="COMMAND", help="command line, in quotes")
    add(
        "--figures",
        default="",
        metavar="FILE:KEY,KEY",
        help="numbers from a JSON file that each run writes, such as "
        "{out}/summary.json:step_seconds",
    )
    add_measuring(parser, "timed runs of each command")


def run(args: argparse.Namespace) -> int:
    """`tttjax bench commands` from parsed arguments; the exit code."""
    from tttjax.benchmarks.commands import bench_commands, format_table

    results = bench_commands(args.commands, args.rounds, args.figures, log=_log)
    print(
        json.dumps([asdict(result) for result in results]) if args.json else format_table(results)
    )
    return 0


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
