"""Bytes on one device by kind: the compiler's total, split by what the traced program saves.

Arguments are exact. The residuals of the forward pass are the stacked outputs of its loops. Those
shaped like fast weights are the trajectory, the others activations. The remainder is temporary.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from tttjax.planning.count import inner_jaxprs, num_consts_and_carry
from tttjax.planning.primitives import size_in_bytes
from tttjax.training.step import TrainState
from tttjax.types import PyTree


@dataclass(frozen=True)
class Memory:
    """Bytes of one device. program: code, and outputs that reuse no argument's buffer."""

    parameters: float
    optimizer: float
    batch: float
    trajectory: float
    activations: float
    temporary: float
    program: float

    @property
    def total(self) -> float:
        return self.state + self.batch + self.working + self.program

    @property
    def state(self) -> float:
        return self.parameters + self.optimizer

    @property
    def working(self) -> float:
        """What is allocated only during a step."""
        return self.trajectory + self.activations + self.temporary


@dataclass(frozen=True)
class Saved:
    """Bytes that one device keeps from the forward to the backward pass."""

    trajectory: float = 0.0
    activations: float = 0.0


def bytes_per_device(tree: PyTree) -> float:
    """Of the largest shards of abstract arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def known_memory(state: TrainState, batch: PyTree, saved: Saved) -> Memory:
    """What is known before compilation: the arguments, and what the backward pass reads."""
    parameters, everything = bytes_per_device(state.params), bytes_per_device(state)
    return Memory(
        parameters=parameters,
        optimizer=everything - parameters,
        batch=bytes_per_device(batch),
        trajectory=saved.trajectory,
        activations=saved.activations,
        temporary=0.0,
        program=0.0,
    )


def split_working(known: Memory, working: float, program: float = 0.0) -> Memory:
    """The compiler's totals by kind. working: all memory of the step besides its arguments."""
    trajectory = min(known.trajectory, working)
    activations = min(known.activations, working - trajectory)
    temporary = working - trajectory - activations
    return replace(
        known,
        trajectory=trajectory,
        activations=activations,
        temporary=temporary,
        program=program,
    )


def device_program(program: ClosedJaxpr) -> Jaxpr:
    """The jaxpr that one device runs on its own sequences: the body of shard_map, if any."""

    def find(jaxpr: Jaxpr) -> Jaxpr | None:
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "shard_map":
                return eqn.params["jaxpr"]
            if eqn.primitive.name in ("jit", "pjit"):
                bodies = filter(None, map(find, inner_jaxprs(eqn)))
                if body := next(bodies, None):
                    return body
        return None

    return find(program.jaxpr) or program.jaxpr


def saved_bytes(jaxpr: Jaxpr, fast: PyTree) -> Saved:
    """Stacked outputs of the outermost loops that have any, if a later loop reads them.

    fast: the fast weights, whose shapes identify the trajectory.
    """
    shapes = _shapes_of_weights(fast)
    read_later = _read_by_loops(jaxpr)
    trajectory = activations = 0.0
    for eqn in jaxpr.eqns:
        stacked = _stacked(eqn) if eqn.primitive.name == "scan" else []
        residuals = [var for var in stacked if var in read_later and _is_float(var)]
        if not residuals:
            for inner in inner_jaxprs(eqn):
                saved = saved_bytes(inner, fast)
                trajectory += saved.trajectory
                activations += saved.activations
        for var in residuals:
            if _has_suffix_in(var.aval.shape[1:], shapes):
                trajectory += size_in_bytes(var)
            else:
                activations += size_in_bytes(var)
    return Saved(trajectory, activations)


# What moves the elements of an array without computing.
REARRANGING = {
    *("reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim", "iota", "slice"),
    *("rev", "concatenate", "convert_element_type", "dynamic_slice", "copy"),
}


def _stacked(eqn: JaxprEqn) -> list[Any]:
    return list(eqn.outvars[num_consts_and_carry(eqn)[1] :])


def _read_by_loops(jaxpr: Jaxpr) -> set[Any]:
    """Variables that a loop (or any nested program) reads, directly or rearranged."""
    variables: set[Any] = set()
    for eqn in reversed(jaxpr.eqns):
        rearranges = eqn.primitive.name in REARRANGING and not variables.isdisjoint(eqn.outvars)
        if rearranges or any(True for _ in inner_jaxprs(eqn)):
            variables |= _inputs_of([eqn])
    return variables


def _inputs_of(eqns: Iterable[JaxprEqn]) -> set[Any]:
    return {var for eqn in eqns for var in eqn.invars if not isinstance(var, Literal)}


def _is_float(var: Any) -> bool:
    return var.aval.ndim > 1 and jax.dtypes.issubdtype(var.aval.dtype, np.floating)


def _shapes_of_weights(fast: PyTree) -> set[tuple[int, ...]]:
    """Shapes of the arrays and, where these stack several blocks, of one block's weights."""
    shapes = {tuple(leaf.shape) for leaf in jax.tree.leaves(fast)}
    return shapes | {shape[1:] for shape in shapes if len(shape) > 2}


def _has_suffix_in(shape: tuple[int, ...], shapes: set[tuple[int, ...]]) -> bool:
    """Whether a shape is one of `shapes` with any leading dimensions (batch, blocks)."""
    return any(shape[-len(suffix) :] == suffix for suffix in shapes)
