"""Kernels on a mesh: the partitioner cannot divide them, so each device runs its own heads.

Arrays have heads in the last dimension but one, as in [T, H, K].
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec


def free_axes() -> dict[str, int]:
    """Axes of the mesh in force that the partitioner handles, with their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in types if kind != AxisType.Manual}


def why_not_divided(heads: int) -> str:
    """Why the mesh in force keeps kernels away; empty if it does not."""
    free = free_axes()
    ways = math.prod(free.values())
    if ways > 1 and not jax.sharding.get_abstract_mesh().manual_axes:
        return f"the partitioner divides the work among {ways} devices, and cannot divide a kernel"
    if heads % ways:
        return f"mesh axes {', '.join(free)} of {ways} devices do not divide {heads} heads"
    return ""


def over_heads(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call(*arguments)` on every device's own heads; arguments and results are trees of arrays,
    of which those with less than two dimensions have no heads."""
    axes = tuple(free_axes())
    if not axes:
        return call

    def spec(x: Any) -> PartitionSpec:
        return PartitionSpec(*(None,) * (x.ndim - 2), axes, None) if x.ndim > 1 else PartitionSpec()

    def divided(*arguments: Any) -> Any:
        results = jax.eval_shape(call, *arguments)
        return jax.shard_map(
            call,
            in_specs=jax.tree.map(spec, arguments),
            out_specs=jax.tree.map(spec, results),
            axis_names=set(axes),
            check_vma=False,
        )(*arguments)

    return divided
