"""Safetensors files of a model: written shard by shard, read tensor by tensor."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from tttjax.errors import UserError
from tttjax.interop.huggingface.names import TensorPlace

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def plan_shards(
    places: Sequence[TensorPlace], item_size: int, limit: int
) -> list[list[TensorPlace]]:
    """The tensors in order, cut into shards of at most `limit` bytes, but for a larger tensor."""
    shards: list[list[TensorPlace]] = [[]]
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
    places: Sequence[TensorPlace],
    read: Callable[[TensorPlace], np.ndarray],
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
        safetensors.numpy.save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return total


def _weight_map(path: Path) -> dict[str, str]:
    """The file of every tensor. ValueError, KeyError or TypeError for anything else."""
    files: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    if not isinstance(files, dict) or any(Path(name).name != name for name in files.values()):
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
                absent = set(self._file_of) - {
                    name for file in set(self._file_of.values()) for name in self._names(file)
                }
                if absent:
                    raise UserError(f"{folder / INDEX} names {min(absent)}, which no file has")
            else:
                self._file_of = dict.fromkeys(self._names(SINGLE), SINGLE)
        except FileNotFoundError as error:
            raise UserError(f"{folder} has no {SINGLE}, or lacks one of its shards") from error
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"the weights in {folder} cannot be read ({error})") from error

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
