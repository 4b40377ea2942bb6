"""Reads token data in the Zarr layout (format 2 or 3) of the official TTT-E2E code.

The folder has a one-dimensional integer array per split (`train`, `val`); each BOS starts a
document. TensorStore reads a block at a time.
"""

from collections.abc import Generator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from tttjax.data.encode import EncodeTask
from tttjax.data.tokenizers.base import Tokenizer
from tttjax.data.writer import EncodedSpan
from tttjax.errors import UserError

_BLOCK = 1 << 23  # tokens per read
_MARKS = ("zarr.json", ".zgroup", ".zarray")


def is_zarr(path: str | Path) -> bool:
    return any((Path(path) / mark).exists() for mark in _MARKS)


def open_zarr(root: str | Path) -> dict[str, Any]:
    """Split name -> TensorStore array [N] for each array of the group.

    Raises UserError if there is none, or one is not a 1-D integer array.
    """
    root = Path(root)
    arrays = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        if (folder / ".zarray").exists():
            driver = "zarr"
        elif (folder / "zarr.json").exists():
            driver = "zarr3"
        else:
            continue
        spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{folder.resolve()}/"}}
        try:
            array = tensorstore.open(spec, open=True, read=True).result()
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"Cannot open the Zarr array {folder}: {reason}.") from error
        if array.rank != 1 or array.dtype.numpy_dtype.kind not in "iu":
            raise UserError(
                f"The Zarr array {folder} is not one-dimensional with integers (shape "
                f"{tuple(array.shape)}, {array.dtype.name})."
            )
        arrays[folder.name] = array
    if not any(array.shape[0] for array in arrays.values()):
        raise UserError(f"{root} has no Zarr arrays with tokens (expected `train` and `val`).")
    return arrays


def zarr_documents(
    root: str | Path, tokenizer: Tokenizer, skip: int = 0
) -> Generator[tuple[EncodeTask, list[EncodedSpan]]]:
    """The tokens of every array in blocks, split into documents; skips the first `skip` blocks."""
    num_bytes_V = tokenizer.token_bytes()
    number = 0
    for split, array in open_zarr(root).items():
        total = int(array.shape[0])
        for start in range(0, total, _BLOCK):
            number += 1
            if number > skip:
                stop = min(start + _BLOCK, total)
                tokens = _read(root, split, array, start, min(stop + 1, total), tokenizer)
                spans = _split_documents(tokens, start, stop, split, tokenizer.bos_id, num_bytes_V)
                yield EncodeTask((), stop - start), spans


def _read(root, split: str, array, start: int, stop: int, tokenizer: Tokenizer) -> np.ndarray:
    try:
        tokens = np.asarray(array[start:stop].read().result()).astype(np.int64)
    except ValueError as error:
        raise UserError(f"Cannot read {root}/{split}: {str(error).splitlines()[0]}.") from error
    if tokens.min() < 0 or tokens.max() >= tokenizer.vocab_size:
        raise UserError(
            f"{root}/{split} has the token {tokens[np.argmax(np.abs(tokens))]}, outside the "
            f"vocabulary of {tokenizer.vocab_size}; give the tokenizer that made it, or its "
            "--vocab-size."
        )
    return tokens


def _split_documents(tokens, start: int, stop: int, split: str, bos: int | None, num_bytes_V):
    """Splits tokens[: stop - start] into spans; one extra token tells if the last document ends."""
    length = stop - start
    bos_positions = np.flatnonzero(tokens == (-1 if bos is None else bos))
    first = bos_positions[bos_positions < length]
    if not len(first) or first[0] != 0:
        first = np.concatenate([[0], first])
    bounds = np.append(first, length)
    last_is_complete = len(tokens) == length or length in bos_positions
    spans = []
    for i, (left, right) in enumerate(pairwise(bounds)):
        part = tokens[left:right]
        spans.append(
            EncodedSpan(
                document=f"{split}:{start + left}",
                tokens=part,
                num_bytes=int(num_bytes_V[part].sum()),
                is_first=bool(start + left == 0 or (bos is not None and part[0] == bos)),
                is_last=bool(i < len(first) - 1 or last_is_complete),
                split=split,
            )
        )
    return spans


def zarr_size(root: str | Path) -> tuple[int, list[Any]]:
    """Total number of tokens, and (name, length, mtime) of each array to detect changes."""
    arrays = {name: int(array.shape[0]) for name, array in open_zarr(root).items()}
    marks = [[name, length, _mtime(Path(root) / name)] for name, length in arrays.items()]
    return sum(arrays.values()), marks


def _mtime(folder: Path) -> int:
    return max(
        (
            path.stat().st_mtime_ns
            for path in folder.iterdir()
            if path.name.endswith(("array", "json"))
        ),
        default=0,
    )
