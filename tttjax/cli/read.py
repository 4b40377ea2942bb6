"""Prefill a session file with a text of any length, with test-time training.

examples:
  tttjax read runs/first book.txt --save-session=book.session
  tttjax generate runs/first --session=book.session --prompt "In the end,"
  tttjax read runs/first book.txt --save-session=book.session --telescope=book.telescope
      records every inner update: loss before and after, gradient norm, weight drift by layer
  tttjax read runs/first book.txt --save-session=book.session --keep-every=100000
      keeps snapshots for `tttjax sessions book.session --rewind=TOKENS`

Memory use and file size do not grow with the text. The session is saved every minute and on Ctrl-C
or SIGTERM; the same command resumes. --log writes the loss of every chunk, before its update, to a
CSV file.
"""

import argparse
import contextlib
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from tttjax.cli.flag_types import int32
from tttjax.cli.model_arguments import add_model_arguments, load_from_args
from tttjax.data.documents import InputFile
from tttjax.errors import UserError
from tttjax.evaluation.progress import Progress
from tttjax.evaluation.update_trace import UpdateTraceWriter
from tttjax.inference.session import CHUNKS_PER_CALL
from tttjax.inference.session_file import PRECISIONS, check_stored, check_writable
from tttjax.io.locks import Lock, hold
from tttjax.parallel.precision import as_configured
from tttjax.runs.chunk_log import ChunkRow, CsvLog
from tttjax.runs.load import LoadedModel
from tttjax.runs.long_text import (
    TextPrefill,
    find_text,
    resume_prefill,
    run_prefill,
    save_prefill,
    start_prefill,
    tokens_per_call,
)
from tttjax.runs.snapshots import Snapshots
from tttjax.training.stopping import StopRequest

EXIT_STOPPED = 75  # saved; the same command resumes
SAVE_EVERY = 60.0  # seconds
MAX_SNAPSHOTS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax read`."""
    add = parser.add_argument
    add("workdir", metavar="WORKDIR", help="work directory or checkpoint of a run")
    add("text", metavar="FILE", help="text in UTF-8; also .gz, .xz, .zst")
    add("--save-session", required=True, metavar="FILE", help="session file to write")
    add("--session", metavar="FILE", help="session to continue (default: an empty one)")
    add(
        "--session-precision",
        choices=PRECISIONS,
        default="float32",
        help="precision of stored arrays (default: %(default)s)",
    )
    add(
        "--session-rank",
        type=int32,
        default=0,
        metavar="N",
        help="rank of stored weight changes; 0: full",
    )
    add("--log", metavar="FILE.csv", help="log of loss and gradient norm of every chunk")
    add("--telescope", metavar="DIR", help="trace of all inner updates, as JSON and as a plot")
    add = parser.add_argument_group("snapshots, in FILE.kept/").add_argument
    add(
        "--keep-every",
        type=int32,
        default=0,
        metavar="TOKENS",
        help="interval between snapshots; 0: none",
    )
    add(
        "--keep-most",
        type=int32,
        default=MAX_SNAPSHOTS,
        metavar="N",
        help="largest number of snapshots; beyond it, every other one is removed and the interval "
        "doubles (default: %(default)s)",
    )
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """`tttjax read` from parsed arguments; returns the exit code."""
    _check(args)
    file = find_text(args.text)
    with contextlib.ExitStack() as stack:
        locks = []
        for path, beside in (
            (args.save_session, True),
            (args.log, True),
            (args.telescope, False),
        ):
            if path:
                locks.append(stack.enter_context(hold(path, beside=beside)))
        check_writable(args.save_session)
        return _run(args, file, locks)


def _run(args: argparse.Namespace, file: InputFile, locks: Sequence[Lock]) -> int:
    loaded = load_from_args(args, trace_updates=bool(args.telescope))
    if args.telescope and not loaded.engine.inference_model.chunk_size:
        raise UserError(
            f"--telescope needs inner updates, but there are none: {args.workdir} has no fast "
            "weights, or --learn=none or --mode=off is set"
        )
    with as_configured(loaded.config):
        path = Path(args.save_session)
        prefill = (
            resume_prefill(loaded, file, path)
            if path.exists()
            else start_prefill(loaded, file, args.session)
        )
        loaded.engine.check((), prefill.session.tokens + prefill.total - prefill.done)
        # After the end of the text, the summary of the update trace may still be missing.
        if prefill.done < prefill.total or args.telescope:
            with StopRequest() as stop:
                _read(args, loaded, prefill, locks, stop, sys.stderr)
    tokens, size = prefill.session.tokens, path.stat().st_size
    print(f"{path}: {tokens:,} tokens in {size:,} bytes", file=sys.stderr)
    return 0 if prefill.done == prefill.total else EXIT_STOPPED


def _check(args: argparse.Namespace) -> None:
    check_stored(args.session_precision, args.session_rank)
    for name, low in (("keep_every", 0), ("keep_most", 2)):
        value = getattr(args, name)
        if value < low:
            raise UserError(f"--{name.replace('_', '-')}={value} must be at least {low}.")


def _read(
    args: argparse.Namespace,
    loaded: LoadedModel,
    prefill: TextPrefill,
    locks: Sequence[Lock],
    stop: StopRequest,
    stream: TextIO,
) -> None:
    """Prefills to the end of the text or a request to stop."""
    with contextlib.ExitStack() as stack:
        outputs: list[CsvLog | UpdateTraceWriter] = []
        snapshots = _snapshots(args, loaded)
        if args.telescope:
            outputs.append(UpdateTraceWriter(args.telescope, loaded, prefill))
        if args.log:
            outputs.append(CsvLog(args.log, prefill.learned_tokens))
        for output in outputs:
            stack.callback(output.close)
        saver = _Saver(args, loaded, prefill, locks, outputs, snapshots)
        progress = Progress(prefill.total - prefill.done, stream, title="read")
        recent: deque[ChunkRow] = deque(maxlen=CHUNKS_PER_CALL)
        saver.keep()
        before = prefill.done
        for number, rows in enumerate(run_prefill(loaded, prefill)):
            for output in outputs:
                output.add(rows)
            recent.extend(rows)
            progress.what = (
                _format_recent(recent, loaded.engine.inference_model.clip) or prefill.file.id
            )
            progress.add(prefill.done - before)
            before = prefill.done
            if stop.after(number):
                break
            saver.step()
        progress.close()
        saver.save()


def _snapshots(args: argparse.Namespace, loaded: LoadedModel) -> Snapshots | None:
    if not args.keep_every:
        return None
    size = tokens_per_call(loaded)
    every = -(-args.keep_every // size)
    snapshots = Snapshots(Path(args.save_session), every, args.keep_most, size)
    snapshots.check()
    return snapshots


def _format_recent(rows: Iterable[ChunkRow], clip: float) -> str:
    """Means over the last chunks, for the progress line."""
    rows = list(rows)
    if not rows:
        return ""
    text = f"loss {np.mean([row.loss for row in rows]):.4f}"
    after = [row.loss_after for row in rows if row.loss_after is not None]
    norms = np.array([row.grad_norm for row in rows])
    text += f" -> {np.mean(after):.4f}" if after else f"  gradient {norms.mean():.3g}"
    return text + (f"  clipped {np.mean(norms >= clip):.0%}" if clip else "")


class _Saver:
    """Saves a prefill: first the logs, then the session, then its snapshot.

    In this order the resumed result is bit-identical, wherever the process stops.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        loaded: LoadedModel,
        prefill: TextPrefill,
        locks: Sequence[Lock],
        outputs: Iterable[CsvLog | UpdateTraceWriter],
        snapshots: Snapshots | None,
    ):
        self._args, self._loaded, self._prefill = args, loaded, prefill
        self._locks, self._outputs, self._snapshots = locks, outputs, snapshots
        self._saved = time.monotonic()

    def save(self, *, draw: bool = True) -> None:
        for lock in self._locks:
            lock.check()
        for output in self._outputs:
            output.sync()
        prefill, args = self._prefill, self._args
        # Smaller only at the end: reading must go on from what it stopped at.
        stored = (args.session_precision, args.session_rank)
        is_last = prefill.done == prefill.total
        save_prefill(args.save_session, self._loaded, prefill, *(stored if is_last else ()))
        for output in self._outputs:
            if draw and isinstance(output, UpdateTraceWriter):
                output.finish()
        self._saved = time.monotonic()

    def step(self) -> None:
        """After a stretch: keeps or saves if it is time."""
        if self.keep():
            return
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()

    def keep(self) -> bool:
        """Saves and keeps a copy, if one is due here."""
        prefill = self._prefill
        is_due = self._snapshots and self._snapshots.is_due(prefill.done)
        if not self._snapshots or not is_due or prefill.done == prefill.total:
            return False
        self.save(draw=False)
        self._snapshots.take()
        return True
