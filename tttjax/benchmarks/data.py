"""Benchmark of the input pipeline: tokens per second."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tttjax.data.pipeline import StreamOptions, TrainStream, make_train_stream
from tttjax.data.preparation import prepare
from tttjax.data.shards import open_prepared
from tttjax.errors import UserError


@dataclass(frozen=True)
class DataBenchmark:
    """Throughput of the pipeline. latency_ms: mean wait for a batch."""

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
