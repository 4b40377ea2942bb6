"""The telescope's files: every chunk as a line of JSON, a summary, a plot.

    chunks.jsonl     {"tokens": ..., "loss": ..., "loss_after": ..., ...}, appended while reading
    telescope.json   what was read by what; means over all chunks; drift by layer at the end
    telescope.png    losses before and after, gradient norms and the clip, drift by layer

Lines are on disk before a session that comes after them, and those that came after the session are
dropped when reading goes on: so the files of a reading with stops are those of one without.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from tttjax.errors import UserError
from tttjax.evaluation.update_trace_plot import draw
from tttjax.inference.update_trace import start_norms
from tttjax.io.atomic import atomic_write
from tttjax.runs.chunk_log import ChunkRow
from tttjax.runs.load import LoadedModel
from tttjax.runs.long_text import TextPrefill
from tttjax.training.metrics import json_safe
from tttjax.ttt.layer_norms import fast_layers

FORMAT = "tttjax-telescope-1"
CHUNKS, SUMMARY, PLOT = "chunks.jsonl", "telescope.json", "telescope.png"
SAME = ("format", "model", "text", "mark")  # of a folder that is written on
MOST_BINS = 512  # of the plot


class Bins:
    """Means of rows over stretches of equal length, at most MOST_BINS, however many rows come."""

    def __init__(self, columns: int):
        self._sums = np.zeros((MOST_BINS, columns))
        self._width, self.count = 1, 0

    def add(self, row: Sequence[float]) -> None:
        if self.count == MOST_BINS * self._width:
            halves = self._sums[0::2] + self._sums[1::2]
            self._sums = np.concatenate((halves, np.zeros_like(halves)))
            self._width *= 2
        self._sums[self.count // self._width] += row
        self.count += 1

    def means(self) -> np.ndarray:
        """[bins, columns]"""
        used = -(-self.count // self._width)
        rows = np.full(used, self._width)
        rows[-1:] -= used * self._width - self.count
        return self._sums[:used] / rows[:, None]

    def mean(self) -> np.ndarray:
        """[columns], over all rows."""
        return self._sums.sum(axis=0) / max(self.count, 1)


class UpdateTraceWriter:
    """Files in a folder that follow a reading.

    Raises UserError for a folder that is a file, or holds what another model or text showed.
    """

    def __init__(self, folder: str | os.PathLike, opened: LoadedModel, reading: TextPrefill):
        self._folder = Path(folder)
        self._about = _describe(opened, reading)
        self._check()
        self._layers: list[str] = self._about["layers"]
        self._bins = Bins(5 + 2 * len(self._layers))
        self._last: Mapping[str, Any] = {}
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / CHUNKS
        with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for line, values in _earlier(path, reading.learned_tokens):
                file.write(line)
                self._note(values)
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._write_summary()

    def _check(self) -> None:
        path = self._folder / SUMMARY
        if self._folder.exists() and not self._folder.is_dir():
            raise UserError(f"--telescope={self._folder} is a file; name a folder")
        if not path.exists():
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            before = {}
        if any(before.get(name) != self._about[name] for name in SAME):
            raise UserError(
                f"--telescope={self._folder} holds what another model or another text showed; "
                "name another folder"
            )

    def add(self, rows: Sequence[ChunkRow]) -> None:
        """Notes chunks that have just become full."""
        for row in rows:
            values = {
                "tokens": row.tokens,
                "loss": _digits(row.loss),
                "loss_after": _digits(row.loss_after),
                "grad_norm": _digits(row.grad_norm),
                "clipped": bool(self._about["clip"]) and row.grad_norm >= self._about["clip"],
                "layer_grad_norm": [_digits(x) for x in row.layer_grad_norm],
                "layer_drift": [_digits(x) for x in row.layer_drift],
            }
            self._file.write(json.dumps(values, allow_nan=False) + "\n")
            self._note(values)
        self._file.flush()

    def _note(self, values: Mapping[str, Any]) -> None:
        names = ("tokens", "loss", "loss_after", "grad_norm", "clipped")
        row = [values[name] for name in names]
        self._bins.add(
            [float(x) for x in (*row, *values["layer_grad_norm"], *values["layer_drift"])]
        )
        self._last = values

    def sync(self) -> None:
        """Has all lines on disk, before a session that comes after them."""
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Writes the summary and the plot."""
        self._write_summary()
        if self._bins.count:
            figure = draw(self._about, self._bins.means())
            with atomic_write(self._folder / PLOT) as temporary:
                figure.savefig(temporary, format="png")

    def _write_summary(self) -> None:
        values = {**self._about, **self._means()}
        text = json.dumps(values, indent=1, allow_nan=False) + "\n"
        with atomic_write(self._folder / SUMMARY) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def _means(self) -> dict[str, Any]:
        if not self._bins.count:
            return {"chunks": 0}
        _, loss, after, norm, clipped, *_ = self._bins.mean().tolist()
        return {
            "chunks": self._bins.count,
            "tokens": self._last["tokens"],
            "loss": _digits(loss),
            "loss_after": _digits(after),
            "grad_norm": _digits(norm),
            "clip_rate": _digits(clipped),
            "drift": dict(zip(self._layers, self._last["layer_drift"], strict=True)),
        }

    def close(self) -> None:
        self._file.close()


def _describe(opened: LoadedModel, reading: TextPrefill) -> dict[str, Any]:
    reader = opened.engine.inference_model
    return {
        "format": FORMAT,
        "model": opened.model_fingerprint,
        "text": reading.file.id,
        "mark": reading.text_fingerprint,
        "chunk_size": reader.chunk_size,
        "inner_lr": reader.lr,
        "clip": reader.clip,
        "layers": list(fast_layers(reader.chunk_model.split.model)),
        "start_norm": [_digits(x) for x in np.asarray(start_norms(opened.engine)).tolist()],
    }


def _earlier(path: Path, done: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines up to where reading goes on.

    Lines are on disk before the session, so one that is damaged before that is a UserError; behind
    it may be one that was cut off.
    """
    if not path.exists():
        return
    reached = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                values = json.loads(line)
                is_past = values["tokens"] > done
                if not line.endswith("\n") or (not is_past and not _is_line(values)):
                    raise ValueError("it is cut off, or lacks numbers")
            except (ValueError, KeyError, TypeError) as error:
                if reached == done:
                    return
                raise UserError(
                    f"line {number} of {path} is damaged ({error}); remove the folder, or name "
                    "another one"
                ) from error
            if is_past:
                return
            yield line, values
            reached = values["tokens"]


def _is_line(values: Mapping[str, Any]) -> bool:
    """Whether a line has all that is noted of a chunk, as numbers or their names."""
    rows = [values["layer_grad_norm"], values["layer_drift"]]
    flat = [values[n] for n in ("tokens", "loss", "loss_after", "grad_norm", "clipped")]
    for x in (*flat, *rows[0], *rows[1]):
        float(x)
    return len(rows[0]) == len(rows[1])


def _digits(value: float | None) -> Any:
    """As many digits as float32 has; not finite: "nan", "inf"."""
    if value is None or not math.isfinite(value):
        return json_safe(value)
    return float(f"{value:.7g}")
