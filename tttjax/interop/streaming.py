"""Weights built up piece by piece from a checkpoint of another project.

The target, arrays divided over the devices of a mesh, is filled row by row of its stacks of blocks,
so that the host holds one piece at a time beside it.
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

from tttjax.models import Transformer, combine, partition
from tttjax.types import Array, Params

M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def return_freed_memory() -> None:
    """Gives back to the system what this process has freed, and from now on pieces of 1 MiB and
    more as soon as they are freed (with glibc; else does nothing).

    The library keeps those below 32 MiB for later otherwise, several times what is in use at once.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, 2**20)
        library.malloc_trim(0)


class WeightPiece(NamedTuple):
    """A whole weight (row None), or one block's part of a stack, with as many entries."""

    path: str
    row: int | None
    array: np.ndarray


def assemble(
    template: Params,
    pieces: Iterable[WeightPiece],
    model: Transformer,
    there: Mapping[str, Array] | None = None,
) -> Params:
    """The weights of a model out of pieces, each taken when the one before has arrived.

    template: jax.ShapeDtypeStructs with shardings. Entries are converted to its dtypes.
    there: weights by path that no piece is of. Raises ValueError for weights, or rows, that nothing
    brought.
    """
    wanted = flatten_dict(combine(template.slow, template.fast), sep="/")
    found: dict[str, Array] = dict(there or {})
    rows: dict[str, set[int]] = {}
    for path, row, array in pieces:
        target = wanted[path]
        if row is None:
            found[path] = _place(array.reshape(target.shape), target.sharding, target.dtype)
        else:
            if path not in found:
                found[path] = _empty(target.shape, target.dtype, target.sharding)()
            one = _place(array.reshape(target.shape[1:]), _of_row(target.sharding), target.dtype)
            found[path] = _put_row(target.sharding)(found[path], one, row)
            rows.setdefault(path, set()).add(row)
            del one
        # Without waiting, rows would be read faster than they are copied, and pile up.
        found[path].block_until_ready()
        del array  # before the next is read
    missing = [path for path in wanted if path not in found]
    missing += [path for path, its in rows.items() if len(its) < wanted[path].shape[0]]
    if missing:
        raise ValueError(f"no values came for {', '.join(missing)}")
    ordered = {path: found[path] for path in wanted}
    return partition(unflatten_dict(ordered, sep="/"), model.fast_paths)


def _place(array: np.ndarray, sharding: NamedSharding, dtype: Any) -> Array:
    converted = np.asarray(array, dtype)
    return jax.make_array_from_callback(converted.shape, sharding, lambda index: converted[index])


def _of_row(sharding: NamedSharding) -> NamedSharding:
    """That of one row of a stack; stacks are never divided among devices by row."""
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


@cache
def _empty(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
    return jax.jit(lambda: jax.numpy.zeros(shape, dtype), out_shardings=sharding)


@cache
def _put_row(sharding: NamedSharding) -> Any:
    """put(stack, one, row) -> the stack with that row; the stack's memory is used again."""

    def put(stack: Array, one: Array, row: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(stack, one, row, 0)

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)
