"""Measure time and memory of the attention implementations.

  tttjax bench attention --chunk=128 --window=512 --seq-len=2048

Tasks: a chunk of queries after a full window, as in the inner loop ("chunk gradient": value and
gradient, with buffered keys and values as constants; "chunk pair": gradient of value and tangent
together, as in the meta-gradient), and a whole sequence, full and windowed (value and gradient), as
in the blocks before the fast weights. Forms: all scores in memory ("dense"), blocked ("xla"),
kernels ("pallas", "library") where supported. All programs are compiled first, then run
alternately; times are medians.
"""

import argparse
import json
from dataclasses import asdict

from tttjax.benchmarks.attention import AttentionSizes, bench_attention, unsupported_forms
from tttjax.benchmarks.timing import (
    DTYPES,
    cell,
    mebibytes,
)
from tttjax.cli.bench.options import add_sizes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax bench attention`."""
    texts = {
        "batch": "sequences",
        "heads": "heads",
        "head_dim": "size of a head",
        "chunk": "queries of a chunk",
        "window": "keys before the chunk, and the attention window of a sequence",
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
    for form, reason in unsupported_forms(sizes).items():
        print(f"{form}: not measured, {reason}")
    return 0
