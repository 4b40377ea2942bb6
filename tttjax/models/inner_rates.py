"""Learned inner learning rates: slow weights that the outer optimizer trains with the model.

The inner loop updates a fast weight with the rate lr * exp(r). lr is the configured rate with its
warm-up; r starts at 0, so that training starts from the configured rate, and weight decay pulls
back to it. `inner.learn_lr` says how many r there are: one for the model, one for each layer, or
one for each entry of the fast weights (Meta-SGD, arXiv 1707.09835; per layer: arXiv 1810.09502).
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from tttjax.types import Array, PyTree

PART = "inner_lr"  # of the slow weights


class Declaration(NamedTuple):
    """Shape and logical axis names of a weight, with its stack's height in front."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]


def declare_rates(kind: str, fast: Mapping[str, Declaration]) -> dict[str, Declaration]:
    """The rates r by path. kind: `inner.learn_lr`. fast: the fast weights by path."""
    if kind == "none":
        return {}
    result = {}
    for path, (shape, axes) in fast.items():
        stacked = path.startswith("suffix/")
        rank = {"model": 0, "layer": int(stacked), "weight": len(shape)}[kind]
        result[_rate_path(kind, path)] = Declaration(shape[:rank], axes[:rank])
    return result


def _rate_path(kind: str, path: str) -> str:
    """The path of the rate r of a fast weight."""
    if kind == "model":
        return PART
    parts = path.split("/")
    layer = parts[:3] if parts[0] == "suffix" else parts[:1]  # a stack of layers, or head or norm
    return "/".join([PART, *(layer if kind == "layer" else parts)])


def inner_rates(
    kind: str, fast_ranks: Mapping[str, int], slow: PyTree, lr: Array | float
) -> Array | float | PyTree:
    """The rate of every fast weight: a scalar, or a tree like `Params.fast` to broadcast with it.

    kind: `inner.learn_lr`. fast_ranks: number of axes of the fast weights by path.
    """
    if kind == "none":
        return lr
    rates = flatten_dict({PART: slow[PART]}, sep="/")
    if kind == "model":
        return lr * jnp.exp(rates[PART])
    result = {}
    for path, rank in fast_ranks.items():
        r = rates[_rate_path(kind, path)]
        result[path] = lr * jnp.exp(r.reshape(*r.shape, *(1,) * (rank - r.ndim)))
    return unflatten_dict(result, sep="/")
