"""Bytes on one device by kind: exact ones from shapes and shardings, the rest from the program.

What the forward pass keeps for the backward pass are the stacked results of its loops. They are
found in the jaxpr: those shaped like fast weights are the trajectory, the others activations.
Everything else that the program holds at its peak is temporary.

`estimate_temporary` stands in for the compiler where there is none: it walks the program in order,
keeps every array from the equation that makes it to the last one that reads it, and adds up. Chains
of elementwise operations are taken as fused, updates in place as in place. It knows nothing of the
axis `tensor`, which divides some of the arrays further.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from tttjax.planning.count import inner_jaxprs, scan_parts, size_in_bytes
from tttjax.training.step import TrainState
from tttjax.types import PyTree


@dataclass(frozen=True)
class Memory:
    """Bytes of one device. program: its code, and results that reuse no argument's place.

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
        """What lives only during a step."""
        return self.trajectory + self.activations + self.temporary


@dataclass(frozen=True)
class Saved:
    """Bytes that one device keeps from the forward to the backward pass."""

    trajectory: float = 0.0
    activations: float = 0.0


def bytes_per_device(tree: PyTree) -> float:
    """Of the largest share of abstract arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def make_memory(
    state: TrainState, batch: PyTree, saved: Saved, working: float, program: float, source: str
) -> Memory:
    """working: all that the step holds beside its arguments, of which `saved` is a part."""
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
    """The part that one device runs on its own sequences: inside shard_map, else everything."""

    def find(jaxpr: Jaxpr) -> Jaxpr | None:
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "shard_map":
                return eqn.params["jaxpr"]
            if eqn.primitive.name in ("jit", "pjit"):
                found = [find(inner) for inner in inner_jaxprs(eqn)]
                if any(found):
                    return next(filter(None, found))
        return None

    return find(program.jaxpr) or program.jaxpr


# --- what is kept for the backward pass ---------------------------------------------------------


def saved_bytes(jaxpr: Jaxpr, fast: PyTree) -> Saved:
    """Stacked results of the outermost loops that keep any, where a later loop reads them.

    fast: the fast weights, whose shapes tell the trajectory from activations.
    """
    shapes = _shapes_of_weights(fast)
    readers = _read_by_loops(jaxpr)
    trajectory = activations = 0.0
    for eqn in jaxpr.eqns:
        stacked = _stacked(eqn) if eqn.primitive.name == "scan" else []
        kept = [var for var in stacked if var in readers and _is_float(var)]
        if not kept:
            for inner in inner_jaxprs(eqn):
                found = saved_bytes(inner, fast)
                trajectory += found.trajectory
                activations += found.activations
        for var in kept:
            if _ends_like(var.aval.shape[1:], shapes):
                trajectory += size_in_bytes(var)
            else:
                activations += size_in_bytes(var)
    return Saved(trajectory, activations)


def _stacked(eqn: JaxprEqn) -> list[Any]:
    return list(eqn.outvars[scan_parts(eqn)[1] :])


def _read_by_loops(jaxpr: Jaxpr) -> set[Any]:
    """Variables that a loop (or any program inside) reads, as they are or rearranged."""
    found: set[Any] = set()
    for eqn in reversed(jaxpr.eqns):
        rearranges = eqn.primitive.name in REARRANGING and not found.isdisjoint(eqn.outvars)
        if rearranges or any(True for _ in inner_jaxprs(eqn)):
            found |= _inputs_of([eqn])
    return found


def _inputs_of(eqns: Iterable[JaxprEqn]) -> set[Any]:
    return {var for eqn in eqns for var in eqn.invars if not isinstance(var, Literal)}


def _is_float(var: Any) -> bool:
    return var.aval.ndim > 1 and jax.dtypes.issubdtype(var.aval.dtype, np.floating)


def _shapes_of_weights(fast: PyTree) -> set[tuple[int, ...]]:
    """Of the arrays and, where these stack several blocks, of one block's weights."""
    whole = {tuple(leaf.shape) for leaf in jax.tree.leaves(fast)}
    return whole | {shape[1:] for shape in whole if len(shape) > 2}


def _ends_like(shape: tuple[int, ...], shapes: set[tuple[int, ...]]) -> bool:
    """Whether a shape is one of `shapes` with any dimensions (batch, blocks) in front."""
    return any(shape[-len(known) :] == known for known in shapes)


# --- the peak -----------------------------------------------------------------------------------

# Their results are taken as never written: views, and what is fused into the operation after it.
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
    """Bytes at the peak beside the program's inputs, its results included."""
    reads = Counter(v for eqn in jaxpr.eqns for v in set(_inputs_of([eqn])))
    unwritten = _unwritten(jaxpr)
    last = _last_use(jaxpr, unwritten)
    mine = {var for eqn in jaxpr.eqns for var in eqn.outvars}
    live: dict[Any, int] = {}
    now = peak = 0.0
    dying: dict[int, list[Any]] = {}
    for var, place in last.items():
        if var in mine:
            dying.setdefault(place, []).append(var)
    for place, eqn in enumerate(jaxpr.eqns):
        made = {v: 0 if v in unwritten else size_in_bytes(v) for v in eqn.outvars if v in reads}
        made |= {v: size_in_bytes(v) for v in eqn.outvars if v in jaxpr.outvars}
        ends = [var for var in dying.get(place, []) if var in live]
        written = sum(made.values())
        old = sum(live[v] for v in ends if v in eqn.invars) if eqn.primitive.name in IN_PLACE else 0
        inside = max((estimate_temporary(inner) for inner in inner_jaxprs(eqn)), default=0.0)
        if eqn.primitive.name in LOOPS:
            peak = max(peak, now - min(old, written) + written + inside)
        else:  # what is inside makes the results itself
            peak = max(peak, now - min(old, written) + max(inside, written))
        live |= made
        now += written
        for var in dict.fromkeys([*ends, *(v for v in made if last.get(v, place) <= place)]):
            now -= live.pop(var, 0)
    return peak


def _unwritten(jaxpr: Jaxpr) -> set[Any]:
    """Results that the compiler would not write to memory."""
    readers: dict[Any, list[str]] = {}
    for eqn in jaxpr.eqns:
        for var in _inputs_of([eqn]):
            readers.setdefault(var, []).append(eqn.primitive.name)
    fusing = ELEMENTWISE | REDUCTIONS | VIEWS
    results = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
    found = set()
    for eqn in jaxpr.eqns:
        for var in eqn.outvars:
            if var in results:
                continue
            is_view = eqn.primitive.name in VIEWS
            is_fused = eqn.primitive.name in ELEMENTWISE and fusing.issuperset(readers.get(var, []))
            if is_view or is_fused:
                found.add(var)
    return found


def _last_use(jaxpr: Jaxpr, unwritten: set[Any]) -> dict[Any, int]:
    """The place of the last equation that needs a variable; results are needed to the end.

    What an unwritten result is computed from is needed for as long as that is.
    """
    last = {var: len(jaxpr.eqns) for var in jaxpr.outvars if not isinstance(var, Literal)}
    for place in range(len(jaxpr.eqns) - 1, -1, -1):
        eqn = jaxpr.eqns[place]
        needed = place
        if any(var in unwritten for var in eqn.outvars):
            needed = max((last.get(var, place) for var in eqn.outvars), default=place)
        for var in _inputs_of([eqn]):
            last[var] = max(last.get(var, 0), needed)
    return last
