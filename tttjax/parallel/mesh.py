"""The device mesh, and the one table that maps logical axis names to it.

Weights and batches carry logical names; nothing outside this file names a mesh axis. `data` and
`fsdp` both divide the sequences of a batch; `fsdp` divides the weights and the optimizer's state
too; `tensor` divides heads, MLPs and vocabulary within a layer.
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
BATCH_AXES = ("data", "fsdp")  # they divide the batch; the rest works on the same sequences

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
    """A mesh of all devices, or of those given. data = -1 takes what the other axes leave.

    Raises UserError if the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    model_shards = fsdp * tensor
    if data == -1:
        data = max(len(devices) // model_shards, 1)
    if data * model_shards != len(devices):
        raise UserError(
            f"data {data} x fsdp {fsdp} x tensor {tensor} = {data * model_shards} devices does not "
            f"fit the {len(devices)} available; choose mesh.data, mesh.fsdp and mesh.tensor so that "
            "their product is the number of devices (mesh.data = -1 uses all of them)"
        )
    grid = arrange_devices(devices, data, fsdp, tensor)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def arrange_devices(devices: Sequence[Any], data: int, fsdp: int, tensor: int) -> np.ndarray:
    """Devices [data, fsdp, tensor], so that neighbours there are neighbours on the network.

    Where the axes are no product of those of a TPU's torus, these are split. Of several TPU slices
    each has whole rows of fsdp and tensor; `data` goes across them.
    Raises UserError if the slices do not divide `data`.
    """
    slices = 1
    if devices[0].platform == "tpu":
        slices = len({getattr(device, "slice_index", 0) for device in devices})
    if data % slices:
        raise UserError(
            f"mesh.data = {data} cannot be divided among {slices} TPU slices, and fsdp and tensor "
            "stay within one; choose them so that data is a multiple of the slices"
        )
    if slices == 1:
        return create_device_mesh((data, fsdp, tensor), devices, allow_split_physical_axes=True)
    return create_hybrid_device_mesh(
        *((data // slices, fsdp, tensor), (slices, 1, 1), devices), allow_split_physical_axes=True
    )


def spec(mesh: Mesh, axes: Sequence[str]) -> PartitionSpec:
    """The partition of an array with these logical axes; mesh axes of size 1 divide nothing.

    Raises KeyError for a name that is not in the table, ValueError if two dimensions would land on
    one mesh axis.
    """
    entries = [
        tuple(axis for axis in LOGICAL_TO_MESH[name] if mesh.shape[axis] > 1) for name in axes
    ]
    used = [axis for entry in entries for axis in entry]
    if len(used) != len(set(used)):
        raise ValueError(f"two dimensions of {tuple(axes)} map to one mesh axis: {used}")
    return PartitionSpec(*(entry[0] if len(entry) == 1 else entry or None for entry in entries))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sequences over data and fsdp, tokens whole."""
    return NamedSharding(mesh, spec(mesh, ["batch"]))


def is_axes(node: PyTree) -> bool:
    """A leaf of `Transformer.axes()`: the names of one array's dimensions."""
    return isinstance(node, tuple) and all(isinstance(name, str) for name in node)


def param_specs(mesh: Mesh, axes: Params) -> Params:
    """The partition of every weight, from its logical axes."""
    return jax.tree.map(partial(spec, mesh), axes, is_leaf=is_axes)


def param_shardings(mesh: Mesh, axes: Params, abstract: Params) -> Params:
    """Named shardings of every weight.

    Raises UserError for a weight with a dimension that its mesh axes do not divide.
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
                        f"{name!r}, which {num_shards} devices (mesh axis "
                        f"{' x '.join(LOGICAL_TO_MESH[name])}) do not divide"
                    )
    return jax.tree.map(lambda s: NamedSharding(mesh, s), param_specs(mesh, axes))


def like_params(tree: PyTree, params: Params, shardings: Params, default: NamedSharding) -> PyTree:
    """Shardings for a tree that has parameter-shaped parts, such as an optimizer's state.

    A leaf whose path ends like a weight's path and whose shape is the weight's is sharded like it;
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
    """The mesh axes that do divide the batch."""
    return tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)


def manual_axes(mesh: Mesh) -> set[str]:
    """What shard_map handles: the axes that divide the batch, and those that divide nothing.

    The others are left to the partitioner, except by kernels, which it cannot divide
    (`ops.kernel_mesh`).
    """
    return {*batch_axes(mesh), *(axis for axis, size in mesh.shape.items() if size == 1)}


def manual(partition: PartitionSpec) -> PartitionSpec:
    """The part of a partition that shard_map over the batch axes handles; `tensor` stays auto."""
    return PartitionSpec(*(entry if entry in BATCH_AXES else None for entry in partition))


def as_sharded_param(weight: Array, partition: PartitionSpec) -> Array | ShardedParam:
    """A shard as a leaf that `all_gather_params` gathers; unchanged if fsdp does not shard it."""
    if "fsdp" not in partition:
        return weight
    return ShardedParam(weight, "fsdp", tuple(partition).index("fsdp") - weight.ndim)


def reduce_mean(gradient: Array, partition: PartitionSpec, axes: tuple[str, ...]) -> Array:
    """Mean over the mesh axes `axes` of a gradient, summed over fsdp already if that divides it."""
    model_shards = tuple(axis for axis in axes if axis not in partition)
    if model_shards:
        gradient = jax.lax.psum(gradient, model_shards)
    return gradient / jax.lax.axis_size(axes)
