"""Moves weights to a model with another suffix, other fast weights, or added fast MLPs."""

from collections.abc import Mapping

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from tttjax.models.stacking import combine, partition
from tttjax.models.transformer import PARTS, Transformer
from tttjax.types import Array, Params

FAST_MLP = "fast_mlp"  # name prefix of the weights of the fast MLP and its norms


def relayout(
    params: Params,
    source: Transformer,
    target: Transformer,
    new_mlps: Mapping[str, Array] | None = None,
) -> Params:
    """The weights of `source` in the layout of `target`, which has the same blocks.

    For example to add an inner loop to a model that was trained without one.
    new_mlps: `fast_mlps` of the target, for those of its blocks that have none in the source.
    """
    flat = flatten_dict(combine(params.slow, params.fast), sep="/")
    rows_of: dict[str, dict[int, Array]] = {}
    for (source_path, source_row), (target_path, target_row) in zip(
        source.block_paths(), target.block_paths(), strict=True
    ):
        for path, leaf in flat.items():
            if path.startswith(source_path + "/"):
                name = target_path + path[len(source_path) :]
                rows_of.setdefault(name, {})[target_row] = leaf[source_row]
    for path, leaf in (new_mlps or {}).items():
        rows = rows_of.setdefault(path, {})
        rows |= {row: leaf[row] for row in range(len(leaf)) if row not in rows}
    outside_blocks = {path: leaf for path, leaf in flat.items() if path.split("/")[0] not in PARTS}
    stacked = {path: jnp.stack([x for _, x in sorted(r.items())]) for path, r in rows_of.items()}
    return partition(unflatten_dict({**outside_blocks, **stacked}, sep="/"), target.fast_paths)


def fast_mlps(model: Transformer, key: Array) -> dict[str, Array]:
    """The fast MLPs and their norms from `model.init(key)`, by path, [blocks, ...].

    Under `jax.jit` no other weight is computed.
    """
    params = model.init(key)
    flat = flatten_dict(combine(params.slow, params.fast), sep="/")
    return {path: leaf for path, leaf in flat.items() if _is_of_fast_mlp(path)}


def _is_of_fast_mlp(path: str) -> bool:
    """For paths such as `suffix/stage0/block0/fast_mlp_norm/weight`."""
    parts = path.split("/")
    return parts[0] in PARTS and parts[3].startswith(FAST_MLP)
