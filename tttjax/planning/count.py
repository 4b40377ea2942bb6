"""What a traced program does, counted from its jaxpr with the lengths of its loops.

`compiled.cost_analysis()` counts the body of a loop once; here a scan counts its length times. Only
matrix products and convolutions are counted (2 FLOPs per multiply-add), as in
`tttjax.planning.flops`, so
that the two can be compared: what the program does beyond the formula is recomputation, masked-out
blocks and second-order terms that were not saved.

Integers that follow from the program alone (positions, bounds of loops over tiles) are worked out,
so that a `while` counts the rounds it will run and a conditional the branch it will take. Where
they depend on data, a conditional counts as its most expensive branch, and a `while` counts once
and is reported in `open_loops`: the numbers are then lower limits.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from tttjax.planning.integers import (
    Known,
    array_of,
    chooses_by_platform,
    constants,
    evaluate,
    known_value,
    results,
)

MOST_ROUNDS = 100_000  # of a `while` that are followed


@dataclass(frozen=True)
class Transfer:
    """Collectives of one kind: bytes is the larger of what one device gives and gets each time.

    group: devices that take part in one. times: per step.
    """

    kind: str
    bytes: float
    group: int
    times: float = 1.0


@dataclass(frozen=True)
class Count:
    """Of a whole program over all devices; transfers are those of one device.

    flops: of matrix products and convolutions. product_bytes: of their operands and results.
    open_loops: loops of unknown length, counted once.
    """

    flops: float = 0.0
    product_bytes: float = 0.0
    open_loops: int = 0
    transfers: tuple[Transfer, ...] = ()

    def __add__(self, other: "Count") -> "Count":
        return Count(
            self.flops + other.flops,
            self.product_bytes + other.product_bytes,
            self.open_loops + other.open_loops,
            self.transfers + other.transfers,
        )

    def times(self, rounds: float) -> "Count":
        """A loop of so many rounds."""
        repeated = tuple(replace(t, times=t.times * rounds) for t in self.transfers)
        return Count(self.flops * rounds, self.product_bytes * rounds, self.open_loops, repeated)

    def on(self, devices: int) -> "Count":
        """The same program on so many devices at once."""
        return replace(self, flops=self.flops * devices, product_bytes=self.product_bytes * devices)


def count(program: ClosedJaxpr) -> Count:
    """Everything in `program`, such as `jax.make_jaxpr(f)(x)` or `jitted.trace(x).jaxpr`."""
    return _Counter().closed(program, {}, [None] * len(program.jaxpr.invars))


def inner_programs(eqn: JaxprEqn) -> Iterator[ClosedJaxpr | Jaxpr]:
    """The programs inside an equation, whatever it is.

    Of a choice by platform the last: what all platforms can run, products and all, where others
    have kernels of a library that say nothing of what is in them.
    """
    if chooses_by_platform(eqn):
        yield eqn.params["branches"][-1]
        return
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr | Jaxpr):
                yield item


def inner_jaxprs(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """The same without their constants."""
    for program in inner_programs(eqn):
        yield program.jaxpr if isinstance(program, ClosedJaxpr) else program


def scan_parts(eqn: JaxprEqn) -> tuple[int, int]:
    """(constants, carries) of a scan: what its body meets whole.

    Read off the shapes, since JAX has said it in different ways.
    """
    (body,) = inner_jaxprs(eqn)

    def stacked(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        pairs = zip(outside, inside, strict=True)
        return sum(a.aval.ndim > b.aval.ndim for a, b in pairs if hasattr(a.aval, "ndim"))

    carries = len(eqn.outvars) - stacked(eqn.outvars, body.outvars)
    return len(eqn.invars) - carries - stacked(eqn.invars, body.invars), carries


def size_in_bytes(var: Any) -> int:
    """Of a variable or literal of a jaxpr; 0 for what is not an array (tokens, keys)."""
    shape, dtype = getattr(var.aval, "shape", None), getattr(var.aval, "dtype", None)
    if shape is None or dtype is None:
        return 0
    return math.prod(shape) * getattr(dtype, "itemsize", 0)


def mesh_of(eqn: JaxprEqn) -> dict[str, int]:
    """Sizes of the mesh axes that a shard_map equation handles."""
    shape = dict(eqn.params["mesh"].shape)
    name = "newly_manual_axes" if "newly_manual_axes" in eqn.params else "manual_axes"
    return {axis: size for axis, size in shape.items() if axis in eqn.params[name]}


Axes = Mapping[str, int]  # sizes of the mesh axes that the code around handles by hand
Inputs = Sequence[np.ndarray | None]  # the integers among a program's inputs that are known


class _Counter:
    """Counts programs inside programs, each once for the same known inputs."""

    def __init__(self) -> None:
        self.counted: dict[Any, Count] = {}
        self.loops: dict[int, bool] = {}

    def closed(self, program: ClosedJaxpr, axes: Axes, inputs: Inputs) -> Count:
        return self.jaxpr(program.jaxpr, axes, inputs, constants(program))

    def jaxpr(self, jaxpr: Jaxpr, axes: Axes, inputs: Inputs, consts: Known | None = None) -> Count:
        """inputs: one for each of its variables. What is known matters to open loops only."""
        if not self.has_loops(jaxpr):
            inputs = [None] * len(jaxpr.invars)
        values = tuple(None if x is None else (x.shape, x.tobytes()) for x in inputs)
        key = id(jaxpr), tuple(axes.items()), values
        if key not in self.counted:
            known = dict(consts or {})
            pairs = zip(jaxpr.invars, inputs, strict=True)
            known |= {var: value for var, value in pairs if value is not None}
            total = Count()
            for eqn in jaxpr.eqns:
                known |= evaluate(eqn, known)
                rule = LOOPS.get(eqn.primitive.name)
                if rule is not None:
                    total += rule(self, eqn, axes, known)
                elif eqn.primitive.name in RULES:
                    total += RULES[eqn.primitive.name](eqn, axes)
                else:
                    total += self.inside(eqn, axes, known)
            self.counted[key] = total
        return self.counted[key]

    def has_loops(self, jaxpr: Jaxpr) -> bool:
        """Whether a `while` or conditional is in it, however deep."""
        if id(jaxpr) not in self.loops:
            self.loops[id(jaxpr)] = any(
                (eqn.primitive.name in ("while", "cond") and not chooses_by_platform(eqn))
                or any(map(self.has_loops, inner_jaxprs(eqn)))
                for eqn in jaxpr.eqns
            )
        return self.loops[id(jaxpr)]

    def inside(self, eqn: JaxprEqn, axes: Axes, known: Known) -> Count:
        """jit, remat, custom derivatives and the like: what is in them, once."""
        values = [known_value(atom, known) for atom in eqn.invars]
        total = Count()
        for program in inner_programs(eqn):
            jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
            inputs = values if len(values) == len(jaxpr.invars) else [None] * len(jaxpr.invars)
            if isinstance(program, ClosedJaxpr):
                total += self.closed(program, axes, inputs)
            else:
                total += self.jaxpr(jaxpr, axes, inputs)
        return total

    def shard_map(self, eqn: JaxprEqn, axes: Axes, known: Known) -> Count:
        own, jaxpr = mesh_of(eqn), eqn.params["jaxpr"]
        values = [known_value(atom, known) for atom in eqn.invars]
        scalars = [v if v is not None and v.ndim == 0 else None for v in values]
        return self.jaxpr(jaxpr, {**axes, **own}, scalars).on(math.prod(own.values()))

    def scan(self, eqn: JaxprEqn, axes: Axes, known: Known) -> Count:
        """Its length times its body, or round by round where that may differ."""
        length, body = eqn.params["length"], eqn.params["jaxpr"]
        values = [known_value(atom, known) for atom in eqn.invars]
        consts, carries = scan_parts(eqn)
        if not self.has_loops(body.jaxpr):
            return self.closed(body, axes, [None] * len(values)).times(length)
        fixed, carry, rows = (
            *(values[:consts], values[consts : consts + carries]),
            values[consts + carries :],
        )
        total = Count()
        for place in range(length)[:: -1 if eqn.params["reverse"] else 1]:
            inputs = [*fixed, *carry, *(None if x is None else x[place] for x in rows)]
            total += self.closed(body, axes, inputs)
            carry = results(body, inputs)[:carries]
        return total

    def cond(self, eqn: JaxprEqn, axes: Axes, known: Known) -> Count:
        which, *values = (known_value(atom, known) for atom in eqn.invars)
        branches = eqn.params["branches"]
        if chooses_by_platform(eqn):
            branches = list(inner_programs(eqn))
        elif which is not None:
            branches = branches[min(int(which), len(branches) - 1) :][:1]
        found = [self.closed(branch, axes, values) for branch in branches]
        return max(found, key=lambda count: (count.flops, count.product_bytes))

    def while_(self, eqn: JaxprEqn, axes: Axes, known: Known) -> Count:
        values = [known_value(atom, known) for atom in eqn.invars]
        first, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        condition, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        of_condition, fixed = values[:first], values[first : first + consts]
        carry = values[first + consts :]
        total = Count()
        for _ in range(MOST_ROUNDS):
            (goes_on,) = results(condition, [*of_condition, *carry])
            if goes_on is None:
                break
            if not goes_on:
                return total
            total += self.closed(body, axes, [*fixed, *carry])
            carry = results(body, [*fixed, *carry])
        once = self.closed(body, axes, [*fixed, *values[first + consts :]])
        return replace(once, open_loops=once.open_loops + 1)


# --- what is counted ----------------------------------------------------------------------------


def _product(eqn: JaxprEqn, flops: float) -> Count:
    return Count(flops, sum(size_in_bytes(var) for var in (*eqn.invars, *eqn.outvars)))


def _dot_general(eqn: JaxprEqn, axes: Axes) -> Count:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = array_of(eqn.invars[0]).shape
    depth = math.prod(left[i] for i in contracted)
    return _product(eqn, 2.0 * depth * math.prod(array_of(eqn.outvars[0]).shape))


def _convolution(eqn: JaxprEqn, axes: Axes) -> Count:
    """Each output is a sum over the kernel's taps and input features of its group."""
    kernel, out_features = (
        array_of(eqn.invars[1]).shape,
        eqn.params["dimension_numbers"].rhs_spec[0],
    )
    depth = math.prod(kernel) // kernel[out_features]
    return _product(eqn, 2.0 * depth * math.prod(array_of(eqn.outvars[0]).shape))


def _triangular_solve(eqn: JaxprEqn, axes: Axes) -> Count:
    matrix, right = (array_of(var).shape for var in eqn.invars)
    return _product(eqn, float(matrix[-1] * math.prod(right)))


def _pallas_call(eqn: JaxprEqn, axes: Axes) -> Count:
    """The kernel for every cell of its grid, or what its author says."""
    said = eqn.params.get("cost_estimate")
    if said is not None:
        return _product(eqn, float(said.flops))
    cells = math.prod(size for size in eqn.params["grid_mapping"].grid if isinstance(size, int))
    return _Counter().inside(eqn, axes, {}).times(cells)


def _collective(kind: str) -> Callable[[JaxprEqn, Axes], Count]:
    def rule(eqn: JaxprEqn, axes: Axes) -> Count:
        names = eqn.params["axes"] if "axes" in eqn.params else eqn.params["axis_name"]
        names = names if isinstance(names, tuple | list) else (names,)
        group = math.prod(axes.get(name, 1) for name in names)
        given, got = (sum(map(size_in_bytes, v)) for v in (eqn.invars, eqn.outvars))
        return Count(transfers=(Transfer(kind, max(given, got), group),) if group > 1 else ())

    return rule


RULES: dict[str, Callable[[JaxprEqn, Axes], Count]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "triangular_solve": _triangular_solve,
    "pallas_call": _pallas_call,
    **dict.fromkeys(("psum", "psum_invariant"), _collective("all-reduce")),
    "all_gather": _collective("all-gather"),
    "reduce_scatter": _collective("reduce-scatter"),
    "all_to_all": _collective("all-to-all"),
    "ppermute": _collective("collective-permute"),
}
LOOPS: dict[str, Callable[[_Counter, JaxprEqn, Axes, Known], Count]] = {
    "scan": _Counter.scan,
    "while": _Counter.while_,
    "cond": _Counter.cond,
    "shard_map": _Counter.shard_map,
}
