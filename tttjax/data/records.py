"""Records: sequences of T+1 tokens with random access, for training.

Two layouts. "stream", as in the papers: the split is one stream, divided without regard to
documents; record i is tokens[i*T : (i+1)*T + 1], so consecutive records share a token, and there
are (N-1) // T records. "documents": a record never crosses documents; a document longer than T is
divided into consecutive records in the same way, and the last is padded.

Of masked data, records without a token to learn are left out.
"""

from typing import NamedTuple, Protocol

import numpy as np

from tttjax.data.shards import TokenSplit
from tttjax.errors import UserError

PADDING = -1


class Record(NamedTuple):
    """tokens_S: int32 [T+1], PADDING after the end of a short record. starts_S: bool [T+1], whether
    a token is the first of a document; targets_S: bool [T+1], whether it is a target, False at
    padding. Both are unspecified at index 0, which is not a target."""

    tokens_S: np.ndarray
    starts_S: np.ndarray
    targets_S: np.ndarray


class RecordSource(Protocol):
    """A Grain random-access source of records."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class StreamRecords:
    """Layout "stream"."""

    def __init__(self, split: TokenSplit, seq_len: int):
        self._split, self._seq_len = split, seq_len
        self._length = max(split.num_tokens - 1, 0) // seq_len
        self._chosen: np.ndarray | None = None  # of masked data: the records that have targets
        if split.is_masked:
            first = np.arange(self._length, dtype=np.int64) * seq_len + 1
            self._chosen = np.flatnonzero(split.has_targets(first, first + seq_len))
            self._length = len(self._chosen)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        number = int(index if self._chosen is None else self._chosen[index])
        start = number * self._seq_len
        stop = start + self._seq_len + 1
        starts_S = np.zeros(stop - start, bool)
        starts_S[self._split.document_starts(start, stop) - start] = True
        return Record(self._split.read(start, stop), starts_S, self._split.targets(start, stop))


class DocumentRecords:
    """Layout "documents". starts, stops: int64 [records], token ranges in the split."""

    def __init__(self, split: TokenSplit, seq_len: int, starts: np.ndarray, stops: np.ndarray):
        self._split, self._seq_len = split, seq_len
        self.starts, self.stops = starts, stops

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Record:
        start, stop = int(self.starts[index]), int(self.stops[index])
        size, length = self._seq_len + 1, stop - start
        tokens_S = np.full(size, PADDING, np.int32)
        tokens_S[:length] = self._split.read(start, stop)
        targets_S = np.zeros(size, bool)
        targets_S[:length] = self._split.targets(start, stop)
        return Record(tokens_S, np.zeros(size, bool), targets_S)


def stream_records(split: TokenSplit, seq_len: int) -> StreamRecords:
    """Raises UserError if the split is shorter than one record."""
    records = StreamRecords(split, seq_len)
    if not len(records):
        if split.num_tokens > seq_len:
            raise _no_targets(split)
        raise UserError(
            f"The split {split.name!r} of {split.folder} has {split.num_tokens} tokens, fewer than "
            f"one sequence of {seq_len} + 1; prepare more text or lower train.seq_len."
        )
    return records


def document_records(split: TokenSplit, seq_len: int, min_length: int = 1) -> DocumentRecords:
    """Records with at least `min_length` targets.

    Raises UserError if no document fills a record: every sequence would have padding.
    """
    starts, stops = split.document_bounds()
    targets = stops - starts - 1  # the first token of a document is not a target
    longest = int(targets.max(initial=-1)) + 1
    if longest <= seq_len:
        raise UserError(
            f"The longest document of the split {split.name!r} of {split.folder} has {longest} "
            f"tokens, fewer than one sequence of {seq_len} + 1; prepare longer documents, lower "
            "train.seq_len, or join documents with data.layout=stream."
        )
    counts = -(-targets // seq_len)  # records per document; 0 for a document of one token
    document = np.repeat(np.arange(len(starts)), counts)
    index = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = starts[document] + index * seq_len
    end = np.minimum(begin + seq_len + 1, stops[document])
    keep = (end - begin - 1 >= min_length) & split.has_targets(begin + 1, end)
    if split.is_masked and not keep.any():
        raise _no_targets(split)
    return DocumentRecords(split, seq_len, begin[keep], end[keep])


def _no_targets(split: TokenSplit) -> UserError:
    return UserError(
        f"No sequence of the split {split.name!r} of {split.folder} has a target; prepare more "
        "conversations."
    )
