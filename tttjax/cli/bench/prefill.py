"""Reading a prompt: time, memory and size of the state by context length, for any systems.

  tttjax bench prefill --lengths=8192,32768,131072 \\
      --config=paper:125m,ttt_e2e,pretrain \\
      --config=paper:125m,full,pretrain

What is measured is `inference.prefill` with random weights: all tokens are read, a system with fast
weights learns from every whole chunk, and the logits of the last token come out. Ratios are to the
last configuration. All programs of a length are compiled first, then run in turn, round after
round; times are medians. What does not fit into the device's memory is left blank (null in JSON),
the rest goes on. All mixers: `--config=mid_size:*`, or
`--config=paper:125m,*,pretrain` at one of the paper's sizes.
"""

import argparse
import json
from dataclasses import asdict

import jax

from tttjax.benchmarks.prefill import CPU_LENGTHS, LENGTHS, _table, _words, bench_prefill
from tttjax.cli.bench.options import add_configs, add_measuring, load_configs
from tttjax.cli.flag_types import int32, list_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax bench prefill`."""
    add = parser.add_argument
    add_configs(parser)
    add(
        "--lengths",
        type=list_of(int32),
        default=(),
        metavar="T,T,...",
        help=f"tokens read (default {_words(CPU_LENGTHS)} on a CPU, else {_words(LENGTHS)})",
    )
    add("--batch", type=int32, default=1, help="prompts read together (default %(default)s)")
    add_measuring(parser, "measured runs of each")


def run(args: argparse.Namespace) -> int:
    """`tttjax bench prefill` from parsed arguments; the exit code."""
    configs = load_configs(args.config, args.overrides)
    lengths = args.lengths or (CPU_LENGTHS if jax.default_backend() == "cpu" else LENGTHS)
    results = []
    for length in lengths:
        found = bench_prefill(configs, length, args.batch, args.rounds)
        if not args.json:
            print(_table(found), flush=True)
        results += found
    if args.json:
        print(json.dumps([asdict(result) for result in results]))
    return 0
