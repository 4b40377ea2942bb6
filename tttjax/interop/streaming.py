"""Streaming of foreign weights into sharded arrays, one tensor or row at a time.

Stacks of blocks are filled row by row, so that beside the target the host holds one slice only.
"""

import ctypes
import platform
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from tttjax.models.stacking import combine, partition
from tttjax.models.transformer import Transformer
from tttjax.types import Array, Params

M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def return_freed_memory() -> None:
    """Returns freed memory to the system, and from now on blocks of at least 1 MiB at once.

    With glibc only, which otherwise retains freed blocks below 32 MiB, several times the memory in
    use. Does nothing elsewhere.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, 2**20)
        library.malloc_trim(0)


class WeightSlice(NamedTuple):
    """A full weight (row None) or one row of a stack of blocks; any shape with as many entries."""

    path: str
    row: int | None
    array: np.ndarray


def flat_weights(params: Params) -> dict[str, Any]:
    """Slow and fast weights by path, such as `prefix/stage0/block0/mixer/wq`."""
    return flatten_dict(combine(params.slow, params.fast), sep="/")


def abstract_weights(model: Transformer) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every weight by its path; blocks are stacked."""
    return flat_weights(model.abstract_params())


def assemble(
    template: Params,
    slices: Iterable[WeightSlice],
    model: Transformer,
    initial: Mapping[str, Array] | None = None,
) -> Params:
    """Builds the weights of a model from slices, each read after the previous one is copied.

    template: jax.ShapeDtypeStructs with shardings; entries are converted to its dtypes. initial:
    weights by path that have no slices. Raises ValueError for missing weights or rows.
    """
    targets = flat_weights(template)
    weights: dict[str, Array] = dict(initial or {})
    rows: dict[str, set[int]] = {}
    for path, row, array in slices:
        target = targets[path]
        if row is None:
            weights[path] = _put(array.reshape(target.shape), target.sharding, target.dtype)
        else:
            if path not in weights:
                weights[path] = _zeros(target.shape, target.dtype, target.sharding)()
            row_array = _put(
                array.reshape(target.shape[1:]), _row_sharding(target.sharding), target.dtype
            )
            weights[path] = _put_row(target.sharding)(weights[path], row_array, row)
            rows.setdefault(path, set()).add(row)
            del row_array
        # Wait, or rows would be read faster than they are copied, and fill the memory.
        weights[path].block_until_ready()
        del array  # free it before the next is read
    missing = [path for path in targets if path not in weights]
    missing += [path for path, filled in rows.items() if len(filled) < targets[path].shape[0]]
    if missing:
        raise ValueError(f"no values for {', '.join(missing)}")
    ordered = {path: weights[path] for path in targets}
    return partition(unflatten_dict(ordered, sep="/"), model.fast_paths)


def _put(array: np.ndarray, sharding: NamedSharding, dtype: Any) -> Array:
    converted = np.asarray(array, dtype)
    return jax.make_array_from_callback(converted.shape, sharding, lambda index: converted[index])


def _row_sharding(sharding: NamedSharding) -> NamedSharding:
    """The sharding of one row of a stack; the row axis is never sharded."""
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


@cache
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
    return jax.jit(lambda: jax.numpy.zeros(shape, dtype), out_shardings=sharding)


@cache
def _put_row(sharding: NamedSharding) -> Any:
    """put(stack, row_array, row) -> the stack with that row; the stack is donated."""

    def put(stack: Array, row_array: Array, row: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(stack, row_array, row, 0)

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)
