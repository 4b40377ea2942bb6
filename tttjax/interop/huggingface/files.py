"""Safetensors files of a model: written shard by shard, read tensor by tensor."""

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
MALFORMED = (ValueError, KeyError, TypeError, AttributeError)  # by an index of another form
FLOATS = ("F64", "F32", "F16", "BF16")  # what NumPy, with JAX's types, has numbers for


def plan_shards(places: Sequence[TensorSlot], item_size: int, limit: int) -> list[list[TensorSlot]]:
    """The tensors in order, cut into shards of at most `limit` bytes, but for a larger tensor."""
    shards: list[list[TensorSlot]] = [[]]
    size = 0
    for place in places:
        bytes_ = int(np.prod(place.shape)) * item_size
        if shards[-1] and size + bytes_ > limit:
            shards.append([])
            size = 0
        shards[-1].append(place)
        size += bytes_
    return shards


def write_tensors(
    folder: Path,
    places: Sequence[TensorSlot],
    read: Callable[[TensorSlot], np.ndarray],
    *,
    dtype: str,
    limit: int,
) -> int:
    """Writes every tensor, one shard in memory at a time; the number of bytes.

    read: our weight (its row alone) at a place. limit: bytes of a shard.
    """
    number_type = jnp.dtype(dtype)
    shards = plan_shards(places, number_type.itemsize, limit)
    names = [SINGLE]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    weight_map: dict[str, str] = {}
    total = 0
    for name, shard in zip(names, shards, strict=True):
        tensors = {}
        for place in shard:
            theirs = place.to_theirs(read(place)).astype(number_type, copy=False)
            if not np.isfinite(theirs).all():
                raise UserError(
                    f"{place.name} has entries that are not finite numbers in {dtype}; export with "
                    "--dtype=float32, or another checkpoint"
                )
            tensors[place.name] = np.ascontiguousarray(theirs)
        with atomic_write(folder / name) as temporary:  # for its permissions
            safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return total


def _weight_map(path: Path) -> dict[str, str]:
    """The file of every tensor. ValueError, KeyError or TypeError for anything else."""
    files: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{path.name} does not name the files of its tensors")
    return files


class TensorFiles:
    """The tensors of a model's folder, sharded or not, opened and not read.

    Raises UserError for files that are missing or damaged.
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
        """UserError unless the index and its files have the same tensors, each once."""
        index, files = self._folder / INDEX, sorted(set(self._file_of.values()))
        if outside := [file for file in files if Path(file).name != file]:
            raise UserError(f"{index} names {outside[0]}, which is not a file of its folder")
        there = {(name, file) for file in files for name in self._names(file)}
        wanted = set(self._file_of.items())
        if wanted - there:
            raise UserError(f"{index} names {min(wanted - there)[0]}, which no file has")
        if there - wanted:
            name, file = min(there - wanted)
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

    def kind(self, name: str) -> str:
        """The type of a tensor's entries, as F32 or BF16."""
        with safetensors.safe_open(self._folder / self._file_of[name], framework="numpy") as stored:
            return stored.get_slice(name).get_dtype()

    def check_kinds(self) -> None:
        """UserError for a tensor that holds anything but floating-point numbers of 16 bits or more.

        Whole numbers and float8 need scales, which only their quantisation's own code applies.
        """
        for name in sorted(self._file_of):
            kind = self.kind(name)
            if kind not in FLOATS:
                raise UserError(
                    f"{name} in {self._folder} is stored as {kind}, as quantized weights are; "
                    f"only {', '.join(FLOATS)} can be imported, so take the model in its original "
                    "precision, or convert it to bfloat16 first."
                )

    def read(self, name: str) -> np.ndarray:
        """One tensor, as it is stored."""
        try:
            path = self._folder / self._file_of[name]
            with safetensors.safe_open(path, framework="numpy") as stored:
                return np.asarray(stored.get_tensor(name))
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(
                f"the tensor {name} in {self._folder} cannot be read ({error})"
            ) from error
