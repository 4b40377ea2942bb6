"""The folder of `prepare`: what it holds, the journal to resume from, replacing and deleting it.

A folder with a manifest is finished, one with a journal is half prepared. Both record the request:
settings, inputs, and the part if it is one.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from tttjax.data.duplicates import DIGESTS_FILE
from tttjax.data.manifest import parts_of
from tttjax.data.prepare_settings import PrepareSettings
from tttjax.data.shards import JOURNAL, MANIFEST, PARTS, TOKENIZER_DIR
from tttjax.errors import UserError
from tttjax.io.atomic import atomic_write
from tttjax.io.locks import FOLDER_LOCK
from tttjax.io.paths import remove_tree
from tttjax.io.sealed import SEAL, read_object, sealed


def has_data_set(folder: Path, request: dict[str, Any]) -> bool:
    """Whether the folder holds the requested data set, finished."""
    manifest_path = folder / MANIFEST
    return manifest_path.exists() and not _differences(_read_json(manifest_path), request)


def claim(folder: Path, request: dict[str, Any], *, replaceable: bool) -> dict[str, Any] | None:
    """The journal to resume from, or None if `folder` already holds the requested data set.

    A new journal is `request` itself. Raises UserError if the folder holds anything else, unless
    it is another data set and `replaceable`.
    """
    manifest_path, journal_path = folder / MANIFEST, folder / JOURNAL
    existing = manifest_path if manifest_path.exists() else journal_path
    if existing.exists():
        recorded = _read_json(existing)
        differing = _differences(recorded, request)
        if not differing and existing is manifest_path:
            return None
        if not differing and _is_current_journal(journal_path):
            return recorded
        differing = differing or "tasks, by an earlier version of tttjax"
        if not replaceable:
            state = "was prepared" if existing is manifest_path else "is half prepared"
            remedy = "delete it" if "part" in request else "pass --overwrite to replace it"
            raise UserError(
                f"{folder} {state} with other {differing}; choose another folder, or {remedy}."
            )
        remove_prepared(folder)
    elif folder.exists() and any(path.name != FOLDER_LOCK for path in folder.iterdir()):
        raise UserError(
            f"{folder} is not empty and has no prepared data in it; choose another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(journal_path, request)
    return request


def _differences(recorded: dict[str, Any], request: dict[str, Any]) -> str:
    # A setting newer than the data set had its default value.
    defaults = PrepareSettings(inputs=()).to_json()
    old, new = {**defaults, **recorded.get("settings", {})}, request["settings"]
    names = [f"{name} ({old.get(name)!r})" for name in new if old.get(name) != new[name]]
    if not names and recorded.get("inputs") != request["inputs"]:
        names = ["content of its input files"]
    return ", ".join(names)


def remove_prepared(folder: Path, *, keep_folder: bool = False) -> None:
    """Deletes the files of a prepared data set, the manifest first, and nothing else."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in _shard_paths(folder):
        path.unlink()
    for part in folder.glob(PARTS):
        remove_prepared(part)
    remove_tree(folder / TOKENIZER_DIR)
    (folder / JOURNAL).unlink(missing_ok=True)
    (folder / DIGESTS_FILE).unlink(missing_ok=True)
    if not keep_folder and not any(folder.iterdir()):
        folder.rmdir()


def remove_strays(folder: Path, splits: dict[str, dict[str, Any]]) -> None:
    """Deletes shards of an interrupted or repeated pass that are not in `splits`."""
    named = {shard["name"] for entry in splits.values() for shard in entry["shards"]}
    for path in _shard_paths(folder):
        if path.stem not in named:
            path.unlink()


def _shard_paths(folder: Path) -> list[Path]:
    patterns = [f"*-[0-9][0-9][0-9][0-9][0-9].{part}" for part in parts_of(is_masked=True)]
    return [path for pattern in patterns for path in folder.glob(pattern)]


def choose_build_dir(folder: Path, request: dict[str, Any], overwrite: bool) -> Path:
    """`folder`, or a sibling if `folder` holds data to replace only on success."""
    if not overwrite:
        return folder
    sibling = _sibling(folder, "preparing")
    journal_path = folder / JOURNAL
    if (folder / MANIFEST).exists() or sibling.exists():
        return sibling
    if journal_path.exists() and (
        _differences(_read_json(journal_path), request) or not _is_current_journal(journal_path)
    ):
        return sibling
    return folder


def _is_current_journal(journal: Path) -> bool:
    """Whether this version wrote the journal; earlier ones grouped inputs into other tasks."""
    return SEAL in _read_json(journal)


def _sibling(folder: Path, state: str) -> Path:
    """A hidden sibling, on the same file system even if `folder` is a symbolic link."""
    real = Path(os.path.realpath(folder))
    return real.with_name(f".{real.name}.{state}")


def replace_folder(new: Path, folder: Path) -> None:
    """Replaces a data set with a finished one. Unrelated files stay in `folder`.

    If killed between the two renames, the same command finds `new` finished and repeats this.
    """
    folder, old = Path(os.path.realpath(folder)), _sibling(folder, "replaced")
    lock = folder / FOLDER_LOCK
    shutil.copy2(lock, new)  # keeps the folder locked throughout
    if any(path != lock for path in folder.iterdir()):
        if old.exists():
            remove_prepared(old)
        os.rename(folder, old)
        (old / FOLDER_LOCK).unlink()
    else:  # the rename below was interrupted, and the folder recreated for the lock
        lock.unlink()
    os.rename(new, folder)
    if not old.exists():
        return
    remove_prepared(old, keep_folder=True)
    for path in old.iterdir():
        os.replace(path, folder / path.name)
    old.rmdir()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error}); delete {path.parent} and prepare it again."
        ) from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes the object with its checksum, atomically."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(sealed(content), file, indent=1)
