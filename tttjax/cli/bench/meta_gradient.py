"""The train step with both forms of the outer gradient, against attention alone of the same size.

  tttjax bench meta-gradient --config=mid_size

Four train steps: the configuration's own with the fast and with the reference form of the outer
gradient, and window and full attention alone, with MLPs so much wider that all have as many
parameters. Time, FLOPs of the matrix products (from the traced program) and memory, by the
compiler's account; ratios are to full attention. All steps are compiled first, then run in turn,
round after round; times are medians.
"""

import argparse
import json
from dataclasses import asdict

from tttjax.benchmarks.meta_gradient import _to_the_reference, bench_meta_gradient
from tttjax.benchmarks.train import table
from tttjax.cli.bench.options import add_measuring
from tttjax.config import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax bench meta-gradient`."""
    add = parser.add_argument
    add("--config", required=True, metavar="FILE.py[:ARG]", help="a configuration that learns")
    add_measuring(parser, "measured steps of each")


def run(args: argparse.Namespace) -> int:
    """`tttjax bench meta-gradient` from parsed arguments; the exit code."""
    results = bench_meta_gradient(load_config(args.config, args.overrides), args.rounds)
    if args.json:
        print(json.dumps([asdict(result) for result in results]))
        return 0
    print(table(results))
    print(_to_the_reference(results))
    return 0
