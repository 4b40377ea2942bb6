"""Writing token by token: time of a token by what was read before, for any systems and batches.

  tttjax bench decode --read=1024,4096,16384,65536 --batch=1,8,32 \\
      --config=mid_size:ttt_e2e --config=mid_size:full

Random weights read so many random tokens; then R requests go on from there together, a token each,
for as long as a chunk of the inner loop, which ends with its update (128 tokens where nothing is
learned). Full attention has room for just what is read and written. All are run in turn, round
after round, each from its own place; times are medians over steps and rounds.
"""

import argparse
import json
from dataclasses import asdict

from tttjax.benchmarks.decode import _table, bench_decode
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
        help="before (default %(default)s)",
    )
    add(
        "--batch",
        type=list_of(int32),
        default="1",
        metavar="R,R,...",
        help="requests together (default %(default)s)",
    )
    add_measuring(parser, "measured rounds of each")


def run(args: argparse.Namespace) -> int:
    """`tttjax bench decode` from parsed arguments; the exit code."""
    configs = load_configs(args.config, args.overrides)
    results = bench_decode(configs, args.read, args.batch, args.rounds)
    print(json.dumps([asdict(result) for result in results]) if args.json else _table(results))
    return 0
