"""Files of an update trace: one JSON line per chunk, a summary, a plot.

    chunks.jsonl     {"tokens": ..., "loss": ..., "loss_after": ..., ...}, appended during prefill
    telescope.json   model and text; means over all chunks; final drift by layer
    telescope.png    losses before and after updates, gradient norms and clip, drift by layer

Lines are synced to disk before the session of the same chunks. Resuming drops lines that are later
than the session, so a resumed prefill leaves the same files as an uninterrupted one.
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
from tttjax.training.metrics_file import json_safe
from tttjax.ttt.layer_norms import fast_layers

FORMAT = "tttjax-telescope-1"
CHUNKS, SUMMARY, PLOT = "chunks.jsonl", "telescope.json", "telescope.png"
MATCHED_KEYS = ("format", "model", "text", "mark")  # must match to append to a folder
MAX_BINS = 512  # points of the plot


class Bins:
    """Means of rows over bins of equal width, at most MAX_BINS, for any number of rows."""

    def __init__(self, columns: int):
        self._sums = np.zeros((MAX_BINS, columns))
        self._width, self.count = 1, 0

    def add(self, row: Sequence[float]) -> None:
        if self.count == MAX_BINS * self._width:
            pair_sums = self._sums[0::2] + self._sums[1::2]
            self._sums = np.concatenate((pair_sums, np.zeros_like(pair_sums)))
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


def check_folder(
    option: str, folder: Path, summary: str, about: Mapping[str, Any], keys: Sequence[str]
) -> None:
    """Raises UserError if the folder is a file, or its summary differs from `about` in a key."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{option}={folder} is a file; give a folder")
    path = folder / summary
    if not path.exists():
        return
    try:
        previous = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        previous = {}
    if any(previous.get(key) != about[key] for key in keys):
        raise UserError(
            f"{option}={folder} holds the results of another model or text; give another folder"
        )


class UpdateTraceWriter:
    """Writes the update trace of a prefill into a folder.

    Raises UserError if the folder is a file or holds the trace of another model or text.
    """

    def __init__(self, folder: str | os.PathLike, loaded: LoadedModel, prefill: TextPrefill):
        self._folder = Path(folder)
        self._about = _describe(loaded, prefill)
        check_folder("--telescope", self._folder, SUMMARY, self._about, MATCHED_KEYS)
        self._layers: list[str] = self._about["layers"]
        self._bins = Bins(5 + 2 * len(self._layers))
        self._last: Mapping[str, Any] = {}
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / CHUNKS
        with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for line, values in _lines_until(path, prefill.learned_tokens):
                file.write(line)
                self._add_values(values)
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._write_summary()

    def add(self, rows: Sequence[ChunkRow]) -> None:
        """Appends the rows of newly completed chunks."""
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
            self._add_values(values)
        self._file.flush()

    def _add_values(self, values: Mapping[str, Any]) -> None:
        names = ("tokens", "loss", "loss_after", "grad_norm", "clipped")
        row = [values[name] for name in names]
        self._bins.add(
            [float(x) for x in (*row, *values["layer_grad_norm"], *values["layer_drift"])]
        )
        self._last = values

    def sync(self) -> None:
        """Syncs all lines to disk; call before saving a session."""
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


def _describe(loaded: LoadedModel, prefill: TextPrefill) -> dict[str, Any]:
    inference_model = loaded.engine.inference_model
    return {
        "format": FORMAT,
        "model": loaded.model_fingerprint,
        "text": prefill.file.id,
        "mark": prefill.text_fingerprint,
        "chunk_size": inference_model.chunk_size,
        "inner_lr": inference_model.lr,
        "clip": inference_model.clip,
        "layers": list(fast_layers(inference_model.chunk_model.split.model)),
        "start_norm": [_digits(x) for x in np.asarray(start_norms(loaded.engine)).tolist()],
    }


def _lines_until(path: Path, done: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of the first `done` tokens, with their values.

    Lines are synced before the session is saved, so a damaged line before `done` is a UserError; a
    later one may be truncated.
    """
    if not path.exists():
        return
    reached = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                values = json.loads(line)
                is_later = values["tokens"] > done
                if not line.endswith("\n") or (not is_later and not _is_line(values)):
                    raise ValueError("truncated, or lacks numbers")
            except (ValueError, KeyError, TypeError) as error:
                if reached == done:
                    return
                raise UserError(
                    f"line {number} of {path} is damaged ({error}); remove the folder, or give "
                    "another one"
                ) from error
            if is_later:
                return
            yield line, values
            reached = values["tokens"]


def _is_line(values: Mapping[str, Any]) -> bool:
    """Whether a line has all values of a chunk, as numbers or "nan" and "inf"."""
    rows = [values["layer_grad_norm"], values["layer_drift"]]
    flat = [values[n] for n in ("tokens", "loss", "loss_after", "grad_norm", "clipped")]
    for x in (*flat, *rows[0], *rows[1]):
        float(x)
    return len(rows[0]) == len(rows[1])


def _digits(value: float | None) -> Any:
    """Rounded to the digits of float32; "nan" or "inf" if not finite."""
    if value is None or not math.isfinite(value):
        return json_safe(value)
    return float(f"{value:.7g}")
