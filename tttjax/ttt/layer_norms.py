"""Norms of fast weights, or of their gradients, layer by layer."""

from functools import cache

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from tttjax.models import SplitModel, Transformer
from tttjax.types import Array, PyTree


@cache
def fast_layers(model: Transformer) -> dict[str, tuple[str, int | None]]:
    """What has fast weights, in the order in which it runs: name to (path, row in the stack).

    Blocks are called layer0, layer1, ... as they are counted in the whole model; what stands behind
    the last one has its own name, and no row.
    """
    found: dict[str, tuple[str, int | None]] = {}
    for number, (path, row) in enumerate(model.block_paths()):
        if any(weight.startswith(path + "/") for weight in model.fast_paths):
            found[f"layer{number}"] = path, row
    fast = {weight.split("/")[0] for weight in model.fast_paths}
    return {**found, **{name: (name, None) for name in ("final_norm", "head") if name in fast}}


def squares(tree: PyTree) -> PyTree:
    """Sums of squares of fast weights: of each row of the blocks' stacks, and of all else whole.

    In float32 at least; of a tree laid out as `Params.fast` or as `SplitModel.above`.
    """

    def of_leaf(path, leaf: Array) -> Array:
        wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        first = 1 if path[0].key == "suffix" else 0
        return jnp.sum(jnp.square(wide), axis=range(first, leaf.ndim))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def norms(model: Transformer, square: PyTree) -> Array:
    """Norms by layer, [L] in the order of `fast_layers`, from `squares` laid out as `Params.fast`.

    Together they make the norm of everything: the root of the sum of their squares.
    """
    flat = flatten_dict(square, sep="/")

    def total(path: str, row: int | None) -> Array:
        parts = [x for name, x in flat.items() if name == path or name.startswith(path + "/")]
        return sum((x if row is None else x[row] for x in parts), start=jnp.zeros(()))

    totals = [total(*place) for place in fast_layers(model).values()]
    square_L = jnp.stack(totals) if totals else jnp.zeros(0)
    # As of `global_norm`, the slope at 0 is 0.
    return jnp.sqrt(jnp.where(square_L == 0, 1.0, square_L)) * (square_L != 0)


def sequential_norms(cut: SplitModel, tree: PyTree) -> Array:
    """`norms` of a tree as `SplitModel.above` lays it out."""
    return norms(cut.model, cut.join(squares(tree)))
