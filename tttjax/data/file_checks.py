"""Compares the files of a prepared data set with its manifest."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tttjax.data.manifest import TARGETS, is_masked, parts_of
from tttjax.errors import UserError
from tttjax.io.paths import file_sizes, is_bucket


def crc32_of(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def _shard_files(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, int]]]:
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            for part in parts_of(is_masked(manifest)):
                yield f"{shard['name']}.{part}", shard["files"][part]


def check_sizes(folder: Path, manifest: dict[str, Any]) -> int:
    """Total bytes of all shards; UserError if one is missing or has another size."""
    total = 0
    listed = file_sizes(folder) if is_bucket(folder) else None
    for name, entry in _shard_files(manifest):
        path = folder / name
        try:
            size = path.stat().st_size if listed is None else listed[name]
        except (OSError, KeyError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no such object"
            raise UserError(
                f"Shard file {path} is missing ({reason}); copy it again, or prepare "
                "the data again with --overwrite."
            ) from error
        if size != entry["size"]:
            word = "truncated" if size < entry["size"] else "too long"
            raise UserError(
                f"Shard file {path} is {word}: {size} bytes, the manifest says {entry['size']}; "
                "copy it again, or prepare the data again with --overwrite."
            )
        total += size
    return total


def check_sums(folder: Path, manifest: dict[str, Any]) -> int:
    """Compares every file's CRC-32, and the index of documents, with the manifest.

    Returns the number of files. Raises UserError for the first that differs.
    """
    files = list(_shard_files(manifest))
    for name, entry in files:
        if crc32_of(folder / name) != entry["crc32"]:
            raise corrupt(folder / name)
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            _check_index(folder, shard)
            if TARGETS in shard:
                _check_targets(folder, shard)
    return len(files)


def corrupt(path: Path) -> UserError:
    """The error of a file whose checksum differs."""
    return UserError(
        f"Shard file {path} is corrupt (its checksum differs from the manifest's); copy it "
        "again, or prepare the data again with --overwrite."
    )


def _check_targets(folder: Path, shard: dict[str, Any]) -> None:
    """UserError unless the spans of targets ascend, lie within the tokens and have the count."""
    path = folder / f"{shard['name']}.{TARGETS}"
    spans = np.frombuffer(path.read_bytes(), "<i8").reshape(-1, 2)
    edges, sizes = spans.ravel(), spans[:, 1] - spans[:, 0]
    if (np.diff(edges, prepend=0, append=shard["tokens"]) < 0).any() or (sizes <= 0).any():
        problem = "has spans out of order or beyond the tokens"
    elif int(sizes.sum()) != shard[TARGETS]:
        problem = f"marks {int(sizes.sum())} tokens, the manifest says {shard[TARGETS]}"
    else:
        return
    raise UserError(f"{path} {problem}; prepare the data again with --overwrite.")


def _check_index(folder: Path, shard: dict[str, Any]) -> None:
    """UserError unless the index of documents has the counts of the manifest."""
    path = folder / f"{shard['name']}.documents"
    index = np.frombuffer(path.read_bytes(), "<i8").reshape(-1, 2)
    ends, sizes = index[:, 0], index[:, 1]
    tokens = int(ends[-1]) if len(ends) else 0
    if tokens != shard["tokens"] or (np.diff(ends, prepend=0) < 0).any():
        problem = f"ends after {tokens} tokens, the manifest says {shard['tokens']}"
    elif int(sizes.sum()) != shard["bytes"]:
        problem = f"counts {int(sizes.sum())} bytes of text, the manifest says {shard['bytes']}"
    else:
        return
    raise UserError(f"{path} {problem}; prepare the data again with --overwrite.")
