"""Prefilling a session with a long text, in steps, with saving and resuming."""

import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tttjax.data.documents import file_spans
from tttjax.data.inputs import LINES, ROWS, InputFile, list_inputs
from tttjax.data.streams import READ_ERRORS, open_raw, unreadable
from tttjax.data.text_spans import encode_span
from tttjax.data.tokenizers.base import Tokenizer
from tttjax.errors import UserError
from tttjax.inference.session import CHUNKS_PER_CALL, Session
from tttjax.inference.session_file import LOSSES, SessionHeader, read_header, save_session
from tttjax.inference.static_read import StaticEngine
from tttjax.inference.update_trace import TracingEngine
from tttjax.runs.chunk_log import ChunkRow, chunk_rows
from tttjax.runs.load import LoadedModel, load_or_start_session

STATIC_TOKENS_PER_CALL = 2048  # for a model without an inner loop


@dataclass
class TextPrefill:
    """Progress of a prefill: `done` of the text's `total` tokens are in the session.

    losses, losses_after: of the last chunks, as in `SessionHeader`. static: a session at the same
    tokens without any update, to compare with (None: no comparison).
    """

    file: InputFile
    text_fingerprint: str
    total: int
    session: Session
    done: int
    losses: deque[float]
    losses_after: deque[float | None]
    static: Session | None = None

    @property
    def learned_tokens(self) -> int:
        """Tokens of the session that inner updates have used."""
        return self.session.tokens - len(self.session.uncommitted)

    def source(self) -> dict[str, Any]:
        """The record of the text in a session file."""
        return {
            "text": self.file.id,
            "mark": self.text_fingerprint,
            "tokens": self.done,
            "of": self.total,
        }


def find_text(name: str) -> InputFile:
    """The text file of that name. UserError if there is none, or it holds several documents."""
    files = list_inputs([name])
    if len(files) != 1:
        raise UserError(f"{name} holds {len(files)} texts; name one file")
    if files[0].kind in (LINES, ROWS):
        raise UserError(f"{name} holds many documents ({files[0].kind}); name a file of one text")
    return files[0]


def start_prefill(loaded: LoadedModel, file: InputFile, base: str | None) -> TextPrefill:
    """A prefill at the start of a text, into the session of the file `base` or an empty one.

    Raises UserError for a text without tokens.
    """
    total = count_tokens(loaded.tokenizer, file)
    session = load_or_start_session(loaded, base)
    if not session.tokens and loaded.tokenizer.bos_id is not None:
        session, _ = loaded.engine.read(session, np.array([loaded.tokenizer.bos_id]))
    return TextPrefill(
        file, text_fingerprint(file), total, session, 0, deque(maxlen=LOSSES), deque(maxlen=LOSSES)
    )


def resume_prefill(loaded: LoadedModel, file: InputFile, path: str | Path) -> TextPrefill:
    """The prefill that a session file was saved from.

    Raises UserError if the file is of another text or another inner loop.
    """
    header = read_header(path)
    if not is_session_of(header, file):
        name = header.source.get("text", "a prompt")
        changed = ", which has changed since" if name == file.id else ""
        raise UserError(
            f"{path} holds the session of another text ({name}{changed}); give another "
            "--save-session, and --session to continue from that one"
        )
    current = describe_learning(loaded)
    if header.source.get("how", current) != current:
        raise UserError(
            f"{path} was read {header.source['how']}, and would go on {current}: give the same "
            "--learn and --mode as before"
        )
    return TextPrefill(
        file=file,
        text_fingerprint=text_fingerprint(file),
        total=count_tokens(loaded.tokenizer, file),
        session=load_or_start_session(loaded, str(path)),
        done=header.source["tokens"],
        losses=deque(header.chunk_losses, LOSSES),
        losses_after=deque(header.chunk_losses_after, LOSSES),
    )


def describe_learning(loaded: LoadedModel) -> str:
    """Chunk size and rate of the inner loop in words. Session files hold this: do not change it."""
    reader = loaded.engine.inference_model
    if not reader.chunk_size:
        return "without learning"
    return f"learning from every {reader.chunk_size} tokens at a rate of {reader.lr:g}"


def is_session_of(header: SessionHeader, file: InputFile) -> bool:
    """Whether a session was saved while reading this file, which has not changed since."""
    return header.source.get("mark") == text_fingerprint(file)


def text_fingerprint(file: InputFile) -> str:
    """A hash of the file's first MiB, and its size."""
    try:
        with open_raw(file.path) as stream:
            start = stream.read(1 << 20)
    except READ_ERRORS as error:
        raise unreadable(file.path, error) from error
    return hashlib.sha256(start).hexdigest()[:16] + f"-{file.size}"


def count_tokens(tokenizer: Tokenizer, file: InputFile) -> int:
    """Tokens of the text, for the progress line. UserError if there are none."""
    total = sum(len(part) for part in _encode_spans(tokenizer, file))
    if not total:
        raise UserError(f"{file.path} is empty: there is nothing to read")
    return total


def tokens_per_call(loaded: LoadedModel) -> int:
    """Tokens of one `Engine.read` call; snapshots can only be taken at multiples of it."""
    return CHUNKS_PER_CALL * loaded.engine.inference_model.chunk_size or STATIC_TOKENS_PER_CALL


def run_prefill(
    loaded: LoadedModel, prefill: TextPrefill, until: int | None = None
) -> Iterator[list[ChunkRow]]:
    """Prefills the text up to `until` tokens (None: to its end); yields the rows of every call.

    Calls end at multiples of `tokens_per_call` in the text, also after a resume, so that a resumed
    prefill is bit-identical to one that was never stopped.
    """
    size, chunk = tokens_per_call(loaded), loaded.engine.inference_model.chunk_size
    static_engine = StaticEngine(loaded.engine)
    until = prefill.total if until is None else until
    for token_T in _split_at_multiples(
        _encode_spans(loaded.tokenizer, prefill.file), size, prefill.done, until
    ):
        prefill.session, records = loaded.engine.read(prefill.session, token_T)
        prefill.done += len(token_T)
        rows = chunk_rows(records, prefill.learned_tokens, chunk)
        if prefill.static is not None:
            prefill.static, records = static_engine.read(prefill.static, token_T)
            static_rows = chunk_rows(records, prefill.learned_tokens, chunk)
            rows = [
                row._replace(loss_without=static.loss)
                for row, static in zip(rows, static_rows, strict=True)
            ]
        prefill.losses.extend(row.loss for row in rows)
        prefill.losses_after.extend(row.loss_after for row in rows)
        yield rows


def _encode_spans(tokenizer: Tokenizer, file: InputFile) -> Iterator[np.ndarray]:
    for span in file_spans(file):
        yield encode_span(tokenizer, span)[0]


def _split_at_multiples(
    parts: Iterator[np.ndarray], size: int, first: int, until: int
) -> Iterator[np.ndarray]:
    """The tokens from `first` to `until`, in arrays that end at multiples of `size`."""
    buffer, position = np.zeros(0, np.int32), 0
    for part in parts:
        if position == until:
            return
        buffer = np.concatenate((buffer, part))
        while len(buffer) and position < until:
            end = min((max(position, first) // size + 1) * size, until)
            if position < first:
                end = min(first, position + len(buffer))
            if position + len(buffer) < end:
                break
            tokens, buffer = buffer[: end - position], buffer[end - position :]
            if position >= first:
                yield tokens
            position = end
    if len(buffer) and first <= position < until:
        yield buffer


def save_prefill(
    path: str | Path,
    loaded: LoadedModel,
    prefill: TextPrefill,
    precision: str = "float32",
) -> SessionHeader:
    """Writes the session file of a prefill."""
    traced = {"telescope": True} if isinstance(loaded.engine, TracingEngine) else {}
    return save_session(
        path,
        loaded.engine,
        prefill.session,
        model=loaded.model_fingerprint,
        tokenizer=loaded.tokenizer_fingerprint,
        precision=precision,
        chunk_losses=list(prefill.losses),
        chunk_losses_after=list(prefill.losses_after),
        source={**prefill.source(), "how": describe_learning(loaded), **traced},
    )
