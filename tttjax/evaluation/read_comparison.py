"""Files that compare the loss of a text with test-time training and without it.

    losses.csv    a row for every chunk: tokens up to its end, losses, their means so far
    losses.json   model and text; the means over all chunks
    losses.png    both means over position, and their difference

Until the end of the text the folder also holds the session of the reading without updates, named by
its tokens, `without-000000004096.session`. It is saved before the session of the same tokens, so a
resumed comparison leaves the same files as an uninterrupted one, or is refused.
"""

import csv
import json
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
from matplotlib.figure import Figure

from tttjax.errors import UserError
from tttjax.evaluation.plots import BASELINE, COLOURS, E2E, add_legend, decorate, new_figure
from tttjax.evaluation.update_trace import Bins, check_folder
from tttjax.inference.session import Session
from tttjax.inference.session_file import save_session
from tttjax.io.atomic import atomic_write
from tttjax.runs.chunk_log import ChunkRow
from tttjax.runs.load import LoadedModel, load_or_start_session
from tttjax.runs.long_text import TextPrefill, describe_learning

CSV, SUMMARY, PLOT = "losses.csv", "losses.json", "losses.png"
COLUMNS = ("tokens", "loss_with", "loss_without", "mean_with", "mean_without")
MATCHED_KEYS = ("model", "text", "mark", "how")  # must match to go on in a folder


class ReadComparison:
    """Writes the comparison of a prefill into a folder.

    The prefill gets its session without updates, `TextPrefill.static`. Nothing is written before
    `open`. Raises UserError if the folder is a file, holds the comparison of another model or text,
    or lacks a part of what the session has read; and for a text shorter than a chunk.
    """

    def __init__(self, folder: str | os.PathLike, loaded: LoadedModel, prefill: TextPrefill):
        self._folder, self._loaded, self._prefill = Path(folder), loaded, prefill
        self._about = {
            "model": loaded.model_fingerprint,
            "text": prefill.file.id,
            "mark": prefill.text_fingerprint,
            "how": describe_learning(loaded),
        }
        self._chunk_size = loaded.engine.inference_model.chunk_size
        self._check()
        self._bins = Bins(len(COLUMNS))
        self._sums = np.zeros(2)
        for row in _rows_until(self._folder / CSV, prefill.learned_tokens):
            self._add(int(row[0]), float(row[1]), float(row[2]))
        if self._bins.count * self._chunk_size != prefill.learned_tokens:
            raise self._incomplete()
        self._saved: Path | None = None
        if prefill.done < prefill.total:
            prefill.static = self._static_session()

    def _check(self) -> None:
        prefill = self._prefill
        if prefill.session.tokens + prefill.total - prefill.done <= self._chunk_size:
            raise UserError(
                f"{prefill.file.path} has no full chunk of {self._chunk_size} tokens, so no update "
                "has an effect on its loss; compare a longer text"
            )
        check_folder("--compare", self._folder, SUMMARY, self._about, MATCHED_KEYS)

    def _incomplete(self) -> UserError:
        return UserError(
            f"--compare={self._folder} does not hold the losses of the first "
            f"{self._prefill.learned_tokens:,} tokens of this session; leave out --compare, or "
            "read the text from its start into another --save-session"
        )

    def _static_path(self, tokens: int) -> Path:
        return self._folder / f"without-{tokens:012}.session"

    def _static_session(self) -> Session:
        prefill, loaded = self._prefill, self._loaded
        if not prefill.learned_tokens:  # no update yet
            return prefill.session
        path = self._static_path(prefill.session.tokens)
        if not path.exists():
            raise self._incomplete()
        self._saved = path
        return load_or_start_session(loaded, str(path))

    def open(self) -> None:
        """Creates the folder, or removes the rows that are later than the session."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / CSV
        with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
            csv.writer(file).writerow(COLUMNS)
            csv.writer(file).writerows(_rows_until(path, self._prefill.learned_tokens))
        self._file: TextIO = path.open("a", newline="")
        self._rows = csv.writer(self._file)
        self._write_summary()

    def add(self, rows: Sequence[ChunkRow]) -> None:
        """Appends the rows of newly completed chunks."""
        for row in rows:
            losses = f"{row.loss:.6f}", f"{row.loss_without:.6f}"
            means = self._add(row.tokens, *map(float, losses))
            self._rows.writerow((row.tokens, *losses, *(f"{mean:.6f}" for mean in means)))
        self._file.flush()

    def _add(self, tokens: int, loss: float, loss_without: float) -> np.ndarray:
        """Adds a chunk; returns the means so far."""
        self._sums += loss, loss_without
        means = self._sums / (self._bins.count + 1)
        self._bins.add((tokens, loss, loss_without, *means))
        return means

    def sync(self) -> None:
        """Syncs the rows and saves the session without updates; call before saving a session.

        The session without updates that was saved before is kept: a resume needs it if this process
        ends before the session is saved.
        """
        os.fsync(self._file.fileno())
        prefill, loaded = self._prefill, self._loaded
        if prefill.static is None or prefill.done == prefill.total:
            return
        path = self._static_path(prefill.session.tokens)
        save_session(
            path,
            loaded.engine,
            prefill.static,
            model=loaded.model_fingerprint,
            tokenizer=loaded.tokenizer_fingerprint,
            source={**prefill.source(), "how": "without learning"},
        )
        self._remove_static(keep=(path, self._saved))
        self._saved = path

    def _remove_static(self, keep: Collection[Path | None] = ()) -> None:
        for path in self._folder.glob("without-*.session"):
            if path not in keep:
                path.unlink()

    def finish(self) -> None:
        """Writes summary and plot; call after saving a session."""
        self._write_summary()
        if self._bins.count:
            figure = draw(self._about["text"], self._bins.means())
            with atomic_write(self._folder / PLOT) as temporary:
                figure.savefig(temporary, format="png")
        if self._prefill.done == self._prefill.total:
            self._remove_static()

    def _write_summary(self) -> None:
        means = self._means()
        values = {**self._about, "tokens": self._bins.count * self._chunk_size}
        if means is not None:
            values |= dict(zip(("loss_with", "loss_without"), means, strict=True))
        with atomic_write(self._folder / SUMMARY) as temporary:
            temporary.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")

    def _means(self) -> list[float] | None:
        """Mean losses with and without learning; None before the first chunk."""
        count = self._bins.count
        return [round(x, 6) for x in (self._sums / count).tolist()] if count else None

    def sentence(self) -> str:
        """What learning changed, in one sentence."""
        means = self._means()
        if means is None:
            return "no chunk is complete yet, so there is nothing to compare"
        loss, without = means
        verb = "raised" if loss > without else "lowered"
        return (
            f"over {self._bins.count * self._chunk_size:,} tokens, learning {verb} the loss by "
            f"{abs(without - loss):.3f} nats per token ({without:.3f} to {loss:.3f})"
        )

    def close(self) -> None:
        self._file.close()


def _rows_until(path: Path, done: int) -> Iterator[list[str]]:
    """The rows of the first `done` tokens. They are synced before the session is saved, so a
    damaged one is a UserError; later ones may be truncated."""
    if not done or not path.exists():
        return
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.reader(file)
        next(rows, None)
        for row in rows:
            try:
                tokens, *losses = int(row[0]), *map(float, row[1:])
                if len(losses) != len(COLUMNS) - 1 or not np.isfinite(losses).all():
                    raise ValueError("numbers are missing")
            except (ValueError, IndexError) as error:
                raise UserError(
                    f"line {rows.line_num} of {path} is damaged ({error}); remove the folder, or "
                    "give another one"
                ) from error
            if tokens > done:
                return
            yield row
            if tokens == done:
                return


def draw(text: str, means: np.ndarray) -> Figure:
    """means: [bins, columns], the columns of losses.csv."""
    tokens, loss, without, mean, mean_without = means.T
    figure, (top, bottom) = new_figure(2, height=2.6)
    for values, total, color, label in (
        (without, mean_without, COLOURS[0], "without learning"),
        (loss, mean, E2E, "with learning"),
    ):
        top.plot(tokens, values, color=color, linewidth=0.7, alpha=0.35)
        top.plot(tokens, total, color=color, linewidth=1.8, label=f"{label}, mean so far")
    bottom.axhline(0, color=BASELINE, linewidth=1)
    bottom.plot(tokens, without - loss, color=COLOURS[1], linewidth=0.7, alpha=0.35)
    bottom.plot(
        tokens, mean_without - mean, color=COLOURS[1], linewidth=1.8, label="gain, mean so far"
    )
    decorate(top, text, "loss (nats per token)")
    decorate(bottom, "", "gain (nats per token)")
    bottom.set_xlabel("tokens read; faint: chunks")
    bottom.xaxis.set_major_formatter("{x:,.0f}")
    add_legend(figure, (top, bottom))
    return figure
