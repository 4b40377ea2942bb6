"""What chunks showed as rows of numbers, and a CSV file of them."""

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from tttjax.errors import UserError
from tttjax.inference.update_trace import UpdateTrace
from tttjax.io.atomic import atomic_write
from tttjax.ttt.chunk import ChunkRecords

HEAD = ("tokens", "loss", "grad_norm")  # read by the end of the chunk, nats per token, its norm


class ChunkRow(NamedTuple):
    """A chunk: tokens read by its end, and what it showed; the last three with a telescope."""

    tokens: int
    loss: float
    grad_norm: float
    loss_after: float | None = None
    layer_grad_norm: Sequence[float] = ()
    layer_drift: Sequence[float] = ()


def chunk_rows(seen: Sequence[ChunkRecords | UpdateTrace], end: int, chunk: int) -> list[ChunkRow]:
    """The chunks of one sequence, the last of which ends after `end` tokens."""
    columns: list[tuple[Any, ...]] = []
    for found in seen:
        arrays = [found.loss_NB, found.grad_norm_NB]
        if isinstance(found, UpdateTrace):
            arrays += [found.loss_after_NB, found.grad_norm_NBL, found.drift_NBL]
        columns += zip(*(np.asarray(x)[:, 0].tolist() for x in arrays), strict=True)
    first = end - len(columns) * chunk
    return [ChunkRow(first + (i + 1) * chunk, *values) for i, values in enumerate(columns)]


class CsvLog:
    """Loss and gradient norm of every chunk. done: tokens learned from; later rows are dropped."""

    def __init__(self, path: str | os.PathLike, done: int):
        path = Path(path)
        rows = [HEAD, *_earlier(path, done)]
        with (
            atomic_write(path) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            csv.writer(file).writerows(rows)
        self._file: TextIO = path.open("a", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)

    def add(self, rows: Sequence[ChunkRow]) -> None:
        """Notes chunks that have just become full."""
        for row in rows:
            self._rows.writerow((row.tokens, f"{row.loss:.6f}", f"{row.grad_norm:.6f}"))
        self._file.flush()

    def sync(self) -> None:
        """Has all rows on disk, before a session that comes after them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _earlier(path: Path, done: int) -> Iterator[list[str]]:
    """What was noted of the text up to where reading goes on."""
    if not done or not path.exists():
        return
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.reader(file)
            next(rows)
            for row in rows:
                if int(row[0]) <= done:
                    yield row
                if int(row[0]) >= done:  # what follows was read after the session was saved
                    return
    except (ValueError, IndexError, StopIteration) as error:
        raise UserError(
            f"{path} is no log of this command, or a line is cut off; remove that line, "
            "or name another --log"
        ) from error
