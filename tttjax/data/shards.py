"""Prepared data on disk: flat token files with an index of documents.

A prepared data set is a folder:

    manifest.json            written last: a folder without it is unfinished
    tokenizer/               what `load_tokenizer` reads
    train-00000.tokens       token ids, little-endian, uint16 or uint32, one document after another
    train-00000.documents    int64 [documents, 2]: end offset in the token file, UTF-8 bytes
    train-00000.names        one JSON string per line: the documents' names
    train-00000.targets      masked data only, int64 [spans, 2]: start and end offset in the token
                             file of tokens that are targets, ascending; all others are only read
    val-00000.tokens ...

The arrays are flat, so one prepared data set serves every sequence length, and a record is one
slice of a memory map. The manifest holds the size and CRC-32 of every file and its own checksum.
"""

import bisect
import functools
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tttjax.data.file_checks import check_sizes, check_sums, corrupt
from tttjax.data.manifest import SPAN_BYTES, TARGETS, is_masked, parse_manifest
from tttjax.data.tokenizers.base import Tokenizer, load_tokenizer
from tttjax.errors import UserError
from tttjax.io.block_cache import CachedObject, TokenArray
from tttjax.io.paths import is_bucket, storage_path

MANIFEST = "manifest.json"
JOURNAL = "prepare.journal"
TOKENIZER_DIR = "tokenizer"
PARTS = "part-*-of-*"  # folders of several hosts
# Up to this total size, checksums are verified when a run starts, which takes about a second.
AUTO_VERIFY_BYTES = 1 << 30


@dataclass(frozen=True)
class Document:
    """One document of a split: its index, token range, size and name."""

    index: int
    start: int
    stop: int
    num_bytes: int
    name: str


class _Shard:
    """One shard, memory-mapped or in a bucket. Token and document offsets are within the split."""

    def __init__(self, folder: Path, entry: dict[str, Any], dtype: np.dtype):
        self.path = folder / f"{entry['name']}.tokens"
        self.num_tokens: int = entry["tokens"]
        self.num_documents: int = entry["documents"]
        self.names_path = folder / f"{entry['name']}.names"
        self._folder, self._entry, self._dtype = folder, entry, dtype

    @functools.cached_property
    def tokens(self) -> Any:
        """Sliced: [num_tokens] of the data set's dtype."""
        if is_bucket(self.path):
            return TokenArray(self._object("tokens"), self._dtype)
        return np.memmap(self.path, self._dtype, "r", shape=(self.num_tokens,))

    @functools.cached_property
    def documents(self) -> np.ndarray:
        """int64 [documents, 2]: end offset and bytes."""
        return self._rows("documents", self.num_documents)

    @functools.cached_property
    def targets(self) -> np.ndarray:
        """int64 [spans, 2]: start and end offset."""
        size = self._entry["files"].get(TARGETS, {"size": 0})["size"]
        return self._rows(TARGETS, size // SPAN_BYTES)

    def _rows(self, part: str, count: int) -> np.ndarray:
        if not count:
            return np.zeros((0, 2), "<i8")
        path = self._folder / f"{self._entry['name']}.{part}"
        if not is_bucket(path):
            return np.memmap(path, "<i8", "r", shape=(count, 2))
        source = self._object(part)
        content = source.read(0, source.size)
        if zlib.crc32(content) != self._entry["files"][part]["crc32"]:
            raise corrupt(path)
        return np.frombuffer(content, "<i8").reshape(count, 2)

    def _object(self, part: str) -> CachedObject:
        file = self._entry["files"][part]
        path = self._folder / f"{self._entry['name']}.{part}"
        return CachedObject(path, file["size"], file["crc32"])


class TokenSplit:
    """The tokens of one split as one stream, with the boundaries of its documents.

    is_masked: only some of the tokens are targets.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        entry: dict[str, Any],
        dtype: np.dtype,
        is_masked: bool = False,
    ):
        self.folder, self.name, self.is_masked = folder, name, is_masked
        self._shards = [_Shard(folder, shard, dtype) for shard in entry["shards"]]
        self._starts = np.cumsum([0, *(shard.num_tokens for shard in self._shards)])
        self._first_document = np.cumsum([0, *(shard.num_documents for shard in self._shards)])
        self.num_tokens = int(self._starts[-1])
        self.num_documents = int(self._first_document[-1])
        self.num_bytes: int = entry["bytes"]

    def read(self, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start] tokens of the stream."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        out = np.empty(stop - start, np.int32)
        filled = 0
        while filled < len(out):
            local = start + filled - int(self._starts[first])
            part = self._shards[first].tokens[local : local + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            first += 1
        return out

    def targets(self, start: int, stop: int) -> np.ndarray:
        """bool [stop - start] whether each token is a target."""
        if not self.is_masked:
            return np.ones(stop - start, bool)
        out = np.zeros(stop - start, bool)
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while shard < len(self._shards) and self._starts[shard] < stop:
            first, spans = int(self._starts[shard]), self._shards[shard].targets
            low = bisect.bisect_right(spans[:, 1], start - first)
            high = bisect.bisect_left(spans[:, 0], stop - first, low)
            for begin, end in (spans[low:high] + (first - start)).tolist():
                out[max(begin, 0) : end] = True
            shard += 1
        return out

    def has_targets(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """bool: whether any token of the ranges [starts, stops) is a target."""
        if not self.is_masked:
            return stops > starts
        pairs = zip(self._shards, self._starts[:-1], strict=True)
        begin, end = np.concatenate([shard.targets + first for shard, first in pairs]).T
        if not len(begin):
            return np.zeros(len(starts), bool)
        # The first span that ends after the start of a range, if it begins before the range's end.
        index = np.searchsorted(end, starts, side="right")
        return (index < len(begin)) & (begin[np.minimum(index, len(begin) - 1)] < stops)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """int64 offsets in [start, stop) of the stream at which documents start, ascending.

        Bisects the index on disk; never loads all of it into memory.
        """
        starts = []
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while shard < len(self._shards) and self._starts[shard] < stop:
            first = int(self._starts[shard])
            # A document starts where the one before it in the shard ends, the first with the shard.
            ends_D = np.asarray(self._shards[shard].documents)[:-1, 0]
            low = bisect.bisect_left(ends_D, start - first)
            high = bisect.bisect_left(ends_D, stop - first, low)
            starts += [first] * (first >= start) + [first + int(end) for end in ends_D[low:high]]
            shard += 1
        return np.array(starts, np.int64)

    def document_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [documents] start and stop of every document in the stream."""
        ends = [
            shard.documents[:, 0] + start
            for shard, start in zip(self._shards, self._starts[:-1], strict=True)
        ]
        stop = np.concatenate(ends) if ends else np.zeros(0, np.int64)
        return np.concatenate([[0], stop[:-1]]).astype(np.int64), stop

    def document_bytes(self) -> np.ndarray:
        """int64 [documents] UTF-8 bytes of every document."""
        return np.concatenate([shard.documents[:, 1] for shard in self._shards])

    def document_names(self) -> Iterator[str]:
        for shard in self._shards:
            with shard.names_path.open(encoding="utf-8") as lines:
                yield from (json.loads(line) for line in lines)

    def documents(self) -> Iterator[Document]:
        starts, stops = self.document_bounds()
        rows = zip(starts, stops, self.document_bytes(), self.document_names(), strict=True)
        for i, (start, stop, num_bytes, name) in enumerate(rows):
            yield Document(i, int(start), int(stop), int(num_bytes), name)


class PreparedData:
    """A finished prepared data set. Make one with `open_prepared`."""

    def __init__(self, folder: Path, manifest: dict[str, Any], tokenizer: Tokenizer):
        self.folder, self.manifest, self.tokenizer = folder, manifest, tokenizer

    @property
    def fingerprint(self) -> str:
        """The tokenizer's fingerprint."""
        return self.manifest["tokenizer"]["fingerprint"]

    @property
    def splits(self) -> dict[str, dict[str, Any]]:
        """Split name to counts: tokens, documents, bytes, longest_document."""
        return self.manifest["splits"]

    def content_id(self, split: str) -> int:
        """CRC-32 of the shards' checksums; changes when any token or target of the split does."""
        return content_id(self.manifest, split)

    def split(self, name: str) -> TokenSplit:
        """Raises UserError if the split is missing or empty."""
        entry = self.splits.get(name)
        if not entry or not entry["tokens"]:
            available = ", ".join(s for s, e in self.splits.items() if e["tokens"]) or "none"
            raise UserError(
                f"{self.folder} has no documents in the split {name!r} (it has: {available}); "
                "prepare it with a larger --val-fraction or a --split-manifest, or name another "
                "split."
            )
        dtype = np.dtype(self.manifest["dtype"])
        return TokenSplit(self.folder, name, entry, dtype, is_masked(self.manifest))


def open_prepared(
    path: str | os.PathLike, *, verify: bool | None = None, fingerprint: str | None = None
) -> PreparedData:
    """Opens a folder written by `tttjax prepare`.

    File sizes are always checked against the manifest. verify: also check the checksums; by default
    if the files are here and total at most 1 GiB (`tttjax prepare --check` checks any).
    fingerprint: of the tokenizer that the caller's model was trained with.
    Raises UserError naming the file if one is missing or damaged, or if the tokenizer differs.
    """
    folder = storage_path(path)
    manifest = read_manifest(folder)
    total = check_sizes(folder, manifest)
    is_quick = total <= AUTO_VERIFY_BYTES and not is_bucket(folder)
    if verify or (verify is None and is_quick):
        check_sums(folder, manifest)
    tokenizer = load_tokenizer(folder / TOKENIZER_DIR)
    recorded = manifest["tokenizer"]["fingerprint"]
    if tokenizer.fingerprint() != recorded:
        raise UserError(
            f"The tokenizer in {folder / TOKENIZER_DIR} is not the one that made the data "
            f"(fingerprint {tokenizer.fingerprint()[:12]}, data {recorded[:12]}); prepare it again."
        )
    crc = manifest["tokenizer"].get("chat_template_crc32")
    if crc is not None and crc != zlib.crc32(tokenizer.chat_template.encode()):
        raise UserError(
            f"The chat template in {folder / TOKENIZER_DIR} is not the one that made the data; "
            "copy it again, or prepare the data again with --overwrite."
        )
    if fingerprint is not None and fingerprint != recorded:
        raise UserError(
            f"The data in {folder} were made by another tokenizer (fingerprint {recorded[:12]}) "
            f"than the model's ({fingerprint[:12]}); prepare them with the model's tokenizer."
        )
    return PreparedData(folder, manifest, tokenizer)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished data set; UserError if the folder is not one."""
    if not (folder / MANIFEST).exists():
        if (folder / JOURNAL).exists():
            raise UserError(
                f"{folder} is half prepared: `tttjax prepare` was interrupted; run the same "
                "command again to continue."
            )
        if any(folder.glob(PARTS)):
            raise UserError(
                f"{folder} is half prepared: not all of its parts are finished and joined; run "
                "their commands again to continue."
            )
        what = "is not a prepared data set" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what} (no {MANIFEST}); make it with `tttjax prepare`.")
    return parse_manifest(folder / MANIFEST)


def content_id(manifest: dict[str, Any], split: str) -> int:
    """`PreparedData.content_id` from the manifest alone."""
    shards = manifest["splits"][split]["shards"]
    parts = ("tokens", TARGETS) if is_masked(manifest) else ("tokens",)
    sums = [shard["files"][part]["crc32"] for part in parts for shard in shards]
    return zlib.crc32(repr(sums).encode())
