"""Parses and validates the manifest of a prepared data set.

The manifest holds counts, dtypes, names and checksums of the files, and its own checksum. Data sets
of version 1 have no checksum; their counts are compared with each other and with the files. Masked
data sets, where only some tokens are targets, have version 3, so that a tttjax that knows no masks
refuses them.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from tttjax.errors import UserError
from tttjax.io.sealed import read_object, version_of

VERSION, UNSEALED_VERSION, MASKED_VERSION = 2, 1, 3
PARTS = ("tokens", "documents", "names")
COUNTS = ("tokens", "documents", "bytes")
TARGETS = "targets"  # a further part and count of masked data
_SHARD_NAME = re.compile(r"(part-[0-9]+-of-[0-9]+/)?[^/]+")  # those of several hosts are in folders
DOCUMENT_BYTES = SPAN_BYTES = 16  # in the index, per document; in the targets, per span


def parts_of(is_masked: bool) -> tuple[str, ...]:
    """The files of a shard, by suffix."""
    return (*PARTS, TARGETS) if is_masked else PARTS


def counts_of(is_masked: bool) -> tuple[str, ...]:
    """The counts of a shard and of a split."""
    return (*COUNTS, TARGETS) if is_masked else COUNTS


def is_masked(manifest: dict[str, Any]) -> bool:
    """Whether only some tokens of a data set are targets."""
    return manifest["version"] == MASKED_VERSION


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 if the vocabulary fits, else uint32; little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def parse_manifest(path: Path) -> dict[str, Any]:
    """Reads a manifest. UserError if it is damaged or its version is not supported."""
    try:
        text = path.read_text(encoding="utf-8")
        version = version_of(text, "version")
        if version not in (UNSEALED_VERSION, VERSION, MASKED_VERSION):
            raise UserError(
                f"{path.parent} has format version {version!r}, but this tttjax reads "
                f"{UNSEALED_VERSION} to {MASKED_VERSION}; use the tttjax that prepared it, or "
                "prepare the data again."
            )
        manifest = read_object(text, is_sealed=version != UNSEALED_VERSION)
        _check(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is damaged ({reason}); prepare the data again.") from error
    return manifest


def describe_split(split: str, entry: dict[str, Any]) -> str:
    """A line about the split of a manifest."""
    line = (
        f"{split}: {entry['documents']:,} documents, {entry['tokens']:,} tokens, "
        f"{entry['bytes']:,} bytes, longest {entry['longest_document']:,} tokens"
    )
    return line + (f"; {entry[TARGETS]:,} tokens are targets" if TARGETS in entry else "")


def _check(manifest: dict[str, Any]) -> None:
    """Raises ValueError, KeyError, TypeError or AttributeError for an invalid manifest."""
    tokenizer = manifest["tokenizer"]
    vocab_size = _count(tokenizer, "vocab_size")
    if not isinstance(tokenizer["fingerprint"], str):
        raise ValueError("the tokenizer's fingerprint is not a string")
    if manifest["dtype"] != (dtype := token_dtype(vocab_size).str):
        raise ValueError(f"dtype is {manifest['dtype']!r}, not {dtype!r}")
    masked = is_masked(manifest)
    if masked:
        _count(manifest["tokenizer"], "chat_template_crc32")
    for name, split in manifest["splits"].items():
        for count in counts_of(masked):
            total = sum(_count(shard, count) for shard in split["shards"])
            if _count(split, count) != total:
                raise ValueError(f"{name} has {split[count]} {count}, its shards {total}")
        for shard in split["shards"]:
            _check_shard(shard, token_dtype(vocab_size).itemsize, parts_of(masked))


def _check_shard(shard: dict[str, Any], itemsize: int, parts: tuple[str, ...]) -> None:
    name, files = shard["name"], shard["files"]
    if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
        raise ValueError(f"a shard is called {name!r}")
    sizes = {part: _count(files[part], "size") for part in parts}
    for part in parts:
        _count(files[part], "crc32")
    for part, count in (
        ("tokens", shard["tokens"] * itemsize),
        ("documents", shard["documents"] * DOCUMENT_BYTES),
    ):
        if sizes[part] != count:
            raise ValueError(f"{name}.{part} has {sizes[part]} bytes, its {part} need {count}")
    if sizes.get(TARGETS, 0) % SPAN_BYTES:
        raise ValueError(f"{name}.{TARGETS} has {sizes[TARGETS]} bytes, a span has {SPAN_BYTES}")


def _count(values: dict[str, Any], name: str) -> int:
    value = values[name]
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is {value!r}")
    return value
