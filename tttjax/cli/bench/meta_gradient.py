"""Measure the train step with both forms of the meta-gradient, against static models.

  tttjax bench meta-gradient --config=mid_size

Four train steps: the configuration with the fast and with the reference form of the meta-gradient,
and models with window and with full attention only, whose MLPs are widened to the same number of
parameters. Prints time, FLOPs of the matrix products (of the traced program) and memory (as the
compiler reports it); ratios are to full attention. All steps are compiled first, then run
alternately; times are medians.
"""

import argparse
import json
from dataclasses import asdict

from tttjax.cli.bench.options import add_measuring
from tttjax.config import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax bench meta-gradient`."""
    add = parser.add_argument
    add("--config", required=True, metavar="FILE.py[:ARG]", help="recipe with fast MLPs")
    add_measuring(parser, "timed steps of each program")


def run(args: argparse.Namespace) -> int:
    """`tttjax bench meta-gradient` from parsed arguments; the exit code."""
    from tttjax.benchmarks.meta_gradient import bench_meta_gradient, format_form_ratios
    from tttjax.benchmarks.train import format_table

    results = bench_meta_gradient(load_config(args.config, args.overrides), args.rounds)
    if args.json:
        print(json.dumps([asdict(result) for result in results]))
        return 0
    print(format_table(results))
    print(format_form_ratios(results))
    return 0
