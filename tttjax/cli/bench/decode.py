"""Measure decoding: time per token by context length and batch size.

  tttjax bench decode --read=1024,4096,16384,65536 --batch=1,8,32 \\
      --config=mid_size:ttt_e2e --config=mid_size:full

Models with random weights prefill random tokens, then decode as many tokens as a chunk of the inner
loop, including its update (128 tokens without an inner loop). The KV cache of full attention has
just the capacity it needs. Configurations run alternately; times are medians over steps and rounds.
"""

import argparse
import json
from dataclasses import asdict

from tttjax.cli.bench.options import add_configs, add_measuring, load_configs
from tttjax.cli.flag_types import int32, list_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax bench decode`."""
    add = parser.add_argument
    add_configs(parser)
    add(
        "--read",
        type=list_of(int32),
        default="1024,4096",
        metavar="T,T,...",
        help="prefilled tokens (default: %(default)s)",
    )
    add(
        "--batch",
        type=list_of(int32),
        default="1",
        metavar="R,R,...",
        help="batch sizes (default: %(default)s)",
    )
    add_measuring(parser, "timed rounds")


def run(args: argparse.Namespace) -> int:
    """`tttjax bench decode` from parsed arguments; the exit code."""
    from tttjax.benchmarks.decode import bench_decode, format_table

    configs = load_configs(args.config, args.overrides)
    results = bench_decode(configs, args.read, args.batch, args.rounds)
    print(
        json.dumps([asdict(result) for result in results]) if args.json else format_table(results)
    )
    return 0
