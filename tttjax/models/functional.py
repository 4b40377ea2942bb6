"""From nnx modules to plain nested dicts: stacks of like blocks, and the fast/slow partition."""

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from tttjax.models.layers import FastWeight
from tttjax.types import Array, Params, PyTree

ModuleFactory = Callable[[nnx.Rngs], nnx.Module]


@dataclass(frozen=True)
class Stack:
    """`repeats` copies of one module whose weights lie in one array each, [repeats, ...]."""

    make: ModuleFactory
    repeats: int

    def _abstract(self) -> nnx.Module:
        return nnx.eval_shape(lambda: self.make(nnx.Rngs(0)))

    def init(self, key: Array) -> PyTree:
        """Random weights, every copy with a key of its own."""

        def init_one(key):
            return nnx.to_pure_dict(nnx.state(self.make(nnx.Rngs(params=key))))

        return jax.vmap(init_one)(jax.random.split(key, self.repeats))

    def variables(self) -> dict[tuple[str, ...], nnx.Variable]:
        """The declared weights of one copy by path."""
        flat: Any = nnx.to_flat_state(nnx.state(self._abstract()))
        return dict(flat)

    def module(self) -> Any:
        """One copy without values, to ask it for sizes."""
        return self._abstract()

    def apply(self, weights: PyTree, *args: Any) -> Any:
        """Calls one copy with one copy's weights (no leading axis)."""
        graphdef, _ = nnx.split(self._abstract())
        return nnx.merge(graphdef, weights)(*args)


def declared_axes(variable: nnx.Variable, stacked: bool) -> tuple[str, ...]:
    """Logical axis names of a weight; a stack of blocks has `layers` in front."""
    axes = variable.get_metadata()["axes"]
    return ("layers", *axes) if stacked else tuple(axes)


def is_declared_fast(variable: nnx.Variable) -> bool:
    return isinstance(variable, FastWeight)


def path_filter(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Whether a path like `suffix/stage0/block0/mlp/w1` matches one of the glob patterns.

    `**` stands for any number of path parts (also none), `*` for anything within one.
    """

    def match(parts: list[str], pattern: list[str]) -> bool:
        if not pattern:
            return not parts
        if pattern[0] == "**":
            return any(match(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
        return (
            bool(parts)
            and fnmatch.fnmatchcase(parts[0], pattern[0])
            and match(parts[1:], pattern[1:])
        )

    split = [pattern.split("/") for pattern in patterns]
    return lambda path: any(match(path.split("/"), pattern) for pattern in split)


def partition(tree: PyTree, fast_paths: frozenset[str]) -> Params:
    """Divides a nested dict into the leaves at `fast_paths` and the rest."""
    flat = flatten_dict(tree, sep="/")
    fast = {path: leaf for path, leaf in flat.items() if path in fast_paths}
    slow = {path: leaf for path, leaf in flat.items() if path not in fast_paths}
    return Params(slow=unflatten_dict(slow, sep="/"), fast=unflatten_dict(fast, sep="/"))


def combine(slow: PyTree, fast: PyTree) -> PyTree:
    """The inverse of `partition`: one nested dict with all leaves."""
    return unflatten_dict({**flatten_dict(slow), **flatten_dict(fast)})
