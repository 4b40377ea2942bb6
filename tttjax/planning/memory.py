"""Bytes on one device by kind: exact for arguments, from the traced program for the rest.

The residuals of the forward pass are the stacked outputs of its loops. Those shaped like fast
weights are the trajectory, the others activations. The remainder of the peak is temporary.

`estimate_temporary` replaces the compiler where there is none. It runs a liveness analysis of the
jaxpr: an array lives from the equation that produces it to the last one that reads it. Chains of
elementwise operations count as fused, in-place updates as in place. The estimate ignores the mesh
axis `tensor`, which shards some of the arrays further.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from tttjax.planning.count import inner_jaxprs, num_consts_and_carry, size_in_bytes
from tttjax.training.step import TrainState
from tttjax.types import PyTree


@dataclass(frozen=True)
class Memory:
    """Bytes of one device. program: code, and outputs that reuse no argument's buffer.

    source: "compiler", or "estimate".
    """

    parameters: float
    optimizer: float
    batch: float
    trajectory: float
    activations: float
    temporary: float
    program: float
    source: str

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


def make_memory(
    state: TrainState, batch: PyTree, saved: Saved, working: float, program: float, source: str
) -> Memory:
    """working: all memory of the step besides its arguments; includes `saved`."""
    parameters, everything = bytes_per_device(state.params), bytes_per_device(state)
    trajectory = min(saved.trajectory, working)
    activations = min(saved.activations, working - trajectory)
    return Memory(
        parameters=parameters,
        optimizer=everything - parameters,
        batch=bytes_per_device(batch),
        trajectory=trajectory,
        activations=activations,
        temporary=working - trajectory - activations,
        program=program,
        source=source,
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


# --- residuals ----------------------------------------------------------------------------------


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


# --- the peak -----------------------------------------------------------------------------------

# Views, which the compiler does not write to memory.
VIEWS = {"reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim", "iota", "slice"}
REARRANGING = {*VIEWS, "rev", "concatenate", "convert_element_type", "dynamic_slice", "copy"}
LOOPS = {"scan", "while", "cond", "shard_map"}
IN_PLACE = {"dynamic_update_slice", "scatter", "scatter-add", "scan", "while"}
ELEMENTWISE = {
    *("add", "sub", "mul", "div", "neg", "max", "min", "exp", "exp2", "log", "log1p", "tanh"),
    *("logistic", "erf", "sqrt", "rsqrt", "integer_pow", "pow", "abs", "sign", "square", "sin"),
    *("cos", "convert_element_type", "select_n", "eq", "ne", "lt", "le", "gt", "ge", "and", "or"),
    *("not", "is_finite", "stop_gradient", "clamp", "add_any", "rem", "floor", "round", "copy"),
}
REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax"}


def estimate_temporary(jaxpr: Jaxpr) -> float:
    """Peak bytes besides the program's inputs, its outputs included."""
    reads = Counter(v for eqn in jaxpr.eqns for v in set(_inputs_of([eqn])))
    unwritten = _unwritten(jaxpr)
    last = _last_use(jaxpr, unwritten)
    produced = {var for eqn in jaxpr.eqns for var in eqn.outvars}
    live: dict[Any, int] = {}
    live_bytes = peak = 0.0
    last_uses: dict[int, list[Any]] = {}
    for var, index in last.items():
        if var in produced:
            last_uses.setdefault(index, []).append(var)
    for index, eqn in enumerate(jaxpr.eqns):
        outputs = {v: 0 if v in unwritten else size_in_bytes(v) for v in eqn.outvars if v in reads}
        outputs |= {v: size_in_bytes(v) for v in eqn.outvars if v in jaxpr.outvars}
        freed = [var for var in last_uses.get(index, []) if var in live]
        size = sum(outputs.values())
        reused = 0
        if eqn.primitive.name in IN_PLACE:
            reused = min(size, sum(live[v] for v in freed if v in eqn.invars))
        inner_peak = max((estimate_temporary(inner) for inner in inner_jaxprs(eqn)), default=0.0)
        if eqn.primitive.name in LOOPS:
            peak = max(peak, live_bytes - reused + size + inner_peak)
        else:  # the outputs are part of the inner peak
            peak = max(peak, live_bytes - reused + max(inner_peak, size))
        live |= outputs
        live_bytes += size
        for var in dict.fromkeys([*freed, *(v for v in outputs if last.get(v, index) <= index)]):
            live_bytes -= live.pop(var, 0)
    return peak


def _unwritten(jaxpr: Jaxpr) -> set[Any]:
    """Variables that the compiler would not write to memory: views and fused operations."""
    readers: dict[Any, list[str]] = {}
    for eqn in jaxpr.eqns:
        for var in _inputs_of([eqn]):
            readers.setdefault(var, []).append(eqn.primitive.name)
    fusing = ELEMENTWISE | REDUCTIONS | VIEWS
    outputs = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
    unwritten = set()
    for eqn in jaxpr.eqns:
        for var in eqn.outvars:
            if var in outputs:
                continue
            is_view = eqn.primitive.name in VIEWS
            is_fused = eqn.primitive.name in ELEMENTWISE and fusing.issuperset(readers.get(var, []))
            if is_view or is_fused:
                unwritten.add(var)
    return unwritten


def _last_use(jaxpr: Jaxpr, unwritten: set[Any]) -> dict[Any, int]:
    """Index of the last equation that needs each variable; outputs are needed to the end.

    The inputs of an unwritten variable are needed as long as the variable is.
    """
    last = {var: len(jaxpr.eqns) for var in jaxpr.outvars if not isinstance(var, Literal)}
    for index in range(len(jaxpr.eqns) - 1, -1, -1):
        eqn = jaxpr.eqns[index]
        needed = index
        if any(var in unwritten for var in eqn.outvars):
            needed = max((last.get(var, index) for var in eqn.outvars), default=index)
        for var in _inputs_of([eqn]):
            last[var] = max(last.get(var, 0), needed)
    return last
