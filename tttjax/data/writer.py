"""Writes shards: append-only files that can be truncated to the last recorded state.

A writer's `state()` is plain JSON. To resume, `prepare` truncates the files to the recorded sizes
and appends; the CRC-32 of a file continues from the recorded value.
"""

import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from tttjax.data.manifest import TARGETS, counts_of, parts_of
from tttjax.errors import UserError

SKIPPED = ("empty", "short", "duplicates")  # documents, by the reason


@dataclass(frozen=True)
class EncodedSpan:
    """Tokens of a document or of a span of it. split: None for the one of `SplitRule`.

    targets: bool [N], the tokens that are targets; None: all.
    signature: MinHash of the text (`near_duplicates`), if near duplicates are dropped.
    """

    document: str
    tokens: np.ndarray
    num_bytes: int
    is_first: bool = True
    is_last: bool = True
    split: str | None = None
    targets: np.ndarray | None = None
    signature: bytes = b""


class _ShardFiles:
    """The open files of one shard, with their sizes and running checksums."""

    def __init__(
        self, folder: Path, name: str, is_masked: bool, state: dict[str, Any] | None = None
    ):
        self.name, parts = name, parts_of(is_masked)
        self.counts = dict.fromkeys(counts_of(is_masked), 0)
        self.files = {part: {"size": 0, "crc32": 0} for part in parts}
        if state:
            self.counts = {count: state[count] for count in self.counts}
            self.files = state["files"]
        self._streams: dict[str, IO[bytes]] = {}
        for part in parts:
            path = folder / f"{name}.{part}"
            if state:
                truncate(path, self.files[part])
            self._streams[part] = path.open("ab" if state else "wb")

    def write(self, part: str, content: bytes) -> None:
        self._streams[part].write(content)
        entry = self.files[part]
        entry["size"] += len(content)
        entry["crc32"] = zlib.crc32(content, entry["crc32"])

    def write_tokens(self, tokens: np.ndarray, targets: np.ndarray | None) -> None:
        """Appends tokens and, in masked data, the spans of them that are targets."""
        if targets is not None:
            edges = np.diff(np.concatenate(([0], targets, [0])).astype(np.int8))
            spans = np.stack((np.flatnonzero(edges > 0), np.flatnonzero(edges < 0)), axis=1)
            self.write(TARGETS, (spans + self.counts["tokens"]).astype("<i8").tobytes())
            self.counts[TARGETS] += int(targets.sum())
        self.write("tokens", tokens.tobytes())
        self.counts["tokens"] += len(tokens)

    def state(self) -> dict[str, Any]:
        """Flushes to disk; returns counts, sizes and checksums."""
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())
        return self.mark()

    def mark(self) -> dict[str, Any]:
        """Counts, sizes and checksums so far."""
        return {
            "name": self.name,
            **self.counts,
            "files": {part: dict(entry) for part, entry in self.files.items()},
        }

    def go_back(self, mark: dict[str, Any]) -> None:
        """Removes what was written after `mark`."""
        self.counts = {count: mark[count] for count in self.counts}
        self.files = mark["files"]
        for part, stream in self._streams.items():
            stream.truncate(stream.seek(self.files[part]["size"]))

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()


def truncate(path: Path, entry: dict[str, int]) -> None:
    """Truncates a file to its recorded size. UserError if the checksum differs."""
    remaining, crc = entry["size"], 0
    if path.exists():
        with path.open("rb") as file:
            while remaining and (block := file.read(min(remaining, 1 << 22))):
                crc, remaining = zlib.crc32(block, crc), remaining - len(block)
    if remaining or crc != entry["crc32"] or not path.exists():
        raise UserError(
            f"{path} has changed since `tttjax prepare` was interrupted; delete {path.parent} "
            "and prepare it again."
        )
    os.truncate(path, entry["size"])


class SplitWriter:
    """Appends documents to the shards of one split.

    Prepends BOS and appends EOS to each document if given, and drops documents without text, of
    fewer than `min_tokens` tokens (BOS and EOS included), or that are said to be duplicates. A
    document lies in one shard; a shard is closed after the document that fills it. is_masked: spans
    say which tokens are targets; BOS and EOS that are added are none. on_closed: called with the
    state of a shard that is complete.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: np.dtype,
        *,
        shard_tokens: int,
        bos: int | None = None,
        eos: int | None = None,
        min_tokens: int = 0,
        is_masked: bool = False,
        state: dict[str, Any] | None = None,
        on_closed: Callable[[dict[str, Any]], None] = lambda shard: None,
    ):
        self._folder, self.split, self._dtype = folder, split, dtype
        self._on_closed = on_closed
        self._is_masked = is_masked
        self._shard_tokens, self._min_tokens = shard_tokens, min_tokens
        self._head = np.array([] if bos is None else [bos], dtype)
        self._tail = np.array([] if eos is None else [eos], dtype)
        state = state or {"shards": [], "open": None, "longest": 0}
        self._shards: list[dict[str, Any]] = list(state["shards"])
        self._longest = state["longest"]
        self.skipped: dict[str, int] = {reason: state.get(reason, 0) for reason in SKIPPED}
        current = state["open"]
        self._shard = _ShardFiles(folder, current["name"], is_masked, current) if current else None
        # Tokens and targets of a document below the minimum length so far.
        self._buffer: list[tuple[np.ndarray, np.ndarray | None]] = []
        self._length = self._bytes = 0  # of the document being written
        self._mark: dict[str, Any] | None = None  # of the shard before that document

    def append(self, span: EncodedSpan, is_duplicate: bool = False) -> bool:
        """Appends a span; the spans of a document must be consecutive.

        is_duplicate: of the last span, whether to drop the document. Returns whether the span
        completes a document that stays.
        """
        if span.is_first:
            self._mark = None
            self._buffer, self._length, self._bytes = [self._added(self._head)], len(self._head), 0
        tokens = span.tokens.astype(self._dtype)
        self._buffer.append((tokens, span.targets))
        self._length += len(tokens)
        self._bytes += span.num_bytes
        has_text = self._length > len(self._head)
        if span.is_last and has_text:
            self._buffer.append(self._added(self._tail))
            self._length += len(self._tail)
        if has_text and self._length >= self._min_tokens:
            if is_duplicate:
                return self._drop("duplicates")
            shard = self._open_shard()
            if self._mark is None and not span.is_last:
                self._mark = shard.mark()
            for part in self._buffer:
                shard.write_tokens(*part)
            self._buffer = []
        if span.is_last and self._buffer:  # never reached the minimum
            return self._drop("short" if has_text else "empty")
        if span.is_last:
            self._end_document(span.document)
        return span.is_last

    def _drop(self, reason: str) -> bool:
        self.skipped[reason] += 1
        self._buffer = []
        if self._mark and self._shard:
            self._shard.go_back(self._mark)
        return False

    def _added(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return tokens, np.zeros(len(tokens), bool) if self._is_masked else None

    def _end_document(self, name: str) -> None:
        shard = self._open_shard()
        shard.counts["documents"] += 1
        shard.counts["bytes"] += self._bytes
        row = [shard.counts["tokens"], self._bytes]
        shard.write("documents", np.array(row, "<i8").tobytes())
        shard.write("names", (json.dumps(name) + "\n").encode())
        self._longest = max(self._longest, self._length)
        if shard.counts["tokens"] >= self._shard_tokens:
            self._close_shard()

    def _open_shard(self) -> _ShardFiles:
        if self._shard is None:
            name = f"{self.split}-{len(self._shards):05d}"
            self._shard = _ShardFiles(self._folder, name, self._is_masked)
        return self._shard

    def _close_shard(self) -> None:
        if self._shard is not None:
            shard, self._shard = self._shard, None
            state = shard.state()
            shard.close()
            if state["documents"]:  # not if the only one was a duplicate
                self._shards.append(state)
                self._on_closed(state)

    def state(self) -> dict[str, Any]:
        """JSON state to resume from. Call it only between documents."""
        return {
            "shards": list(self._shards),
            "open": self._shard.state() if self._shard else None,
            "longest": self._longest,
            **self.skipped,
        }

    def finish(self) -> dict[str, Any]:
        """Closes the files and returns the split's manifest entry."""
        self._close_shard()
        entry: dict[str, Any] = {
            key: sum(shard[key] for shard in self._shards) for key in counts_of(self._is_masked)
        }
        return entry | {"longest_document": self._longest, "shards": self._shards}

    def abandon(self) -> None:
        """Closes the files without finishing the shard."""
        if self._shard is not None:
            self._shard.close()
