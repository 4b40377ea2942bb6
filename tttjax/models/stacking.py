"""Stacks of equal blocks as nested dicts of arrays; the partition into fast and slow weights."""

import fnmatch
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from tttjax.models.layers import FastWeight
from tttjax.models.mixer import AttentionForm
from tttjax.parallel.fsdp import all_gather_params, is_sharded
from tttjax.types import Array, Params, PyTree

UNROLL_UP_TO = 2  # up to so many blocks a loop costs more than it saves


@lru_cache(maxsize=512)
def _abstract(
    make: Callable[..., nnx.Module], arguments: tuple[Hashable, ...], widest: jnp.dtype
) -> nnx.Module:
    """A module without values. Cached, since every trace of a model asks for its modules often.

    widest: float64 or, without x64, float32; dtypes of the weights depend on it.
    """
    del widest
    return nnx.eval_shape(lambda: make(*arguments, nnx.Rngs(0)))


@dataclass(frozen=True)
class Stack:
    """`repeats` copies of one module whose weights lie in one array each, [repeats, ...].

    make: called with `arguments` and nnx.Rngs.
    """

    make: Callable[..., nnx.Module]
    repeats: int
    arguments: tuple[Hashable, ...] = ()

    def init(self, key: Array) -> PyTree:
        """Random weights, with a different key for every copy."""

        def init_one(key: Array) -> PyTree:
            module = self.make(*self.arguments, nnx.Rngs(params=key))
            return nnx.to_pure_dict(nnx.state(module))

        return jax.vmap(init_one)(jax.random.split(key, self.repeats))

    def variables(self) -> dict[tuple[str, ...], nnx.Variable]:
        """The declared weights of one copy by path."""
        flat: Any = nnx.to_flat_state(nnx.state(self.module()))
        return dict(flat)

    def module(self) -> Any:
        """One copy without values, for shapes and settings. Do not change it."""
        return _abstract(self.make, self.arguments, jnp.result_type(float))

    def cast_params(self, weights: PyTree, dtype: jnp.dtype, *, arrays: bool) -> PyTree:
        """Casts weights declared `cast_to_compute` to `dtype`.

        arrays: False casts only FSDP-sharded weights, when they are gathered.
        """
        flat = flatten_dict(weights)
        for path, variable in self.variables().items():
            leaf = flat.get(path)
            if leaf is None or not variable.get_metadata().get("cast_to_compute"):
                continue
            if is_sharded(leaf):
                flat[path] = replace(leaf, dtype=dtype)
            elif arrays:
                flat[path] = leaf.astype(dtype)
        return unflatten_dict(flat)

    def apply(self, weights: PyTree, *args: Any) -> Any:
        """Calls one copy with one copy's weights (no leading axis)."""
        graphdef, _ = nnx.split(self.module())
        return nnx.merge(graphdef, weights)(*args)


def run_stage(
    stacks: Mapping[str, Stack],
    weights: PyTree,
    state: PyTree | None,
    x_TD: Array,
    position: Array,
    *,
    remat: bool,
    cast: bool,
    form: AttentionForm = "dense",
) -> tuple[Array, PyTree | None]:
    """Runs stacks of equal height row by row: row 0 of each in order, then row 1 of each, ...

    weights, state: by the name of the stack; state None: the sequence starts here and ends here.
    remat: recompute each row in the backward pass. cast: cast all weights to the compute dtype at
    once; otherwise the derivative stores a cast copy of every row's weights. form: of attention.
    Returns the hidden states [T, D] and the new state.
    """

    def one_row(x_TD: Array, row: tuple[PyTree, PyTree]) -> tuple[Array, PyTree]:
        row_weights, row_state = row
        row_weights = all_gather_params(row_weights)
        new_state = {}
        for name, stack in stacks.items():
            block_state = row_state and row_state[name]
            x_TD, new_state[name] = stack.apply(
                row_weights[name], x_TD, block_state, position, form
            )
        return x_TD, row_state and new_state

    weights = {
        name: stack.cast_params(weights[name], x_TD.dtype, arrays=cast and not remat)
        for name, stack in stacks.items()
    }
    if remat:
        one_row = jax.checkpoint(one_row, prevent_cse=False)
    repeats = next(iter(stacks.values())).repeats
    unroll = repeats <= UNROLL_UP_TO
    return jax.lax.scan(one_row, x_TD, (weights, state), length=repeats, unroll=unroll)


def empty_state(stack: Stack, max_length: int, dtype: jnp.dtype) -> PyTree:
    """The state of a stack before the first token, [repeats, ...]."""
    one = jax.eval_shape(lambda: stack.module().init_state(max_length, dtype))
    return jax.tree.map(lambda x: jnp.zeros((stack.repeats, *x.shape), x.dtype), one)


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
    """Splits a nested dict into fast weights (`fast_paths`) and slow weights."""
    flat = flatten_dict(tree, sep="/")
    fast = {path: leaf for path, leaf in flat.items() if path in fast_paths}
    slow = {path: leaf for path, leaf in flat.items() if path not in fast_paths}
    return Params(slow=unflatten_dict(slow, sep="/"), fast=unflatten_dict(fast, sep="/"))


def combine(slow: PyTree, fast: PyTree) -> PyTree:
    """The inverse of `partition`: one nested dict with all leaves."""
    return unflatten_dict({**flatten_dict(slow), **flatten_dict(fast)})
