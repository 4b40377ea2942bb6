"""Remembers the documents of `prepare`, to drop those that repeat an earlier one.

exact: the same tokens and targets, by a digest of 128 bits. near: about the same words
(`near_duplicates`). Only documents that are written are remembered. The digests are also in a file,
from which an interrupted run goes on.
"""

import hashlib
import os
import zlib
from pathlib import Path

from tttjax.data import near_duplicates
from tttjax.data.prepare_settings import EXACT
from tttjax.data.writer import EncodedSpan, truncate

DIGESTS_FILE = "prepare.digests"
_EXACT_BYTES, _BAND_BYTES = 16, 8


class Duplicates:
    """The digests of the documents so far. state: that of the run to continue."""

    def __init__(self, folder: Path, kind: str, state: dict[str, int] | None = None):
        self._is_exact, self._path = kind == EXACT, folder / DIGESTS_FILE
        self._entry = state or {"size": 0, "crc32": 0}
        self._seen: set[bytes] = set()
        self._unwritten = bytearray()
        if not state:
            self._path.unlink(missing_ok=True)
        else:
            truncate(self._path, state)
            size = _EXACT_BYTES if self._is_exact else _BAND_BYTES
            with self._path.open("rb") as file:
                self._seen.update(iter(lambda: file.read(size), b""))
        self._tokens, self._signature = hashlib.blake2b(), b""
        self._digests: list[bytes] = []  # of the document that is complete

    def repeats(self, span: EncodedSpan) -> bool:
        """Whether `span` completes a document that repeats one. Needs all spans, in order."""
        if self._is_exact:
            self._add_tokens(span)
        elif span.is_first:
            self._signature = span.signature
        else:
            self._signature = near_duplicates.merge(self._signature, span.signature)
        if not span.is_last:
            return False
        self._digests = (
            [self._tokens.digest()] if self._is_exact else near_duplicates.bands(self._signature)
        )
        return not self._seen.isdisjoint(self._digests)

    def _add_tokens(self, span: EncodedSpan) -> None:
        if span.is_first:
            self._tokens = hashlib.blake2b(digest_size=_EXACT_BYTES)
        self._tokens.update(span.tokens.tobytes())
        if span.targets is not None:
            self._tokens.update(span.targets.tobytes())

    def remember(self) -> None:
        """Remembers the document that the last span completed."""
        self._seen.update(self._digests)
        self._unwritten += b"".join(self._digests)

    def state(self) -> dict[str, int]:
        """Appends the new digests to the file; returns its size and checksum."""
        with self._path.open("ab") as file:
            file.write(self._unwritten)
            file.flush()
            os.fsync(file.fileno())
        size = self._entry["size"] + len(self._unwritten)
        self._entry = {"size": size, "crc32": zlib.crc32(self._unwritten, self._entry["crc32"])}
        self._unwritten.clear()
        return self._entry
