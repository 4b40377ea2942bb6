"""A sequence that is being read: what was read of it, and the pieces in which the rest is."""

from dataclasses import dataclass, field, replace

import numpy as np

from tttjax.inference.prefill import Context
from tttjax.ttt.chunk import ChunkRecords
from tttjax.types import Array

CHUNKS_PER_CALL = 8
PIECE = 4  # the rest of a text is read in pieces of 1, 4, 16, ... tokens
LARGEST_PIECE = 1024
NO_TOKENS, NO_MARKS = np.zeros(0, np.int32), np.zeros(0, bool)


@dataclass(frozen=True)
class Session:
    """One sequence: what was read of it and learned from it. Never changed, always replaced.

    pending: int32 [n], the tokens read since `learned`; counted: bool [n], whether each is one to
    learn from. tokens: all that were read. logit_V: of the next token, float32 (None: nothing has
    been read).
    """

    learned: Context
    now: Context
    pending: np.ndarray
    counted: np.ndarray
    tokens: int
    logit_V: Array | None

    def settled(self) -> "Session":
        """As it stands where nothing more is learned: nothing is pending."""
        return replace(self, learned=self.now, pending=NO_TOKENS, counted=NO_MARKS)


def pieces(length: int) -> list[int]:
    """Sizes that add up to `length`: powers of PIECE, the largest first."""
    sizes, size = [], LARGEST_PIECE
    while length:
        count, length = divmod(length, size)
        sizes += [size] * count
        size //= PIECE
    return sizes


@dataclass(frozen=True)
class PrefillBucket:
    """tokens: how many. chunks: whether they are whole chunks, to learn from."""

    tokens: int
    chunks: bool


@dataclass
class PrefillRequest:
    """A session and the tokens that it has still to read, in `pieces`; seen: of chunks, so far."""

    session: Session
    token_T: np.ndarray
    counted_T: np.ndarray
    pieces: list[PrefillBucket]
    seen: list[ChunkRecords] = field(default_factory=list)

    @classmethod
    def of(cls, session: Session, token_T: np.ndarray, learn: bool, size: int) -> "PrefillRequest":
        """New tokens for a session; `pending` ones too, if their chunk becomes full."""
        counted_T = np.full(len(token_T), learn)
        known = len(session.pending) + len(token_T)
        chunks = (known - 1) // size if size and len(token_T) else 0
        if chunks:
            token_T = np.concatenate((session.pending, token_T))
            counted_T = np.concatenate((session.counted, counted_T))
            session = replace(
                session,
                pending=NO_TOKENS,
                counted=NO_MARKS,
                tokens=session.tokens - len(session.pending),
            )
        many, few = divmod(chunks, CHUNKS_PER_CALL)
        whole = [PrefillBucket(CHUNKS_PER_CALL * size, True)] * many + [
            PrefillBucket(size, True)
        ] * few
        rest = [PrefillBucket(length, False) for length in pieces(len(token_T) - chunks * size)]
        return cls(session, token_T, counted_T, whole + rest)

    @property
    def place(self) -> int:
        """Tokens before the next piece."""
        return self.session.tokens

    def take(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The next tokens and their marks."""
        taken = self.token_T[:length], self.counted_T[:length]
        self.token_T, self.counted_T = self.token_T[length:], self.counted_T[length:]
        return taken
