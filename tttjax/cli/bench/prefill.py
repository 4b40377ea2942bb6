"""Measure prefill: time, memory and state size by prompt length.

  tttjax bench prefill --lengths=8192,32768,131072 \\
      --config=paper:125m,ttt_e2e,pretrain \\
      --config=paper:125m,full,pretrain

Runs `inference.prefill` with random weights: it processes the whole prompt, updates fast weights
after every full chunk, and returns the logits of the last token. Ratios are to the last
configuration. All programs of a length are compiled first, then run alternately; times are medians.
A program that exceeds the device's memory is left blank (null in JSON). For all mixers, use
`--config=mid_size:*`, or `--config=paper:125m,*,pretrain` at one of the paper's sizes.
"""

import argparse
import json
from dataclasses import asdict

from tttjax.cli.bench.options import add_configs, add_measuring, load_configs
from tttjax.cli.flag_types import int32, list_of

LENGTHS, CPU_LENGTHS = (8192, 32768, 131072), (8192,)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax bench prefill`."""
    add = parser.add_argument
    add_configs(parser)
    on_cpu, otherwise = (",".join(map(str, lengths)) for lengths in (CPU_LENGTHS, LENGTHS))
    add(
        "--lengths",
        type=list_of(int32),
        default=(),
        metavar="T,T,...",
        help=f"prompt lengths in tokens (default: {on_cpu} on a CPU, otherwise {otherwise})",
    )
    add("--batch", type=int32, default=1, help="batch size (default: %(default)s)")
    add_measuring(parser, "timed runs of each program")


def run(args: argparse.Namespace) -> int:
    """`tttjax bench prefill` from parsed arguments; the exit code."""
    import jax

    from tttjax.benchmarks.prefill import bench_prefill, format_table

    configs = load_configs(args.config, args.overrides)
    lengths = args.lengths or (CPU_LENGTHS if jax.default_backend() == "cpu" else LENGTHS)
    results = []
    for length in lengths:
        rows = bench_prefill(configs, length, args.batch, args.rounds)
        if not args.json:
            print(format_table(rows), flush=True)
        results += rows
    if args.json:
        print(json.dumps([asdict(result) for result in results]))
    return 0
