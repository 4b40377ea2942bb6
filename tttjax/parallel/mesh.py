"""The device mesh and the table that maps logical axis names to mesh axes.

Weights and batches carry logical names; nothing outside this file names a mesh axis. `data` and
`fsdp` both shard the sequences of a batch; `fsdp` also shards the weights and the optimizer state;
`tensor` shards heads, MLPs and vocabulary within a layer.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tttjax.errors import UserError
from tttjax.parallel.fsdp import ShardedParam
from tttjax.types import Array, Params, PyTree

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the other axes work on the same sequences

LOGICAL_TO_MESH: dict[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "head_dim": (),
    "kv_groups": (),
    "state": (),
    "taps": (),
    "hidden": (),
    "layers": (),
}


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of `devices` (None: all). data = -1: the number of devices over fsdp x tensor.

    Raises UserError if the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    model_shards = fsdp * tensor
    if data == -1:
        data = max(len(devices) // model_shards, 1)
    if data * model_shards != len(devices):
        raise UserError(
            f"data {data} x fsdp {fsdp} x tensor {tensor} = {data * model_shards} devices does not "
            f"fit the {len(devices)} available; choose mesh.data, mesh.fsdp and mesh.tensor so "
            "that their product is the number of devices (mesh.data = -1 takes the remaining "
            "devices)"
        )
    grid = arrange_devices(devices, data, fsdp, tensor)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def arrange_devices(devices: Sequence[Any], data: int, fsdp: int, tensor: int) -> np.ndarray:
    """Devices [data, fsdp, tensor], arranged so that mesh neighbours are network neighbours.

    Axes of a TPU's torus are split where the mesh axes are not products of them. With several TPU
    slices fsdp and tensor stay within a slice; only `data` crosses slices.
    Raises UserError if `data` is not a multiple of the number of slices.
    """
    slices = 1
    if devices[0].platform == "tpu":
        slices = len({getattr(device, "slice_index", 0) for device in devices})
    if data % slices:
        raise UserError(
            f"mesh.data = {data} cannot be divided among {slices} TPU slices, because fsdp and "
            "tensor stay within a slice; make mesh.data a multiple of the number of slices"
        )
    if slices == 1:
        return create_device_mesh((data, fsdp, tensor), devices, allow_split_physical_axes=True)
    return create_hybrid_device_mesh(
        *((data // slices, fsdp, tensor), (slices, 1, 1), devices), allow_split_physical_axes=True
    )


def spec(mesh: Mesh, axes: Sequence[str]) -> PartitionSpec:
    """The partition of an array with these logical axes; mesh axes of size 1 are omitted.

    Raises KeyError for a name that is not in the table, ValueError if two dimensions map to one
    mesh axis.
    """
    entries = [
        tuple(axis for axis in LOGICAL_TO_MESH[name] if mesh.shape[axis] > 1) for name in axes
    ]
    used = [axis for entry in entries for axis in entry]
    if len(used) != len(set(used)):
        raise ValueError(f"two dimensions of {tuple(axes)} map to one mesh axis: {used}")
    return PartitionSpec(*(entry[0] if len(entry) == 1 else entry or None for entry in entries))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sequences sharded over data and fsdp; tokens not sharded."""
    return NamedSharding(mesh, spec(mesh, ["batch"]))


def is_axes(node: PyTree) -> bool:
    """Whether this is a leaf of `Transformer.axes()`: the axis names of one array."""
    return isinstance(node, tuple) and all(isinstance(name, str) for name in node)


def param_specs(mesh: Mesh, axes: Params) -> Params:
    """The partition of every weight, from its logical axes."""
    return jax.tree.map(partial(spec, mesh), axes, is_leaf=is_axes)


def param_shardings(mesh: Mesh, axes: Params, abstract: Params) -> Params:
    """Named shardings of every weight.

    Raises UserError if a dimension of a weight is not a multiple of its number of shards.
    """
    for part in ("slow", "fast"):
        shapes = flatten_dict(getattr(abstract, part), sep="/")
        names = flatten_dict(getattr(axes, part), sep="/")
        for path, array in shapes.items():
            for name, size in zip(names[path], array.shape, strict=True):
                num_shards = int(np.prod([mesh.shape[axis] for axis in LOGICAL_TO_MESH[name]]))
                if size % num_shards:
                    raise UserError(
                        f"the mesh does not fit the model: {path} has {size} entries along "
                        f"{name!r}, which is not a multiple of {num_shards} devices (mesh axis "
                        f"{' x '.join(LOGICAL_TO_MESH[name])})"
                    )
    return jax.tree.map(lambda s: NamedSharding(mesh, s), param_specs(mesh, axes))


def shardings_like_params(
    tree: PyTree, params: Params, shardings: Params, default: NamedSharding
) -> PyTree:
    """Shardings for a tree that contains parameter-shaped subtrees, such as optimizer state.

    A leaf whose path ends with a weight's path and that has its shape is sharded like it;
    every other leaf (counts) gets `default`.
    """

    def keys(path) -> tuple[str, ...]:
        return tuple(jax.tree_util.keystr((key,)) for key in path)

    by_path = {
        keys(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(shardings),
            strict=True,
        )
    }

    def sharding_of(path, leaf):
        parts = keys(path)
        for start in range(len(parts)):
            shape, sharding = by_path.get(parts[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        return default

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


# --- inside shard_map over the batch axes -------------------------------------------------------


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes, of size above 1, that shard the batch."""
    return tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)


def manual_axes(mesh: Mesh) -> set[str]:
    """Axes manual in shard_map: those that shard the batch, and those of size 1.

    The partitioner handles the others, except for kernels (`parallel.kernel_mesh`).
    """
    return {*batch_axes(mesh), *(axis for axis, size in mesh.shape.items() if size == 1)}


def manual(partition: PartitionSpec) -> PartitionSpec:
    """The part of a partition over the batch axes, manual in shard_map; `tensor` stays auto."""
    return PartitionSpec(*(entry if entry in BATCH_AXES else None for entry in partition))


def as_sharded_param(weight: Array, partition: PartitionSpec) -> Array | ShardedParam:
    """A shard as a `ShardedParam` for `all_gather_params`; unchanged if fsdp does not shard it."""
    if "fsdp" not in partition:
        return weight
    return ShardedParam(weight, "fsdp", tuple(partition).index("fsdp") - weight.ndim)


def reduce_mean(gradient: Array, partition: PartitionSpec, axes: tuple[str, ...]) -> Array:
    """Mean of a gradient over mesh axes; it is already summed over fsdp if fsdp shards it."""
    unreduced = tuple(axis for axis in axes if axis not in partition)
    if unreduced:
        gradient = jax.lax.psum(gradient, unreduced)
    return gradient / jax.lax.axis_size(axes)
