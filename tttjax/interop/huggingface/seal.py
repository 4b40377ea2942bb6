"""The checksums of an export: `tttjax_export.json`, which `tttjax import` compares.

Folders without it are models from elsewhere, or older exports, and are read as they are.
"""

import json
from pathlib import Path

from tttjax.errors import UserError
from tttjax.io.sealed import file_checksums, read_object, sealed, version_of

EXPORT = "tttjax_export.json"
FORMAT = 1


def seal_export(folder: Path) -> None:
    """Writes the checksum of every file in the folder, and in the folders in it."""
    values = sealed({"format": FORMAT, "files": file_checksums(folder, _names(folder))})
    (folder / EXPORT).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def check_export(folder: Path) -> None:
    """UserError if the folder is an export that was changed, or of a later or unknown format."""
    path = folder / EXPORT
    if not path.exists():
        return
    try:
        text = path.read_text(encoding="utf-8")
        if (found := version_of(text, "format")) != FORMAT:
            raise UserError(
                f"{folder} is an export of the format {found!r}, and this version of tttjax reads "
                f"{FORMAT}; use the version that wrote it, or a later one"
            )
        expected: dict[str, str] = read_object(text, is_sealed=True)["files"]
        names = sorted(name for name in expected if (folder / name).is_file())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); copy the export again.") from error
    actual = file_checksums(folder, names)
    if changed := sorted(name for name in expected if actual.get(name) != expected[name]):
        raise UserError(
            f"{folder} is not as it was exported: {', '.join(changed[:3])} was changed or cut "
            f"short, or is missing; copy it again, or remove {EXPORT} if the change is meant"
        )
    added = [n for n in _names(folder) if n.endswith((".safetensors", ".json", ".model"))]
    if strange := sorted(set(added) - {*expected, EXPORT}):
        raise UserError(
            f"{folder} has {strange[0]}, which was not exported with the rest; remove it, or "
            f"remove {EXPORT} if the change is meant"
        )


def _names(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)
