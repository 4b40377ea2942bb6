"""Safetensors files of a model: writes them shard by shard, reads them tensor by tensor."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from tttjax.errors import UserError
from tttjax.interop.huggingface.names import TensorSlot
from tttjax.io.atomic import atomic_write

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MALFORMED = (ValueError, KeyError, TypeError, AttributeError)  # raised for a malformed index
FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes that NumPy supports with ml_dtypes


def plan_shards(slots: Sequence[TensorSlot], item_size: int, limit: int) -> list[list[TensorSlot]]:
    """The tensors, in order, in shards of at most `limit` bytes; a larger tensor has its own."""
    shards: list[list[TensorSlot]] = [[]]
    size = 0
    for slot in slots:
        bytes_ = int(np.prod(slot.shape)) * item_size
        if shards[-1] and size + bytes_ > limit:
            shards.append([])
            size = 0
        shards[-1].append(slot)
        size += bytes_
    return shards


def write_tensors(
    folder: Path,
    slots: Sequence[TensorSlot],
    read: Callable[[TensorSlot], np.ndarray],
    *,
    dtype: str,
    limit: int,
) -> int:
    """Writes every tensor, with one shard in memory at a time; returns the number of bytes.

    read: returns the weight (one row of a stack) of a slot. limit: bytes per shard.
    Raises UserError for entries that are not finite in `dtype`.
    """
    np_dtype = jnp.dtype(dtype)
    shards = plan_shards(slots, np_dtype.itemsize, limit)
    names = [SINGLE]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    weight_map: dict[str, str] = {}
    total = 0
    for name, shard in zip(names, shards, strict=True):
        tensors = {}
        for slot in shard:
            tensor = slot.to_hf(read(slot)).astype(np_dtype, copy=False)
            if not np.isfinite(tensor).all():
                raise UserError(
                    f"{slot.name} has entries that are not finite in {dtype}; export with "
                    "--dtype=float32, or from another checkpoint"
                )
            tensors[slot.name] = np.ascontiguousarray(tensor)
        with atomic_write(folder / name) as temporary:  # sets the permissions of the umask
            safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return total


def _weight_map(path: Path) -> dict[str, str]:
    """The file of every tensor. Raises ValueError, KeyError or TypeError for a malformed index."""
    files: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{path.name} does not name the files of its tensors")
    return files


class TensorFiles:
    """The tensors of a model's folder, sharded or not; opening reads no tensor.

    Raises UserError for missing or damaged files.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        try:
            if (folder / INDEX).exists():
                self._file_of = _weight_map(folder / INDEX)
                self._check_index()
            else:
                self._file_of = dict.fromkeys(self._names(SINGLE), SINGLE)
        except FileNotFoundError as error:
            raise UserError(f"{folder} has no {SINGLE}, or lacks one of its shards") from error
        except (safetensors.SafetensorError, *MALFORMED) as error:
            raise UserError(f"the weights in {folder} cannot be read ({error})") from error

    def _check_index(self) -> None:
        """Raises UserError unless the index and its files have the same tensors, each once."""
        index, files = self._folder / INDEX, sorted(set(self._file_of.values()))
        if outside := [file for file in files if Path(file).name != file]:
            raise UserError(f"{index} names {outside[0]}, which is not a file of its folder")
        stored = {(name, file) for file in files for name in self._names(file)}
        indexed = set(self._file_of.items())
        if indexed - stored:
            raise UserError(f"{index} names {min(indexed - stored)[0]}, which no file has")
        if stored - indexed:
            name, file = min(stored - indexed)
            raise UserError(f"{self._folder / file} has {name}, which {INDEX} does not place there")

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def _names(self, file: str) -> list[str]:
        with safetensors.safe_open(self._folder / file, framework="numpy") as stored:
            return list(stored.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        with safetensors.safe_open(self._folder / self._file_of[name], framework="numpy") as stored:
            return tuple(stored.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype of a tensor as safetensors names it, such as F32 or BF16."""
        with safetensors.safe_open(self._folder / self._file_of[name], framework="numpy") as stored:
            return stored.get_slice(name).get_dtype()

    def check_dtypes(self) -> None:
        """Raises UserError for tensors other than floats of at least 16 bits.

        Integers and float8 need scales, which only the quantization's own code applies.
        """
        for name in sorted(self._file_of):
            dtype = self.dtype(name)
            if dtype not in FLOATS:
                raise UserError(
                    f"{name} in {self._folder} is stored as {dtype}, as quantized weights are; "
                    f"only {', '.join(FLOATS)} can be imported. Use the model in its original "
                    "precision, or convert it to bfloat16."
                )

    def read(self, name: str) -> np.ndarray:
        """One tensor as stored. Raises UserError if it cannot be read."""
        try:
            path = self._folder / self._file_of[name]
            with safetensors.safe_open(path, framework="numpy") as stored:
                return np.asarray(stored.get_tensor(name))
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(
                f"the tensor {name} in {self._folder} cannot be read ({error})"
            ) from error
