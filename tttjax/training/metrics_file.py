"""The files of a run's metrics: `metrics.jsonl` and `held_out.jsonl`, one JSON record per line.

A record of a step is {"step": n, "loss": ..., ..., "time": {...}}. Everything outside "time"
depends on configuration and data alone and is written exactly, so the records of two runs can be
compared as text.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tttjax.errors import UserError
from tttjax.io.atomic import atomic_write
from tttjax.io.paths import storage_path

JSONL = "metrics.jsonl"
HELD_OUT = "held_out.jsonl"
_TAIL = 8192  # bytes at the end of a file that hold a whole record


def read_records(workdir: str | os.PathLike, name: str = JSONL) -> list[dict[str, Any]]:
    """The complete records of a work directory's metrics.jsonl, in order; [] if there is no file.

    name: or of `held_out.jsonl`. Raises UserError for a damaged line.
    """
    path = storage_path(workdir) / name
    return list(_complete_records(path)) if path.exists() else []


def last_record(workdir: str | os.PathLike) -> dict[str, Any]:
    """The last complete record of a work directory, {} if there is none; reads the end alone."""
    try:
        with (storage_path(workdir) / JSONL).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        with contextlib.suppress(ValueError):  # the first may be cut
            if line.endswith(b"\n") and isinstance(record := json.loads(line), dict):
                return record
    return {}


def _complete_records(path: Path) -> Iterator[dict[str, Any]]:
    """Raises UserError for a damaged line; skips a last line that a kill has truncated."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                if type(record["step"]) is not int:
                    raise ValueError("its step is not an integer")
            except (ValueError, KeyError, TypeError) as error:
                if not line.endswith("\n"):
                    return
                raise UserError(
                    f"line {number} of {path} is damaged ({error}); restore the file from a copy, "
                    "or remove the line"
                ) from error
            yield record


def deterministic_records(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The records without "time": equal for two runs that computed the same numbers."""
    return [{k: v for k, v in record.items() if k != "time"} for record in read_records(workdir)]


def truncate_after(path: Path, step: int) -> None:
    """Removes records after `step`, and a truncated last line, from the file."""
    if not path.exists():
        return
    with atomic_write(path) as temporary, temporary.open("w") as file:
        for record in _complete_records(path):
            if record["step"] <= step:
                file.write(json.dumps(record) + "\n")


def json_safe(value: Any) -> Any:
    """The value for JSON, which has no NaN: "nan", "inf" or "-inf" for what is not finite."""
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
