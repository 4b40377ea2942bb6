"""Measure train steps: compile time, step time and memory.

  tttjax bench train --config=mid_size:ttt_e2e --config=mid_size:full

All steps are compiled first, then run alternately on random tokens, so that a busy machine affects
all alike; times are medians over the rounds. Ratios are to the last configuration. With --lengths,
this is repeated for each sequence length:

  tttjax bench train --lengths 1024,4096 --config=mid_size:mamba2 \\
      --config=mid_size:window --config=mid_size:full
"""

import argparse
import json
from dataclasses import asdict

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
        help="sequence lengths to compare at (default: train.seq_len)",
    )
    add_measuring(parser, "timed steps of each program")


def run(args: argparse.Namespace) -> int:
    """`tttjax bench train` from parsed arguments; the exit code."""
    from tttjax.benchmarks.train import bench_train, format_table

    lengths = [parse_value("train.seq_len", word) for word in args.lengths.split(",") if word]
    results = []
    for length in lengths or [0]:
        overrides = args.overrides + ([f"--config.train.seq_len={length}"] if length else [])
        configs = load_configs(args.config, overrides)
        rows = bench_train(configs, args.rounds)
        if not args.json:
            print(format_table(rows), flush=True)
        results += rows
    if args.json:
        print(json.dumps([asdict(result) for result in results]))
    return 0
