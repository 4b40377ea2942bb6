"""JSON files that contain a checksum of their own content.

A damaged file raises ValueError with a phrase that says what is wrong; the caller adds the file's
name and the remedy.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

SEAL = "checksum"


def checksum(values: Mapping[str, Any]) -> str:
    """BLAKE2b (hex) of a JSON object, independent of layout and order; excludes SEAL itself."""
    content = {name: value for name, value in values.items() if name != SEAL}
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The object with its checksum under SEAL. Names must be strings."""
    return {**values, SEAL: checksum(values)}


def version_of(text: str | bytes, name: str) -> Any:
    """The value of `name` in a JSON object, without a check: other versions may differ in theirs.

    Raises ValueError if the text is not a JSON object or lacks the name.
    """
    values = _parse(text)
    if not isinstance(values, dict) or name not in values:
        raise ValueError(f"it has no {name}")
    return values[name]


def read_object(text: str | bytes, *, is_sealed: bool = False) -> dict[str, Any]:
    """The JSON object in `text`, SEAL included.

    is_sealed: whether a checksum is required; an existing one is always verified.
    Raises ValueError for other JSON, non-finite numbers, and a wrong checksum.
    """
    values = _parse(text, parse_constant=_refuse)
    if not isinstance(values, dict):
        raise ValueError(f"it holds {type(values).__name__} instead of an object")
    if is_sealed and SEAL not in values:
        raise ValueError("it has no checksum")
    if SEAL in values and values[SEAL] != checksum(values):
        raise ValueError("its checksum differs, so it was changed or cut short")
    return values


def file_checksums(folder: Any, names: Sequence[str]) -> dict[str, str]:
    """BLAKE2b (hex) of files in a folder (a path of pathlib or etils), by their names in it."""

    def digest(name: str) -> str:
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()

    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _parse(text: str | bytes, **options: Any) -> Any:
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a finite number")
