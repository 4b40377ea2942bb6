"""Objects of a bucket, read by range through a cache on this host's disk.

An object is read in blocks, each one a file of the cache with its CRC-32 in front. The files of
the least recent use are deleted when the cache exceeds its budget. Processes of a host share it.

    TTTJAX_DATA_CACHE      its folder (default ~/.cache/tttjax/data)
    TTTJAX_DATA_CACHE_GB   its budget in 10^9 bytes (default 20)
"""

import contextlib
import hashlib
import os
import secrets
import threading
import zlib
from pathlib import Path

import numpy as np

from tttjax.errors import UserError
from tttjax.io.paths import local_path

FOLDER, BUDGET = "TTTJAX_DATA_CACHE", "TTTJAX_DATA_CACHE_GB"
BLOCK = 1 << 18  # one request; a few records of training, which are read in random order
_CRC_BYTES = 4
_added, _lock = 0, threading.Lock()  # bytes since the last look at the whole cache


class CachedObject:
    """An object of known size. version: changes with its content, as a checksum does."""

    def __init__(self, path: Path, size: int, version: object):
        self.path, self.size = path, size
        name = hashlib.blake2b(f"{path} {size} {version}".encode(), digest_size=16).hexdigest()
        self._folder = cache_folder() / name

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`. Raises UnreachableError."""
        first, last = start // BLOCK, -(-stop // BLOCK)
        blocks = {index: self._read_cached(index) for index in range(first, last)}
        missing = [index for index, block in blocks.items() if block is None]
        while missing:  # one request for neighbours
            run = [missing.pop(0)]
            while missing and missing[0] == run[-1] + 1:
                run.append(missing.pop(0))
            blocks |= self._fetch(run)
        content = b"".join(block for block in blocks.values() if block is not None)
        return content[start - first * BLOCK : stop - first * BLOCK]

    def _fetch(self, run: list[int]) -> dict[int, bytes]:
        from tttjax.io.buckets import read_range  # slow to import

        start, stop = run[0] * BLOCK, min((run[-1] + 1) * BLOCK, self.size)
        content = read_range(self.path, start, stop)
        if len(content) != stop - start:
            raise UserError(
                f"{self.path} has changed: it ends before byte {stop} of {self.size}; copy it "
                "again, or prepare the data again with --overwrite."
            )
        blocks = {index: content[i * BLOCK : (i + 1) * BLOCK] for i, index in enumerate(run)}
        for index, block in blocks.items():
            with contextlib.suppress(OSError):  # a full disk: the block is not cached
                _write(self._folder / str(index), block)
        return blocks

    def _read_cached(self, index: int) -> bytes | None:
        path = self._folder / str(index)
        try:
            content = path.read_bytes()
            os.utime(path)  # which the order of deletion goes by
        except OSError:
            return None
        block, expected = content[_CRC_BYTES:], content[:_CRC_BYTES]
        return block if zlib.crc32(block).to_bytes(_CRC_BYTES, "little") == expected else None


class TokenArray:
    """The items of an object, as a one-dimensional memory map: slices give numpy arrays."""

    def __init__(self, source: CachedObject, dtype: np.dtype):
        self._source, self._dtype = source, dtype

    def __getitem__(self, part: slice) -> np.ndarray:
        size = self._dtype.itemsize
        start, stop, _ = part.indices(self._source.size // size)
        return np.frombuffer(self._source.read(start * size, stop * size), self._dtype)


def cache_folder() -> Path:
    """The folder of the cache, from the environment."""
    if setting := os.environ.get(FOLDER):
        return local_path(setting, FOLDER)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tttjax" / "data"


def cache_budget() -> int:
    """Bytes that the cache may hold. Raises UserError if the setting is not a number above 0."""
    text = os.environ.get(BUDGET, "20")
    try:
        budget = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        budget = 0
    if budget <= 0:
        raise UserError(f"{BUDGET}={text} must be a number of 10^9 bytes, above 0.")
    return budget


def _write(path: Path, block: bytes) -> None:
    global _added
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(zlib.crc32(block).to_bytes(_CRC_BYTES, "little") + block)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    with _lock:
        _added += len(block)
        is_due, budget = _added > cache_budget() // 16, cache_budget()
        _added = 0 if is_due else _added
    if is_due:
        _delete_oldest(budget)


def _delete_oldest(budget: int) -> None:
    files = []
    for folder, _, names in os.walk(cache_folder()):
        for name in names:
            with contextlib.suppress(OSError):  # another process deletes, too
                stat = os.stat(path := os.path.join(folder, name))
                files.append((stat.st_mtime_ns, stat.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= budget * 15 // 16:
            return
        with contextlib.suppress(OSError):
            os.unlink(path)
        total -= size
