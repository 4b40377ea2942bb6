"""A text on its way into a session: where it stands, and the next stretch of it."""

import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tttjax.data.documents import LINES, ROWS, InputFile, list_inputs, read_pieces
from tttjax.data.stretches import encode_piece
from tttjax.data.tokenizers.base import Tokenizer
from tttjax.errors import UserError
from tttjax.inference.session import CHUNKS_PER_CALL, Session
from tttjax.inference.session_file import LOSSES, About, read_about, save_session
from tttjax.inference.update_trace import TracingEngine
from tttjax.runs.chunk_log import ChunkRow, chunk_rows
from tttjax.runs.load import LoadedModel, load_or_start_session

STATIC_TOKENS_PER_CALL = 2048  # tokens read at once by a model that does not learn


@dataclass
class TextPrefill:
    """A text, of which `done` of `total` tokens were read into the session.

    mark: what tells the text from others. losses, losses_after: of the last chunks, as `About` has
    them.
    """

    file: InputFile
    mark: str
    total: int
    session: Session
    done: int
    losses: deque[float]
    losses_after: deque[float | None]

    @property
    def learned_tokens(self) -> int:
        """Tokens of the session that were learned from."""
        return self.session.tokens - len(self.session.pending)

    def source(self) -> dict[str, Any]:
        """What a session file says of the text."""
        return {
            "text": self.file.id,
            "mark": self.mark,
            "tokens": self.done,
            "of": self.total,
        }


def find_text(name: str) -> InputFile:
    """The file of that name. UserError if it is none, or holds several texts."""
    files = list_inputs([name])
    if len(files) != 1:
        raise UserError(f"{name} holds {len(files)} texts; name one file")
    if files[0].kind in (LINES, ROWS):
        raise UserError(
            f"{name} holds the texts of many documents ({files[0].kind}); name a file of one text"
        )
    return files[0]


def start_prefill(opened: LoadedModel, file: InputFile, base: str | None) -> TextPrefill:
    """At the start of a text, after the session of the file `base` if one is given.

    Raises UserError for a text without tokens.
    """
    total = count(opened.tokenizer, file)
    session = load_or_start_session(opened, base)
    if not session.tokens and opened.tokenizer.bos_id is not None:
        session, _ = opened.engine.read(session, np.array([opened.tokenizer.bos_id]))
    return TextPrefill(
        file, mark(file), total, session, 0, deque(maxlen=LOSSES), deque(maxlen=LOSSES)
    )


def resume_prefill(opened: LoadedModel, file: InputFile, path: str | Path) -> TextPrefill:
    """Where reading was when the session file was saved. UserError if it was of another text."""
    before = read_about(path)
    if not is_session_of(before, file):
        name = before.source.get("text", "a prompt")
        changed = ", which has changed since" if name == file.id else ""
        raise UserError(
            f"{path} holds the session of another text ({name}{changed}); give another "
            "--save-session, and --session to go on from that one"
        )
    now = how(opened)
    if before.source.get("how", now) != now:
        raise UserError(
            f"{path} was read {before.source['how']}, and would go on {now}: give the same --learn "
            "and --mode as before"
        )
    total = count(opened.tokenizer, file)
    session, losses = load_or_start_session(opened, str(path)), deque(before.chunk_losses, LOSSES)
    after = deque(before.chunk_losses_after, LOSSES)
    return TextPrefill(file, mark(file), total, session, before.source["tokens"], losses, after)


def how(opened: LoadedModel) -> str:
    """How a model reads, in words."""
    reader = opened.engine.reader
    if not reader.chunk_size:
        return "without learning"
    return f"learning from every {reader.chunk_size} tokens at a rate of {reader.lr:g}"


def is_session_of(about: About, file: InputFile) -> bool:
    """Whether a session is of this text, as it is now."""
    return about.source.get("mark") == mark(file)


def mark(file: InputFile) -> str:
    """What tells one text from another: its size and its beginning."""
    with open(file.path, "rb") as stream:
        return hashlib.sha256(stream.read(1 << 20)).hexdigest()[:16] + f"-{file.size}"


def count(tokenizer: Tokenizer, file: InputFile) -> int:
    """Tokens of the text. UserError if there are none.

    Counted beforehand, so that progress can be told; to tokenize is little beside learning.
    """
    total = sum(len(part) for part in _tokens(tokenizer, file))
    if not total:
        raise UserError(f"{file.path} is empty: there is nothing to read")
    return total


def tokens_per_call(opened: LoadedModel) -> int:
    """Tokens that are read at once: states on the way exist at multiples of it."""
    return CHUNKS_PER_CALL * opened.engine.reader.chunk_size or STATIC_TOKENS_PER_CALL


def run_prefill(
    opened: LoadedModel, reading: TextPrefill, until: int | None = None
) -> Iterator[list[ChunkRow]]:
    """Reads on, at most `until` so many tokens of the text are read; gives rows by stretch.

    The first stretch ends where one would have ended that began with the text, so that what is read
    after a stop is what would have been read without.
    """
    size, chunk = tokens_per_call(opened), opened.engine.reader.chunk_size
    until = reading.total if until is None else until
    for token_T in _split_at_multiples(
        _tokens(opened.tokenizer, reading.file), size, reading.done, until
    ):
        reading.session, seen = opened.engine.read(reading.session, token_T)
        reading.done += len(token_T)
        rows = chunk_rows(seen, reading.learned_tokens, chunk)
        reading.losses.extend(row.loss for row in rows)
        reading.losses_after.extend(row.loss_after for row in rows)
        yield rows


def _tokens(tokenizer: Tokenizer, file: InputFile) -> Iterator[np.ndarray]:
    for piece in read_pieces(file):
        yield encode_piece(tokenizer, piece)[0]


def _split_at_multiples(
    parts: Iterator[np.ndarray], size: int, first: int, until: int
) -> Iterator[np.ndarray]:
    """The tokens from `first` to `until`, in arrays that end at multiples of `size`."""
    held, at = np.zeros(0, np.int32), 0
    for part in parts:
        if at == until:
            return
        held = np.concatenate((held, part))
        while len(held) and at < until:
            end = min((max(at, first) // size + 1) * size, until)
            if at < first:
                end = min(first, at + len(held))
            if at + len(held) < end:
                break
            taken, held = held[: end - at], held[end - at :]
            if at >= first:
                yield taken
            at = end
    if len(held) and first <= at < until:
        yield held


def save(
    path: str | Path,
    opened: LoadedModel,
    reading: TextPrefill,
    precision: str = "float32",
    rank: int = 0,
) -> About:
    """Writes the session file of a reading."""
    looked = {"telescope": True} if isinstance(opened.engine, TracingEngine) else {}
    return save_session(
        path,
        opened.engine,
        reading.session,
        model=opened.model_fingerprint,
        tokenizer=opened.tokenizer_fingerprint,
        precision=precision,
        rank=rank,
        chunk_losses=list(reading.losses),
        chunk_losses_after=list(reading.losses_after),
        source={**reading.source(), "how": how(opened), **looked},
    )
