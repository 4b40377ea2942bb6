"""Sums and norms of fast weights, or of their gradients or rates, by layer."""

from functools import cache

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from tttjax.models.split_model import SplitModel
from tttjax.models.transformer import Transformer
from tttjax.types import Array, PyTree


@cache
def fast_layers(model: Transformer) -> dict[str, tuple[str, int | None]]:
    """The layers with fast weights, in order of execution: name to (path, row in the stack).

    Blocks are called layer0, layer1, ... by their index in the whole model; final norm and head
    have their own name, and no row.
    """
    layers: dict[str, tuple[str, int | None]] = {}
    for index, (path, row) in enumerate(model.block_paths()):
        if any(weight.startswith(path + "/") for weight in model.fast_paths):
            layers[f"layer{index}"] = path, row
    fast = {weight.split("/")[0] for weight in model.fast_paths}
    return {**layers, **{name: (name, None) for name in ("final_norm", "head") if name in fast}}


def row_sums(tree: PyTree) -> PyTree:
    """Sums of fast weights: of each row of stacked blocks, of each other array.

    In float32 at least; for a tree like `Params.fast` or `SplitModel.sequential_weights`.
    """

    def of_leaf(path: tuple[jax.tree_util.DictKey, ...], leaf: Array) -> Array:
        wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        first = 1 if path[0].key == "suffix" else 0
        return jnp.sum(wide, axis=range(first, leaf.ndim))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def squares(tree: PyTree) -> PyTree:
    """`row_sums` of the squares, which are taken in float32 at least."""

    def square(leaf: Array) -> Array:
        return jnp.square(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)))

    return row_sums(jax.tree.map(square, tree))


def by_layer(model: Transformer, rows: PyTree) -> Array:
    """Sums by layer, [L] in the order of `fast_layers`. rows: `row_sums` of a tree."""
    flat = flatten_dict(rows, sep="/")

    def total(path: str, row: int | None) -> Array:
        parts = [x for name, x in flat.items() if name == path or name.startswith(path + "/")]
        return sum((x if row is None else x[row] for x in parts), start=jnp.zeros(()))

    totals = [total(*layer) for layer in fast_layers(model).values()]
    return jnp.stack(totals) if totals else jnp.zeros(0)


def norms(model: Transformer, square: PyTree) -> Array:
    """Norms by layer, [L] in the order of `fast_layers`.

    square: `squares` of a tree like `Params.fast`. The root of the sum of the squared norms is the
    norm of all fast weights.
    """
    square_L = by_layer(model, square)
    # As in `global_norm`, the derivative at 0 is 0.
    return jnp.sqrt(jnp.where(square_L == 0, 1.0, square_L)) * (square_L != 0)


def sequential_norms(split: SplitModel, tree: PyTree) -> Array:
    """`norms` of a tree laid out by `SplitModel.sequential_weights`."""
    return norms(split.model, split.join(squares(tree)))
