"""Kernels on a mesh: the partitioner cannot shard them, so each device runs its own heads.

Arrays have heads in the last dimension but one, as in [T, H, K].
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec


def auto_axes() -> dict[str, int]:
    """Axes of the current mesh that the partitioner handles, with their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in types if kind != AxisType.Manual}


def unsharded_reason(heads: int) -> str:
    """Why kernels cannot run on the current mesh; empty if they can."""
    auto = auto_axes()
    num_shards = math.prod(auto.values())
    if num_shards > 1 and not jax.sharding.get_abstract_mesh().manual_axes:
        return (
            f"the partitioner shards the work over {num_shards} devices, and cannot shard a kernel"
        )
    if heads % num_shards:
        axes = ", ".join(auto)
        return f"{heads} heads are not a multiple of {num_shards} devices (mesh axes {axes})"
    return ""


def shard_over_heads(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call(*arguments)` sharded over heads; arguments and results are trees of arrays. Arrays
    with fewer than two dimensions have no heads."""
    axes = tuple(auto_axes())
    if not axes:
        return call

    def spec(x: Any) -> PartitionSpec:
        return PartitionSpec(*(None,) * (x.ndim - 2), axes, None) if x.ndim > 1 else PartitionSpec()

    def sharded(*arguments: Any) -> Any:
        results = jax.eval_shape(call, *arguments)
        return jax.shard_map(
            call,
            in_specs=jax.tree.map(spec, arguments),
            out_specs=jax.tree.map(spec, results),
            axis_names=set(axes),
            check_vma=False,
        )(*arguments)

    return sharded
