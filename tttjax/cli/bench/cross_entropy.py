"""Measure time and memory of the dense and blocked cross-entropy.

  tttjax bench cross-entropy --rows=1024 --vocab=32768 --rows-block=256

Tasks: "gradient", loss and gradient for h and head; "second", as in the meta-gradient: the
gradient, for h, its tangent and head, of the loss plus its directional derivative. In "second", the
form `blocked` is given the residuals of the forward pass. All programs are compiled first, then run
alternately; times are medians.
"""

import argparse
import json
from dataclasses import asdict

from tttjax.benchmarks.cross_entropy import CrossEntropySizes, bench_cross_entropy
from tttjax.benchmarks.timing import DTYPES, cell, mebibytes
from tttjax.cli.bench.options import add_sizes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax bench cross-entropy`."""
    texts = {
        "rows": "tokens",
        "embed_dim": "width of h",
        "vocab": "vocabulary size",
        "rows_block": "tokens of a block of logits",
        "vocab_block": "vocabulary entries of a block of logits; 0: all",
    }
    add_sizes(parser, CrossEntropySizes(), texts, DTYPES)


def run(args: argparse.Namespace) -> int:
    """`tttjax bench cross-entropy` from parsed arguments; the exit code."""
    sizes = CrossEntropySizes(**{name: getattr(args, name) for name in asdict(CrossEntropySizes())})
    results = bench_cross_entropy(sizes, args.rounds)
    if args.json:
        print(json.dumps([asdict(result) for result in results]))
        return 0
    print("task      form           ms  speedup       MiB")
    for r in results:
        times = f"{cell(r.seconds, '8.1f', 1e3)}  {cell(r.speedup, '7.2f')}"
        print(f"{r.task:8}  {r.form:7}  {times}  {mebibytes(r.memory_bytes, 1):>8}")
    return 0
