"""Sessions, and the buckets in which their prompts are prefilled."""

from dataclasses import dataclass, field, replace

import numpy as np

from tttjax.inference.prefill import Context
from tttjax.ttt.chunk import ChunkRecords
from tttjax.types import Array

CHUNKS_PER_CALL = 8
BUCKET_BASE = 4  # tokens after the last full chunk: buckets of 1, 4, 16, ...
LARGEST_BUCKET = 1024
NO_TOKENS, NO_TARGETS = np.zeros(0, np.int32), np.zeros(0, bool)


@dataclass(frozen=True)
class Session:
    """The state of one sequence. Immutable.

    learned: the context after the last inner update.
    now: the context after all tokens.
    uncommitted: int32 [n], the tokens since the last update.
    is_target: bool [n], whether each uncommitted token counts in the inner loss.
    tokens: the number of all tokens.
    logit_V: logits of the next token, float32 (None before the first token).
    """

    learned: Context
    now: Context
    uncommitted: np.ndarray
    is_target: np.ndarray
    tokens: int
    logit_V: Array | None

    def commit(self) -> "Session":
        """The session without uncommitted tokens, for a model without inner updates."""
        return replace(self, learned=self.now, uncommitted=NO_TOKENS, is_target=NO_TARGETS)


def bucket_sizes(length: int) -> list[int]:
    """Powers of BUCKET_BASE that add up to `length`, the largest first."""
    sizes, size = [], LARGEST_BUCKET
    while length:
        count, length = divmod(length, size)
        sizes += [size] * count
        size //= BUCKET_BASE
    return sizes


@dataclass(frozen=True)
class PrefillBucket:
    """tokens: how many. chunks: whether they are full chunks, with inner updates."""

    tokens: int
    chunks: bool


@dataclass
class PrefillRequest:
    """A session, its remaining tokens, and the `buckets` that they are split into.

    records: of the chunks processed so far.
    """

    session: Session
    token_T: np.ndarray
    is_target_T: np.ndarray
    buckets: list[PrefillBucket]
    records: list[ChunkRecords] = field(default_factory=list)

    @classmethod
    def of(cls, session: Session, token_T: np.ndarray, learn: bool, size: int) -> "PrefillRequest":
        """New tokens for a session; also its `uncommitted` ones, if their chunk becomes full."""
        is_target_T = np.full(len(token_T), learn)
        total = len(session.uncommitted) + len(token_T)
        chunks = (total - 1) // size if size and len(token_T) else 0
        if chunks:
            token_T = np.concatenate((session.uncommitted, token_T))
            is_target_T = np.concatenate((session.is_target, is_target_T))
            session = replace(
                session,
                uncommitted=NO_TOKENS,
                is_target=NO_TARGETS,
                tokens=session.tokens - len(session.uncommitted),
            )
        many, few = divmod(chunks, CHUNKS_PER_CALL)
        buckets = [PrefillBucket(CHUNKS_PER_CALL * size, True)] * many
        buckets += [PrefillBucket(size, True)] * few
        remaining = len(token_T) - chunks * size
        buckets += [PrefillBucket(length, False) for length in bucket_sizes(remaining)]
        return cls(session, token_T, is_target_T, buckets)

    @property
    def position(self) -> int:
        """Tokens before the next bucket."""
        return self.session.tokens

    def take(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Removes and returns the next tokens and whether each is a target."""
        rows = self.token_T[:length], self.is_target_T[:length]
        self.token_T, self.is_target_T = self.token_T[length:], self.is_target_T[length:]
        return rows
