"""Tokens per second of the whole input pipeline, up to the arrays that a train step takes.

Reads records from disk in shuffled order, makes inputs, targets and masks, and batches them, in
the same threads as training does.
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tttjax.data.pipeline import LAYOUTS, StreamOptions, TrainStream, make_train_stream
from tttjax.data.preparation import prepare
from tttjax.data.shards import open_prepared
from tttjax.errors import UserError
from tttjax.flag_types import float32, int32


@dataclass(frozen=True)
class DataBenchmark:
    """What was measured. latency_ms: mean time that the consumer waited for a batch."""

    tokens_per_second: float
    batches: int
    latency_ms: float
    seq_len: int
    batch_size: int
    layout: str
    source: str


def bench_data(
    data_dir: str | None = None,
    *,
    seq_len: int = 8192,
    batch_size: int = 8,
    seconds: float = 5.0,
    layout: str = "stream",
    prefetch: int = 4,
) -> DataBenchmark:
    """Draws batches for `seconds`. data_dir: a prepared data set; None: 64 MiB of random bytes."""
    if seconds <= 0:
        raise UserError(f"seconds={seconds} must be above 0.")
    with tempfile.TemporaryDirectory() as folder:
        data = open_prepared(data_dir or _synthetic(Path(folder)))
        options = StreamOptions(seq_len, batch_size, layout=layout)
        stream = make_train_stream([data], options, prefetch=prefetch)
        batches, elapsed = _draw(stream, seconds)
        stream.close()
    return DataBenchmark(
        tokens_per_second=batches * batch_size * seq_len / elapsed,
        batches=batches,
        latency_ms=1e3 * elapsed / batches,
        seq_len=seq_len,
        batch_size=batch_size,
        layout=layout,
        source=data_dir or "synthetic",
    )


def _draw(stream: TrainStream, seconds: float) -> tuple[int, float]:
    next(stream)  # starts the threads
    batches, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not batches:
        next(stream)
        batches += 1
    return batches, elapsed


def _synthetic(folder: Path, documents: int = 64, size: int = 1 << 20) -> str:
    text = folder / "text"
    text.mkdir()
    rng = np.random.default_rng(0)
    for i in range(documents):
        letters = rng.integers(32, 127, size, dtype=np.uint8)
        (text / f"{i:03d}.txt").write_bytes(letters.tobytes())
    prepare([text], folder / "data", num_workers=0)
    return str(folder / "data")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax bench data`."""
    add = parser.add_argument
    add("--data", metavar="DIR", help="a prepared data set (default: random bytes, made for it)")
    add("--seq-len", type=int32, default=8192, help="tokens of a sequence (default %(default)s)")
    add("--batch-size", type=int32, default=8, help="sequences of a batch (default %(default)s)")
    add("--seconds", type=float32, default=5.0, help="how long to measure (default %(default)s)")
    add("--layout", choices=LAYOUTS, default="stream", help="see docs/data.md")
    add("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """`tttjax bench data` from parsed arguments; the exit code."""
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
            f"({result.latency_ms:.2f} ms a batch of {result.batch_size} x {result.seq_len} "
            f"tokens, {result.source}, layout {result.layout})"
        )
    return 0
