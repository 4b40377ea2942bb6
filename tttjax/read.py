"""Read a text of any length into a session file, learning from it on the way.

examples:
  tttjax read runs/first book.txt --save-session=book.session
  tttjax generate runs/first --session=book.session --prompt "In the end,"

Memory stays the same however long the text is, and so does the file. It is saved every minute and
when reading is stopped (Ctrl-C, SIGTERM); the same command goes on from there. With --log, the loss
of every chunk before learning from it goes to a CSV file.
"""

import argparse
import csv
import hashlib
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from tttjax.chunk_step import Records
from tttjax.data.documents import InputFile, list_inputs, read_pieces
from tttjax.data.encode import encode_text
from tttjax.data.tokenizers import Tokenizer
from tttjax.errors import UserError
from tttjax.evaluate.progress import Progress
from tttjax.generate import add_model_arguments, open_from, start_session
from tttjax.generate.opened import Opened
from tttjax.inference.session import CHUNKS_AT_ONCE, Session
from tttjax.inference.session_file import (
    LOSSES,
    PRECISIONS,
    check_stored,
    read_about,
    save_session,
)
from tttjax.precision import as_configured
from tttjax.run_control import StopRequest

EXIT_STOPPED = 75  # saved; the same command goes on
SAVE_EVERY = 60.0  # seconds
STATIC_STRETCH = 2048  # tokens read at once by a model that does not learn
HEAD = ("tokens", "loss", "grad_norm")  # read by the end of the chunk, nats per token, its norm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax read`."""
    add = parser.add_argument
    add("workdir", metavar="WORKDIR", help="work directory, or checkpoint, of a run")
    add("text", metavar="FILE", help="text to read: UTF-8, also .gz, .xz, .bz2, .zst")
    add("--save-session", required=True, metavar="FILE", help="where everything read is kept")
    add("--session", metavar="FILE", help="go on from this one (default: begin anew)")
    add("--session-precision", choices=PRECISIONS, default="float32", help="(default %(default)s)")
    add("--session-rank", type=int, default=0, metavar="N", help="of stored changes; 0: full")
    add("--log", metavar="FILE.csv", help="loss and gradient norm of every chunk")
    add_model_arguments(parser)


@dataclass
class Reading:
    """Where a text stands in being read: `done` of `total` tokens. losses: of the last chunks.

    text: what tells it from others.
    """

    file: InputFile
    text: dict[str, str]
    total: int
    session: Session
    done: int
    losses: deque[float]


def run(args: argparse.Namespace) -> int:
    """`tttjax read` from parsed arguments; the exit code."""
    check_stored(args.session_precision, args.session_rank)
    (file,) = _one(list_inputs([args.text]), args.text)
    opened = open_from(args)
    with as_configured(opened.config):
        reading = _begin(args, opened, file)
        left = reading.total - reading.done
        opened.engine.check((), reading.session.tokens + left)
        if left:
            with StopRequest() as stop:
                _read(args, opened, reading, stop, sys.stderr)
            _save(args, opened, reading)
    size = Path(args.save_session).stat().st_size
    tokens = reading.session.tokens
    print(f"{args.save_session}: {tokens:,} tokens in {size:,} bytes", file=sys.stderr)
    return 0 if reading.done == reading.total else EXIT_STOPPED


def _one(files: Sequence[InputFile], name: str) -> Sequence[InputFile]:
    if len(files) != 1:
        raise UserError(f"{name} holds {len(files)} texts; name one file")
    return files


def _mark(file: InputFile) -> str:
    """What tells one text from another: its size and its beginning."""
    with open(file.path, "rb") as stream:
        return hashlib.sha256(stream.read(1 << 20)).hexdigest()[:16] + f"-{file.size}"


def _begin(args: argparse.Namespace, opened: Opened, file: InputFile) -> Reading:
    """Where reading was stopped, if it was; else at the start of the text."""
    # Counted beforehand, so that progress can be told; to tokenize is little beside learning.
    total = sum(len(part) for part in _tokens(opened.tokenizer, file))
    if not total:
        raise UserError(f"{args.text} is empty: there is nothing to read")
    text = {"text": file.id, "mark": _mark(file)}
    path = Path(args.save_session)
    if not path.exists():
        session = start_session(opened, args.session)
        if not session.tokens and opened.tokenizer.bos_id is not None:
            session, _ = opened.engine.read(session, np.array([opened.tokenizer.bos_id]))
        return Reading(file, text, total, session, 0, deque(maxlen=LOSSES))
    before = read_about(path)
    if {name: before.source.get(name) for name in text} != text:
        raise UserError(
            f"{path} holds the session of another text ({before.source.get('text', 'a prompt')}); "
            "give another --save-session, and --session to go on from that one"
        )
    session, losses = start_session(opened, str(path)), deque(before.chunk_losses, LOSSES)
    return Reading(file, text, total, session, before.source["tokens"], losses)


def _tokens(tokenizer: Tokenizer, file: InputFile) -> Iterator[np.ndarray]:
    for piece in read_pieces(file):
        yield encode_text(tokenizer, piece.text)


def _stretches(parts: Iterator[np.ndarray], size: int, skip: int) -> Iterator[np.ndarray]:
    """The tokens after the first `skip`, in arrays of `size`."""
    held = np.zeros(0, np.int32)
    for part in parts:
        held = np.concatenate((held, part))
        dropped = min(skip, len(held))
        held, skip = held[dropped:], skip - dropped
        while len(held) >= size:
            yield held[:size]
            held = held[size:]
    if len(held):
        yield held


def _read(
    args: argparse.Namespace, opened: Opened, reading: Reading, stop: StopRequest, stream: TextIO
) -> None:
    """Reads on, to the end or until it is to stop."""
    chunk = opened.engine.reader.chunk_size
    progress = Progress(reading.total - reading.done, stream, title="read")
    saved = time.monotonic()
    stretch = CHUNKS_AT_ONCE * chunk or STATIC_STRETCH
    parts = _tokens(opened.tokenizer, reading.file)
    with _Log(args.log, reading.session.tokens - len(reading.session.pending)) as log:
        for number, token_T in enumerate(_stretches(parts, stretch, reading.done)):
            reading.session, seen = opened.engine.read(reading.session, token_T)
            reading.done += len(token_T)
            log.add(reading, seen, chunk)
            recent = list(reading.losses)[-CHUNKS_AT_ONCE:]
            progress.what = f"loss {np.mean(recent):.4f}" if recent else reading.file.id
            progress.add(len(token_T))
            if stop.after(number):
                break
            if time.monotonic() - saved > SAVE_EVERY:
                _save(args, opened, reading)
                saved = time.monotonic()
    progress.close()


class _Log:
    """Losses as they come: of the last chunks for the session, of all for a CSV file."""

    def __init__(self, path: str | None, done: int):
        self._path, self._done = path, done
        self._file: TextIO | None = None

    def __enter__(self) -> "_Log":
        if self._path:
            rows = [HEAD, *self._earlier(Path(self._path))]
            temporary = self._path + ".tmp"
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows)
            os.replace(temporary, self._path)
            self._file = open(self._path, "a", newline="", encoding="utf-8")
            self._rows = csv.writer(self._file)
        return self

    def _earlier(self, path: Path) -> list[list[str]]:
        """What was noted of the text up to where reading goes on."""
        if not self._done or not path.exists():
            return []
        try:
            with path.open(newline="", encoding="utf-8") as file:
                return [row for row in list(csv.reader(file))[1:] if int(row[0]) <= self._done]
        except (ValueError, IndexError) as error:
            raise UserError(
                f"{path} is no log of this command, or its last line is cut off; remove that line, "
                "or name another --log"
            ) from error

    def __exit__(self, *_: Any) -> None:
        if self._file:
            self._file.close()

    def add(self, reading: Reading, seen: Sequence[Records], chunk: int) -> None:
        """Notes what the chunks showed that have just become full."""
        columns = [
            np.concatenate([np.asarray(getattr(s, name))[:, 0] for s in seen]).tolist()
            for name in ("loss_NB", "grad_norm_NB")
            if seen
        ]
        rows = list(zip(*columns, strict=True))
        tokens = reading.session.tokens - len(reading.session.pending) - len(rows) * chunk
        for loss, norm in rows:
            tokens += chunk
            reading.losses.append(loss)
            if self._file:
                self._rows.writerow((tokens, f"{loss:.6f}", f"{norm:.6f}"))
        if self._file:
            self._file.flush()


def _save(args: argparse.Namespace, opened: Opened, reading: Reading) -> None:
    # Smaller only at the end: reading must go on from what it stopped at.
    is_last = reading.done == reading.total
    save_session(
        args.save_session,
        opened.engine,
        reading.session,
        model=opened.model,
        tokenizer=opened.tokenizer_mark,
        precision=args.session_precision if is_last else "float32",
        rank=args.session_rank if is_last else 0,
        chunk_losses=list(reading.losses),
        source={**reading.text, "tokens": reading.done, "of": reading.total},
    )
