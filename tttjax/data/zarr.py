"""Token data in the Zarr layout of the official TTT-E2E code, format 2 or 3.

A folder with one-dimensional integer arrays, one per split (`train`, `val`); a document begins at
each BOS. Read with TensorStore, a block at a time.
"""

from collections.abc import Generator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from tttjax.data.encode import EncodeTask
from tttjax.data.tokenizers.base import Tokenizer
from tttjax.data.writer import EncodedPiece
from tttjax.errors import UserError

_BLOCK = 1 << 23  # tokens read at once
_MARKS = ("zarr.json", ".zgroup", ".zarray")


def is_zarr(path: str | Path) -> bool:
    return any((Path(path) / mark).exists() for mark in _MARKS)


def open_zarr(root: str | Path) -> dict[str, Any]:
    """Split name -> TensorStore array [N] for each array of the group.

    Raises UserError if there is none, or one that is not a list of integers.
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
) -> Generator[tuple[EncodeTask, list[EncodedPiece]]]:
    """The tokens of every array in blocks, cut where documents begin; the first `skip` left out."""
    num_bytes_V = tokenizer.token_bytes()
    number = 0
    for split, array in open_zarr(root).items():
        total = int(array.shape[0])
        for start in range(0, total, _BLOCK):
            number += 1
            if number > skip:
                stop = min(start + _BLOCK, total)
                tokens = _read(root, split, array, start, min(stop + 1, total), tokenizer)
                pieces = _cut(tokens, start, stop, split, tokenizer.bos_id, num_bytes_V)
                yield EncodeTask((), stop - start), pieces


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


def _cut(tokens, start: int, stop: int, split: str, bos: int | None, num_bytes_V):
    """Pieces of tokens[: stop - start]; one token more shows if the last document ends."""
    length = stop - start
    begins = np.flatnonzero(tokens == (-1 if bos is None else bos))
    first = begins[begins < length]
    if not len(first) or first[0] != 0:
        first = np.concatenate([[0], first])
    borders = np.append(first, length)
    last_ends = len(tokens) == length or length in begins
    pieces = []
    for i, (left, right) in enumerate(pairwise(borders)):
        part = tokens[left:right]
        pieces.append(
            EncodedPiece(
                document=f"{split}:{start + left}",
                tokens=part,
                num_bytes=int(num_bytes_V[part].sum()),
                begins=bool(start + left == 0 or (bos is not None and part[0] == bos)),
                ends=bool(i < len(first) - 1 or last_ends),
                split=split,
            )
        )
    return pieces


def zarr_size(root: str | Path) -> tuple[int, list[Any]]:
    """Number of tokens of all arrays, and what tells this data set from another."""
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
