"""Finds and verifies the reference cases of a folder, and formats the result table."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from tttjax.errors import UserError
from tttjax.verification.cases import Cache, check_e2e_case
from tttjax.verification.imports import check_checkpoints, check_zarr
from tttjax.verification.layer_cases import LayerCache, check_layer_case
from tttjax.verification.rows import VerifyRow

# Folders with these files are array stores; their JSON files are not cases.
STORES = ("_CHECKPOINT_METADATA", "zarr.json", ".zgroup", ".zarray", ".zattrs")


@dataclass(frozen=True)
class CaseFile:
    """One JSON file. kind: of its case, as `_check_case` handles it; None: not a case."""

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


def find_cases(directory: str | Path) -> list[CaseFile]:
    """All JSON files in a folder, recursively, except in array stores; or a single file.

    Raises UserError if the folder does not exist or has no case.
    """
    root = Path(directory)
    if not root.exists():
        raise UserError(f"there is no folder {root}; give one with reference cases (JSON)")
    paths = list(_json_files(root)) if root.is_dir() else [root]
    base = root if root.is_dir() else root.parent
    cases = []
    for path in paths:
        name = str(path.relative_to(base).with_suffix(""))
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            cases.append(CaseFile(path, name, "damaged", f"{path} is damaged: {error}"))
            continue
        cases.append(CaseFile(path, name, _kind(content), content))
    if not any(case.kind for case in cases):
        raise UserError(
            f"{root} has no reference case: none of its {len(cases)} JSON files describes a "
            "model and its training, a layer, official checkpoints, or Zarr batches"
        )
    return cases


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
    """Verifies every case of a folder; returns one row per quantity and case.

    x64: compute in float64, with its tighter tolerances. progress: called with the name of each
    case before it is computed. Raises UserError if the folder has no case.
    """
    return check_cases(find_cases(directory), x64, progress)


def check_cases(cases: Sequence[CaseFile], x64: bool, progress) -> list[VerifyRow]:
    rows = []
    cache: Cache = {}
    layer_cache: LayerCache = {}
    with jax.enable_x64(x64), jax.default_matmul_precision("highest"):
        for case in cases:
            if progress and case.kind:
                progress(case.name)
            rows += _check_case(case, x64, cache, layer_cache)
    return rows


def _check_case(
    case: CaseFile, x64: bool, cache: Cache, layer_cache: LayerCache
) -> list[VerifyRow]:
    if case.kind == "case":
        return list(check_e2e_case(case.path, case.content, case.name, x64, cache))
    if case.kind == "layer":
        return list(check_layer_case(case.path, case.content, case.name, x64, layer_cache))
    if case.kind == "checkpoints":
        return list(check_checkpoints(case.path, case.content, case.name, x64, cache))
    if case.kind == "zarr":
        return list(check_zarr(case.path, case.name))
    if case.kind == "damaged":
        return [VerifyRow(case.name, "file", None, None, False, case.content)]
    return []


def format_table(rows: Sequence[VerifyRow]) -> list[str]:
    """One line per row: case, quantity, largest deviation, tolerance, verdict, note."""
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
    alignments = "<", "<", ">", ">", "<"
    return [
        "  ".join(
            [
                f"{cell:{alignment}{width}}"
                for cell, alignment, width in zip(line, alignments, widths, strict=False)
            ]
            + [line[5]]
        ).rstrip()
        for line in lines
    ]
