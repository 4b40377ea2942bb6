"""Measure the input pipeline in tokens per second, up to the arrays of a train step.

Reads records from disk in shuffled order, makes inputs, targets and masks, and batches them, in
the same threads as training.
"""

import argparse
import json
from dataclasses import asdict

from tttjax.cli.flag_types import float32, int32
from tttjax.config.schema import LAYOUTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax bench data`."""
    add = parser.add_argument
    add(
        "--data", metavar="DIR", help="prepared data set (default: a temporary one of random bytes)"
    )
    add("--seq-len", type=int32, default=8192, help="tokens of a sequence (default: %(default)s)")
    add("--batch-size", type=int32, default=8, help="sequences of a batch (default: %(default)s)")
    add(
        "--seconds",
        type=float32,
        default=5.0,
        help="duration of the measurement (default: %(default)s)",
    )
    add("--layout", choices=LAYOUTS, default="stream", help="layout of sequences, see docs/data.md")
    add("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """`tttjax bench data` from parsed arguments; the exit code."""
    from tttjax.benchmarks.data import bench_data

    result = bench_data(
        args.data,
        seq_len=args.seq_len,
        batch_size=args.batch_size,
        seconds=args.seconds,
        layout=args.layout,
    )
    if args.json:
        print(json.dumps(asdict(result)))
    else:
        print(
            f"{result.tokens_per_second / 1e6:,.1f} million tokens/s "
            f"({result.latency_ms:.2f} ms per batch of {result.batch_size} x {result.seq_len} "
            f"tokens, {result.source}, layout {result.layout})"
        )
    return 0
