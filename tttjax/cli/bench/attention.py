"""Time and memory of attention in every form that this machine has.

  tttjax bench attention --chunk=128 --window=512 --seq-len=2048

Two kinds are measured. A chunk of queries with a window before it, as the inner loop meets it:
value and gradient ("gradient"), and the gradient of value and tangent together ("pair"), which the
meta-gradient asks for; past keys and values are constants of the first. And a whole sequence, full
and over the window, value and gradient, as the blocks below the fast weights meet it. Forms: all
scores in memory ("dense"), in blocks ("xla"), kernels ("pallas", "library") where they apply. All
programs are compiled first, then run in turn, round after round; times are medians.
"""

import argparse
import json
from dataclasses import asdict

from tttjax.benchmarks.attention import DTYPES, AttentionSizes, absent, bench_attention
from tttjax.benchmarks.timing import (
    cell,
    mebibytes,
)
from tttjax.cli.bench.options import add_sizes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax bench attention`."""
    texts = {
        "batch": "sequences",
        "heads": "heads",
        "head_dim": "size of one",
        "chunk": "queries of a chunk",
        "window": "keys before it, and the window of a whole sequence",
        "seq_len": "tokens of a whole sequence",
    }
    add_sizes(parser, AttentionSizes(), texts, DTYPES)


def run(args: argparse.Namespace) -> int:
    """`tttjax bench attention` from parsed arguments; the exit code."""
    sizes = AttentionSizes(**{name: getattr(args, name) for name in asdict(AttentionSizes())})
    results = bench_attention(sizes, args.rounds)
    if args.json:
        print(json.dumps([asdict(result) for result in results]))
        return 0
    print("task              form           ms  speedup       MiB")
    for r in results:
        print(
            f"{r.task:16}  {r.form:7}  {cell(r.seconds, '8.1f', 1e3)}  {cell(r.speedup, '7.2f')}  "
            f"{mebibytes(r.memory_bytes, 1):>8}"
        )
    for form, reason in absent(sizes).items():
        print(f"{form}: not measured, {reason}")
    return 0
