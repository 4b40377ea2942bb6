"""The header of a session file, and the checksums of header and arrays."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from tttjax.errors import UserError
from tttjax.inference.options import PRECISIONS
from tttjax.io.sealed import SEAL, read_object, sealed, version_of

FORMAT = "tttjax-session-3"
UNSEALED = "tttjax-session-2"  # without checksums; still read
HEADER = "session"


@dataclasses.dataclass(frozen=True)
class SessionHeader:
    """The header of a session file.

    model, tokenizer: fingerprints. tokens: read in all; pending: since the last update. precision:
    how the fast weights are stored. arrays: the checksum of all arrays. drift: ||W - W0|| of
    every fast weight by its path. lost: the relative error of the stored difference from W0,
    largest over weights; 0 if it is exact. chunk_losses: NLL of the last chunks before their
    updates, oldest first. source: of `tttjax read`, the text and the position in it. layers: (||W -
    W0||, ||W0||) by layer (`fast_layers`). chunk_losses_after: of the same chunks after their
    updates; None if not computed.
    """

    format: str
    model: str
    tokenizer: str
    tokens: int
    pending: int
    precision: str
    drift: dict[str, float]
    lost: float
    chunk_losses: list[float]
    source: dict[str, Any]
    layers: dict[str, list[float]]
    chunk_losses_after: list[float | None]
    arrays: str = ""


def format_header(header: SessionHeader) -> dict[str, str]:
    """The metadata of a session file, with a checksum."""
    return {HEADER: json.dumps(sealed(dataclasses.asdict(header)))}


def parse_header(path: str | os.PathLike, metadata: Mapping[str, str] | None) -> SessionHeader:
    """The header in a file's metadata. UserError for another format, or if it is damaged."""
    try:
        text = (metadata or {})[HEADER]
    except KeyError as error:
        raise UserError(f"{path} is a safetensors file, but not a session of tttjax") from error
    try:
        version = version_of(text, "format")
        if version not in (FORMAT, UNSEALED):
            raise UserError(
                f"{path} has the session format {version!r}; this version reads {FORMAT} and "
                f"{UNSEALED}: open it with the version of tttjax that wrote it, or a later one"
            )
        values = read_object(text, is_sealed=version == FORMAT)
        values.pop(SEAL, None)
        if values.pop("rank", 0):  # of the removed option --session-rank
            raise UserError(
                f"{path} ({version}) holds a low-rank product of fast weights, which this version "
                "of tttjax does not read: open it with the version that wrote it, or read the text "
                "again"
            )
        header = SessionHeader(**values)
        _check_header(header)
    except (TypeError, ValueError) as error:
        raise damaged(path, error) from error
    return header


def damaged(path: str | os.PathLike, reason: object) -> UserError:
    """The error for a file that is truncated or damaged."""
    return UserError(
        f"{path} is not a whole session file ({reason}); restore it from a copy, or read the text "
        "again"
    )


def _check_header(header: SessionHeader) -> None:
    """ValueError for a field with an invalid value."""
    numbers = {"tokens": 2**31, "pending": header.tokens + 1 if _is_count(header.tokens) else 0}
    for name, limit in numbers.items():
        value = getattr(header, name)
        if not _is_count(value) or value >= limit:
            raise ValueError(f"{name} is {value!r}")
    for field in dataclasses.fields(SessionHeader):
        if field.type is str and not isinstance(getattr(header, field.name), str):
            raise ValueError(f"{field.name} is no string")
    if header.precision not in PRECISIONS:
        raise ValueError(f"precision is {header.precision!r}")
    if (header.format == FORMAT) != bool(header.arrays):
        raise ValueError("the checksum of its arrays is missing")
    if not all(isinstance(d, dict) for d in (header.drift, header.layers, header.source)):
        raise ValueError("drift, layers or source is no object")
    if any(not isinstance(row, list) or len(row) != 2 for row in header.layers.values()):
        raise ValueError("layers has rows that are not two numbers")
    after = [loss for loss in header.chunk_losses_after if loss is not None]
    norms = (
        *header.drift.values(),
        *(x for row in header.layers.values() for x in row),
        header.lost,
    )
    if not all(_is_finite(x) for x in (*norms, *header.chunk_losses, *after)):
        raise ValueError("a norm or a loss is not a finite number")
    source = header.source
    if source and not (
        isinstance(source.get("text"), str)
        and all(_is_count(source.get(name)) for name in ("tokens", "of"))
    ):
        raise ValueError("source lacks its text or counts")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """BLAKE2b (hex) of names, types, shapes and entries."""
    digest = hashlib.blake2b(digest_size=32)
    for name, array in sorted(arrays.items()):
        digest.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def not_finite(arrays: Mapping[str, np.ndarray], header: SessionHeader) -> str:
    """The name of an array or field with a value that is not finite; "" if there is none."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            return name
    after = [loss for loss in header.chunk_losses_after if loss is not None]
    losses = (*header.chunk_losses, *after)
    return "" if all(map(math.isfinite, losses)) else "the loss of a chunk"
