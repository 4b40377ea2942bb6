"""Measure time and memory of the dual and primal forms of TTT-Linear and TTT-MLP.

  tttjax bench ttt-dual --seq-len=2048 --seq-len=4096

Runs the inner loop alone, without projections: forward, and with the gradient of a loss for tokens
and initial weights. All programs of a sequence length are compiled first, then run alternately, so
that a busy machine affects all alike; times are medians.
"""

import argparse
import json
from dataclasses import asdict

from tttjax.benchmarks.timing import cell, mebibytes
from tttjax.benchmarks.ttt_dual import DualSizes, bench_ttt_dual
from tttjax.cli.bench.options import add_measuring
from tttjax.cli.flag_types import int32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax bench ttt-dual`."""
    add = parser.add_argument
    add(
        "--seq-len",
        type=int32,
        action="append",
        metavar="T",
        help="sequence length (default: 2048); may be repeated",
    )
    add("--batch", type=int32, default=DualSizes.batch, help="sequences (default: %(default)s)")
    add("--heads", type=int32, default=DualSizes.heads, help="heads (default: %(default)s)")
    add(
        "--head-dim",
        type=int32,
        default=DualSizes.head_dim,
        help="size of a head (default: %(default)s)",
    )
    add(
        "--chunk",
        type=int32,
        default=DualSizes.chunk,
        help="tokens of an inner mini-batch (default: %(default)s)",
    )
    add_measuring(parser, "timed runs of each program")


def run(args: argparse.Namespace) -> int:
    """`tttjax bench ttt-dual` from parsed arguments; the exit code."""
    sizes = DualSizes(args.batch, args.heads, args.head_dim, args.chunk)
    results = bench_ttt_dual(args.seq_len or (2048,), sizes, args.rounds)
    if args.json:
        print(json.dumps([asdict(result) for result in results]))
        return 0
    print("inner   task      tokens   dual ms  primal ms  speedup  dual MiB  primal MiB")
    for r in results:
        dual, primal = (mebibytes(size) for size in (r.dual_memory_bytes, r.primal_memory_bytes))
        print(
            f"{r.inner:6}  {r.task:8}  {r.seq_len:6}  {cell(r.dual_seconds, '8.1f', 1e3)}  "
            f"{cell(r.primal_seconds, '9.1f', 1e3)}  {cell(r.speedup, '7.2f')}  "
            f"{dual:>8}  {primal:>10}"
        )
    return 0
