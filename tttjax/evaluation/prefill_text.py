"""Prefill of a long text into a session file, with logs, snapshots, progress and regular saving."""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from tttjax.evaluation.progress import Progress
from tttjax.evaluation.read_comparison import ReadComparison
from tttjax.evaluation.update_trace import UpdateTraceWriter
from tttjax.inference.session import CHUNKS_PER_CALL
from tttjax.io.locks import Lock
from tttjax.runs.chunk_log import ChunkRow, CsvLog
from tttjax.runs.load import LoadedModel
from tttjax.runs.long_text import TextPrefill, run_prefill, save_prefill
from tttjax.runs.snapshots import Snapshots
from tttjax.training.stopping import StopRequest

SAVE_EVERY = 60.0  # seconds

ChunkOutput = CsvLog | UpdateTraceWriter | ReadComparison


def prefill_session_file(
    path: Path,
    loaded: LoadedModel,
    prefill: TextPrefill,
    *,
    outputs: Sequence[ChunkOutput] = (),
    snapshots: Snapshots | None = None,
    precision: str = "float32",
    locks: Sequence[Lock] = (),
    stop: StopRequest,
    stream: TextIO,
) -> None:
    """Prefills and saves to `path`, until the end of the text or a request to stop.

    outputs: get the rows of every chunk. precision: of the final session; earlier ones are
    stored exactly. locks: checked before each save. stream: for progress lines.
    """
    saver = _SessionSaver(path, loaded, prefill, outputs, snapshots, precision, locks)
    progress = Progress(prefill.total - prefill.done, stream, title="read")
    recent: deque[ChunkRow] = deque(maxlen=CHUNKS_PER_CALL)
    clip = loaded.engine.inference_model.clip
    saver.take_snapshot()
    before = prefill.done
    for number, rows in enumerate(run_prefill(loaded, prefill)):
        for output in outputs:
            output.add(rows)
        recent.extend(rows)
        progress.what = _format_recent(recent, clip) or prefill.file.id
        progress.add(prefill.done - before)
        before = prefill.done
        if stop.after(number):
            break
        saver.step()
    progress.close()
    saver.save()


def _format_recent(rows: Iterable[ChunkRow], clip: float) -> str:
    """Means over the last chunks, for the progress line."""
    rows = list(rows)
    if not rows:
        return ""
    text = f"loss {np.mean([row.loss for row in rows]):.4f}"
    without = [row.loss_without for row in rows if row.loss_without is not None]
    after = [row.loss_after for row in rows if row.loss_after is not None]
    norms = np.array([row.grad_norm for row in rows])
    text += f" (without learning {np.mean(without):.4f})" if without else ""
    text += f" -> {np.mean(after):.4f}" if after else f"  gradient {norms.mean():.3g}"
    return text + (f"  clipped {np.mean(norms >= clip):.0%}" if clip else "")


class _SessionSaver:
    """Saves a prefill: first the outputs, then the session, then its snapshot.

    In this order the resumed result is bit-identical, wherever the process stops.
    """

    def __init__(
        self,
        path: Path,
        loaded: LoadedModel,
        prefill: TextPrefill,
        outputs: Sequence[ChunkOutput],
        snapshots: Snapshots | None,
        final_precision: str,
        locks: Sequence[Lock],
    ):
        self._path, self._loaded, self._prefill = path, loaded, prefill
        self._outputs, self._snapshots, self._locks = outputs, snapshots, locks
        self._final_precision = final_precision
        self._last_save = time.monotonic()

    def save(self, *, draw: bool = True) -> None:
        """Saves outputs and session. draw: also the plots of the outputs."""
        for lock in self._locks:
            lock.check()
        for output in self._outputs:
            output.sync()
        prefill = self._prefill
        # Lossy storage only at the end: a resumed prefill needs the exact state.
        is_final = prefill.done == prefill.total
        precision = self._final_precision if is_final else "float32"
        save_prefill(self._path, self._loaded, prefill, precision)
        for output in self._outputs:
            if draw and not isinstance(output, CsvLog):
                output.finish()
        self._last_save = time.monotonic()

    def step(self) -> None:
        """Takes a snapshot or saves, if it is time."""
        if not self.take_snapshot() and time.monotonic() - self._last_save > SAVE_EVERY:
            self.save()

    def take_snapshot(self) -> bool:
        """Saves and takes a snapshot, if one is due."""
        prefill, snapshots = self._prefill, self._snapshots
        if snapshots is None or prefill.done == prefill.total or not snapshots.is_due(prefill.done):
            return False
        self.save(draw=False)
        snapshots.take()
        return True
