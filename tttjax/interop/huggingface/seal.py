"""Checksums of an export (`tttjax_export.json`), which `tttjax import` verifies.

Folders without the file, which are other models or older exports, are not checked.
"""

import json
from pathlib import Path

from tttjax.errors import UserError
from tttjax.io.sealed import file_checksums, read_object, sealed, version_of

EXPORT = "tttjax_export.json"
FORMAT = 1


def seal_export(folder: Path) -> None:
    """Writes the checksums of all files in the folder, recursively."""
    values = sealed({"format": FORMAT, "files": file_checksums(folder, _names(folder))})
    (folder / EXPORT).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def check_export(folder: Path) -> None:
    """Raises UserError for an export that was modified or has a later or unknown format."""
    path = folder / EXPORT
    if not path.exists():
        return
    try:
        text = path.read_text(encoding="utf-8")
        if (version := version_of(text, "format")) != FORMAT:
            raise UserError(
                f"{folder} is an export of format {version!r}; this version of tttjax reads format "
                f"{FORMAT}. Use the version that wrote it, or a later one."
            )
        expected: dict[str, str] = read_object(text, is_sealed=True)["files"]
        names = sorted(name for name in expected if (folder / name).is_file())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); copy the export again.") from error
    actual = file_checksums(folder, names)
    if changed := sorted(name for name in expected if actual.get(name) != expected[name]):
        raise UserError(
            f"{folder} was modified after the export: {', '.join(changed[:3])} was changed, "
            f"truncated or removed. Copy it again, or remove {EXPORT} if this is intended."
        )
    candidates = [n for n in _names(folder) if n.endswith((".safetensors", ".json", ".model"))]
    if unexpected := sorted(set(candidates) - {*expected, EXPORT}):
        raise UserError(
            f"{folder} has {unexpected[0]}, which is not part of the export. Remove it, or "
            f"remove {EXPORT} if this is intended."
        )


def _names(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)
