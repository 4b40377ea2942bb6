"""Finds the cases of a folder, checks them all and prints the table."""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

import tttjax
from tttjax.errors import UserError
from tttjax.verify.cases import Cache, check_case
from tttjax.verify.imports import check_checkpoints, check_zarr
from tttjax.verify.layer_cases import LayerCache, check_layer_case
from tttjax.verify.rows import Row
from tttjax.whole_files import whole_file

# Folders with these files are stores of arrays: what JSON lies in them is not ours to judge.
STORES = ("_CHECKPOINT_METADATA", "zarr.json", ".zgroup", ".zarray", ".zattrs")


@dataclass(frozen=True)
class Entry:
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


def find_entries(directory: str | Path) -> list[Entry]:
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
            entries.append(Entry(path, name, "damaged", f"{path} is damaged: {error}"))
            continue
        entries.append(Entry(path, name, _kind(content), content))
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
) -> list[Row]:
    """Checks every case of the folder; one row for each quantity of each case.

    x64: compute in float64 and hold it to the tighter limits of that. progress: called with the
    name of each case before it is computed.
    Raises UserError if the folder has no case that is recognised.
    """
    return _check(find_entries(directory), x64, progress)


def _check(entries: Sequence[Entry], x64: bool, progress) -> list[Row]:
    rows = []
    cache: Cache = {}
    layer_cache: LayerCache = {}
    with jax.enable_x64(x64), jax.default_matmul_precision("highest"):
        for entry in entries:
            if progress and entry.kind:
                progress(entry.name)
            rows += _check_entry(entry, x64, cache, layer_cache)
    return rows


def _check_entry(entry: Entry, x64: bool, cache: Cache, layer_cache: LayerCache) -> list[Row]:
    if entry.kind == "case":
        return list(check_case(entry.path, entry.content, entry.name, x64, cache))
    if entry.kind == "layer":
        return list(check_layer_case(entry.path, entry.content, entry.name, x64, layer_cache))
    if entry.kind == "checkpoints":
        return list(check_checkpoints(entry.path, entry.content, entry.name, x64, cache))
    if entry.kind == "zarr":
        return list(check_zarr(entry.path, entry.name))
    if entry.kind == "damaged":
        return [Row(entry.name, "file", None, None, False, entry.content)]
    return []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="folder of reference cases")
    parser.add_argument(
        "--x64", action="store_true", help="compute in float64, with tighter tolerances"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the rows to FILE")


def run(args: argparse.Namespace) -> int:
    entries = find_entries(args.directory)
    head = {
        "version": tttjax.__version__,
        "precision": "float64" if args.x64 else "float32",
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "jax": jax.__version__,
    }
    print(
        "tttjax {version}, computed in {precision} on {platform} ({device}), jax {jax}".format(
            **head
        )
    )
    rows = _check(entries, args.x64, lambda name: print(f"... {name}", file=sys.stderr))
    print("\n".join(format_table(rows)))
    ignored = [entry.name for entry in entries if entry.kind is None]
    if ignored:
        print(f"not recognised: {', '.join(ignored)}")
    failures = [row for row in rows if not row.ok]
    checked = sum(row.deviation is not None for row in rows)
    print(
        f"{len(failures)} of {len(rows)} checks failed"
        if failures
        else f"all {checked} quantities are within tolerance"
    )
    if args.json:
        _write_json(Path(args.json), {**head, "rows": rows, "not_recognised": ignored})
    return 1 if failures else 0


def format_table(rows: Sequence[Row]) -> list[str]:
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


def _write_json(path: Path, content: dict[str, Any]) -> None:
    def plain(row: Row) -> dict[str, Any]:
        fields = dataclasses.asdict(row)
        finite = row.deviation is None or math.isfinite(row.deviation)
        return fields if finite else {**fields, "deviation": str(row.deviation)}

    content = {**content, "rows": [plain(row) for row in content["rows"]]}
    try:
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
