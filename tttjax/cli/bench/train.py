"""Compile time, step time and memory of the train steps of several configurations, in one run.

  tttjax bench train --config=mid_size:ttt_e2e --config=mid_size:full

All steps are compiled first, then run in turn, round after round, so that a busy machine slows all
alike; times are medians over the rounds, on random tokens. The ratio is to the last configuration.
With --lengths all that is done for sequences of each of these lengths, one after the other:

  tttjax bench train --lengths 1024,4096 --config=mid_size:mamba2 \\
      --config=mid_size:window --config=mid_size:full
"""

import argparse
import json
from dataclasses import asdict

from tttjax.benchmarks.train import bench_train, table
from tttjax.cli.bench.options import add_configs, add_measuring, load_configs
from tttjax.config.values import parse_value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax bench train`."""
    add = parser.add_argument
    add_configs(parser)
    add(
        "--lengths",
        default="",
        metavar="T,T,...",
        help="tokens of a sequence, instead of train.seq_len; the configurations are compared at "
        "each",
    )
    add_measuring(parser, "measured steps of each")


def run(args: argparse.Namespace) -> int:
    """`tttjax bench train` from parsed arguments; the exit code."""
    lengths = [parse_value("train.seq_len", word) for word in args.lengths.split(",") if word]
    results = []
    for length in lengths or [0]:
        overrides = args.overrides + ([f"--config.train.seq_len={length}"] if length else [])
        configs = load_configs(args.config, overrides)
        found = bench_train(configs, args.rounds)
        if not args.json:
            print(table(found), flush=True)
        results += found
    if args.json:
        print(json.dumps([asdict(result) for result in results]))
    return 0
