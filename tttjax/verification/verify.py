"""Finds the cases of a folder, checks them all and prints the table."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from tttjax.errors import UserError
from tttjax.verification.cases import Cache, check_case
from tttjax.verification.imports import check_checkpoints, check_zarr
from tttjax.verification.layer_cases import LayerCache, check_layer_case
from tttjax.verification.rows import VerifyRow

# Folders with these files are stores of arrays: what JSON lies in them is not ours to judge.
STORES = ("_CHECKPOINT_METADATA", "zarr.json", ".zgroup", ".zarray", ".zattrs")


@dataclass(frozen=True)
class CaseFile:
    """One JSON file: its name, and what it describes: a kind that `_check_entry` knows, or None."""

    path: Path
    name: str
    kind: str | None
    content: Any


def _kind(content: Any) -> str | None:
    if not isinstance(content, dict):
        return None
    if isinstance(content.get("model"), dict) and isinstance(content.get("training"), dict):
        return "case"
    if "layer" in content or {"config", "arrays"} <= set(content):
        return "layer"
    if isinstance(content.get("checkpoints"), dict):
        return "checkpoints"
    if {"seq_len", "global_batch_size", "bos_token_id", "vocab_size"} <= set(content):
        return "zarr"
    return None


def find_entries(directory: str | Path) -> list[CaseFile]:
    """Every JSON file in the folder and below (or the one given), except within array stores.

    Raises UserError if there is no such folder, or no case in it.
    """
    root = Path(directory)
    if not root.exists():
        raise UserError(f"there is no folder {root}; name one with reference cases (JSON)")
    paths = list(_json_files(root)) if root.is_dir() else [root]
    base = root if root.is_dir() else root.parent
    entries = []
    for path in paths:
        name = str(path.relative_to(base).with_suffix(""))
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            entries.append(CaseFile(path, name, "damaged", f"{path} is damaged: {error}"))
            continue
        entries.append(CaseFile(path, name, _kind(content), content))
    if not any(entry.kind for entry in entries):
        raise UserError(
            f"{root} has no reference case: none of its {len(entries)} JSON files describes a "
            "model and its training, a layer, official checkpoints, or Zarr batches"
        )
    return entries


def _json_files(folder: Path) -> Iterator[Path]:
    if any((folder / mark).exists() for mark in STORES):
        return
    children = sorted(folder.iterdir())
    yield from (child for child in children if child.suffix == ".json" and child.is_file())
    for child in children:
        if child.is_dir():
            yield from _json_files(child)


def verify(
    directory: str | Path, *, x64: bool = False, progress: Callable[[str], None] | None = None
) -> list[VerifyRow]:
    """Checks every case of the folder; one row for each quantity of each case.

    x64: compute in float64 and hold it to the tighter limits of that. progress: called with the
    name of each case before it is computed.
    Raises UserError if the folder has no case that is recognised.
    """
    return _check(find_entries(directory), x64, progress)


def _check(entries: Sequence[CaseFile], x64: bool, progress) -> list[VerifyRow]:
    rows = []
    cache: Cache = {}
    layer_cache: LayerCache = {}
    with jax.enable_x64(x64), jax.default_matmul_precision("highest"):
        for entry in entries:
            if progress and entry.kind:
                progress(entry.name)
            rows += _check_entry(entry, x64, cache, layer_cache)
    return rows


def _check_entry(
    entry: CaseFile, x64: bool, cache: Cache, layer_cache: LayerCache
) -> list[VerifyRow]:
    if entry.kind == "case":
        return list(check_case(entry.path, entry.content, entry.name, x64, cache))
    if entry.kind == "layer":
        return list(check_layer_case(entry.path, entry.content, entry.name, x64, layer_cache))
    if entry.kind == "checkpoints":
        return list(check_checkpoints(entry.path, entry.content, entry.name, x64, cache))
    if entry.kind == "zarr":
        return list(check_zarr(entry.path, entry.name))
    if entry.kind == "damaged":
        return [VerifyRow(entry.name, "file", None, None, False, entry.content)]
    return []


def format_table(rows: Sequence[VerifyRow]) -> list[str]:
    """One line for each row: case, quantity, largest deviation, tolerance, verdict, note."""
    lines = [("case", "quantity", "largest deviation", "tolerance", "", "")]
    lines += [
        (
            row.case,
            row.quantity,
            "" if row.deviation is None else f"{row.deviation:.1e}",
            "" if row.tolerance is None else f"{row.tolerance:.0e}",
            "ok" if row.ok else "FAIL",
            row.note,
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    aligned = "<", "<", ">", ">", "<"
    return [
        "  ".join(
            [
                f"{cell:{way}{width}}"
                for cell, way, width in zip(line, aligned, widths, strict=False)
            ]
            + [line[5]]
        ).rstrip()
        for line in lines
    ]
