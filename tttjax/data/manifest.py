"""The manifest of a prepared data set: sealed when written, and checked when read.

Everything that results depend on and that the files do not say of themselves stands there: counts,
types, names, and the checksums of the files. It has a checksum itself. Data sets of version 1 have
none: their counts are compared with each other, and with the files.
"""

from pathlib import Path
from typing import Any

import numpy as np

from tttjax.errors import UserError
from tttjax.io.sealed import read_object, version_of

VERSION, UNSEALED_VERSION = 2, 1
PARTS = ("tokens", "documents", "names")
COUNTS = ("tokens", "documents", "bytes")
DOCUMENT_BYTES = 16  # of the index, for each document


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where it is enough, else uint32; little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def parse_manifest(path: Path) -> dict[str, Any]:
    """The manifest in a file. UserError if it is damaged, or of a later or unknown version."""
    try:
        text = path.read_text(encoding="utf-8")
        version = version_of(text, "version")
        if version not in (VERSION, UNSEALED_VERSION):
            raise UserError(
                f"{path.parent} has format version {version!r}, but this tttjax reads {VERSION} "
                f"and {UNSEALED_VERSION}; use the tttjax that prepared it, or prepare the data "
                "again."
            )
        manifest = read_object(text, is_sealed=version == VERSION)
        _check(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is damaged ({why}); prepare the data again.") from error
    return manifest


def _check(manifest: dict[str, Any]) -> None:
    """ValueError, KeyError, TypeError or AttributeError with what no manifest says."""
    tokenizer = manifest["tokenizer"]
    vocab_size = _count(tokenizer, "vocab_size")
    if not isinstance(tokenizer["fingerprint"], str):
        raise ValueError("the tokenizer's fingerprint is no string")
    if manifest["dtype"] != (dtype := token_dtype(vocab_size).str):
        raise ValueError(f"dtype is {manifest['dtype']!r}, not {dtype!r}")
    for name, split in manifest["splits"].items():
        for count in COUNTS:
            total = sum(_count(shard, count) for shard in split["shards"])
            if _count(split, count) != total:
                raise ValueError(f"{name} has {split[count]} {count}, its shards {total}")
        for shard in split["shards"]:
            _check_shard(shard, token_dtype(vocab_size).itemsize)


def _check_shard(shard: dict[str, Any], itemsize: int) -> None:
    name, files = shard["name"], shard["files"]
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"a shard is called {name!r}")
    sizes = {part: _count(files[part], "size") for part in PARTS}
    for part in PARTS:
        _count(files[part], "crc32")
    for part, count in (
        ("tokens", shard["tokens"] * itemsize),
        ("documents", shard["documents"] * DOCUMENT_BYTES),
    ):
        if sizes[part] != count:
            raise ValueError(f"{name}.{part} has {sizes[part]} bytes, its {part} need {count}")


def _count(values: dict[str, Any], name: str) -> int:
    value = values[name]
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is {value!r}")
    return value
