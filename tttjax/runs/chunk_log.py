"""Rows of per-chunk metrics, and a CSV log of them."""

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

COLUMNS = ("tokens", "loss", "grad_norm")  # tokens at the end of the chunk, nats per token, norm


class ChunkRow(NamedTuple):
    """Metrics of one chunk. tokens: of the session at its end.

    loss, loss_after: nats per token before and after the update. loss_after and the norms by layer
    need update tracing; loss_without, from weights without any update, `TextPrefill.static`.
    """

    tokens: int
    loss: float
    grad_norm: float
    loss_after: float | None = None
    layer_grad_norm: Sequence[float] = ()
    layer_drift: Sequence[float] = ()
    loss_without: float | None = None


def chunk_rows(
    records: Sequence[ChunkRecords | UpdateTrace], end: int, chunk: int
) -> list[ChunkRow]:
    """Rows of one sequence's chunks of `chunk` tokens; the last chunk ends at `end` tokens."""
    columns: list[tuple[Any, ...]] = []
    for record in records:
        arrays = [record.loss_NB, record.grad_norm_NB]
        if isinstance(record, UpdateTrace):
            arrays += [record.loss_after_NB, record.grad_norm_NBL, record.drift_NBL]
        columns += zip(*(np.asarray(x)[:, 0].tolist() for x in arrays), strict=True)
    first = end - len(columns) * chunk
    return [ChunkRow(first + (i + 1) * chunk, *values) for i, values in enumerate(columns)]


class CsvLog:
    """A CSV file with loss and gradient norm of every chunk.

    done: learned tokens of the session; rows beyond them are removed from an existing file.
    """

    def __init__(self, path: str | os.PathLike, done: int):
        path = Path(path)
        rows = [COLUMNS, *_rows_until(path, done)]
        with (
            atomic_write(path) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            csv.writer(file).writerows(rows)
        self._file: TextIO = path.open("a", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)

    def add(self, rows: Sequence[ChunkRow]) -> None:
        """Appends rows."""
        for row in rows:
            self._rows.writerow((row.tokens, f"{row.loss:.6f}", f"{row.grad_norm:.6f}"))
        self._file.flush()

    def sync(self) -> None:
        """Syncs all rows to disk; call it before the session is saved."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _rows_until(path: Path, done: int) -> Iterator[list[str]]:
    """Rows of an existing log up to `done` tokens."""
    if not done or not path.exists():
        return
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.reader(file)
            next(rows)
            for row in rows:
                if int(row[0]) <= done:
                    yield row
                if int(row[0]) >= done:  # later rows are newer than the saved session
                    return
    except (ValueError, IndexError, StopIteration) as error:
        raise UserError(
            f"{path} is not a log of this command, or has a truncated line; remove that line, "
            "or name another --log"
        ) from error
