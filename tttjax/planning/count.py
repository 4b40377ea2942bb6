"""FLOPs and collectives of a traced program, counted from its jaxpr with loop trip counts.

`compiled.cost_analysis()` counts a loop body once; here a scan counts its body times its length.
Only matrix products and convolutions are counted (2 FLOPs per multiply-add), as in
`tttjax.planning.flops`. The excess over that formula is recomputation, masked-out blocks and
second-order terms that were not saved.

Integers that follow from the program alone (positions, bounds of loops over tiles) are
constant-folded, so a `while` counts its trip count and a conditional the branch it takes. Where
they depend on data, a conditional counts as its most expensive branch, and a `while` counts once
and is reported in `unknown_loops`; the counts are then lower bounds.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from tttjax.planning.constant_folding import (
    KnownValues,
    aval_of,
    constants,
    fold_eqn,
    fold_jaxpr,
    is_platform_dependent,
    known_value,
)

MAX_TRIP_COUNT = 100_000  # of a `while` that is unrolled


@dataclass(frozen=True)
class Transfer:
    """Collectives of one kind and size. bytes: the larger of operands and results on one device.

    group_size: devices in a replica group. times: per step.
    """

    kind: str
    bytes: float
    group_size: int
    times: float = 1.0


@dataclass(frozen=True)
class Count:
    """Counts of a program over all devices; transfers are those of one device.

    flops: of matrix products and convolutions. product_bytes: of their operands and results.
    unknown_loops: loops of unknown trip count, counted once.
    """

    flops: float = 0.0
    product_bytes: float = 0.0
    unknown_loops: int = 0
    transfers: tuple[Transfer, ...] = ()

    def __add__(self, other: "Count") -> "Count":
        return Count(
            self.flops + other.flops,
            self.product_bytes + other.product_bytes,
            self.unknown_loops + other.unknown_loops,
            self.transfers + other.transfers,
        )

    def times(self, trip_count: float) -> "Count":
        """The count of a loop with this body."""
        return Count(
            self.flops * trip_count,
            self.product_bytes * trip_count,
            self.unknown_loops,
            tuple(replace(t, times=t.times * trip_count) for t in self.transfers),
        )

    def on_devices(self, devices: int) -> "Count":
        """The count of this program run by each of `devices` devices."""
        return replace(self, flops=self.flops * devices, product_bytes=self.product_bytes * devices)


def count(program: ClosedJaxpr) -> Count:
    """Counts `program`, such as `jax.make_jaxpr(f)(x)` or `jitted.trace(x).jaxpr`."""
    return _Counter().count_closed(program, {}, [None] * len(program.jaxpr.invars))


def inner_programs(eqn: JaxprEqn) -> Iterator[ClosedJaxpr | Jaxpr]:
    """The jaxprs in an equation's parameters.

    Of `platform_dependent` only the default branch: the other branches call library kernels whose
    products are not visible.
    """
    if is_platform_dependent(eqn):
        yield eqn.params["branches"][-1]
        return
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr | Jaxpr):
                yield item


def inner_jaxprs(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """`inner_programs` without their constants."""
    for program in inner_programs(eqn):
        yield program.jaxpr if isinstance(program, ClosedJaxpr) else program


def num_consts_and_carry(eqn: JaxprEqn) -> tuple[int, int]:
    """(num_consts, num_carry) of a scan: its unstacked inputs.

    Derived from the shapes, since the parameter names differ between JAX versions.
    """
    (body,) = inner_jaxprs(eqn)

    def stacked(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        pairs = zip(outside, inside, strict=True)
        return sum(a.aval.ndim > b.aval.ndim for a, b in pairs if hasattr(a.aval, "ndim"))

    carries = len(eqn.outvars) - stacked(eqn.outvars, body.outvars)
    return len(eqn.invars) - carries - stacked(eqn.invars, body.invars), carries


def size_in_bytes(var: Any) -> int:
    """Of a variable or literal of a jaxpr; 0 if it is not an array (tokens, keys)."""
    shape, dtype = getattr(var.aval, "shape", None), getattr(var.aval, "dtype", None)
    if shape is None or dtype is None:
        return 0
    return math.prod(shape) * getattr(dtype, "itemsize", 0)


def manual_axis_sizes(eqn: JaxprEqn) -> dict[str, int]:
    """Sizes of the mesh axes that a shard_map equation makes manual."""
    shape = dict(eqn.params["mesh"].shape)
    name = "newly_manual_axes" if "newly_manual_axes" in eqn.params else "manual_axes"
    return {axis: size for axis, size in shape.items() if axis in eqn.params[name]}


Axes = Mapping[str, int]  # sizes of the manual mesh axes
Inputs = Sequence[np.ndarray | None]  # a program's known integer inputs


class _Counter:
    """Counts nested jaxprs, caching by jaxpr and known inputs."""

    def __init__(self) -> None:
        self._counts: dict[Any, Count] = {}
        self._has_loops: dict[int, bool] = {}

    def count_closed(self, program: ClosedJaxpr, axes: Axes, inputs: Inputs) -> Count:
        return self.count_jaxpr(program.jaxpr, axes, inputs, constants(program))

    def count_jaxpr(
        self, jaxpr: Jaxpr, axes: Axes, inputs: Inputs, consts: KnownValues | None = None
    ) -> Count:
        """inputs: one per input variable; only `while` and conditionals depend on them."""
        if not self.has_loops(jaxpr):
            inputs = [None] * len(jaxpr.invars)
        values = tuple(None if x is None else (x.shape, x.tobytes()) for x in inputs)
        key = id(jaxpr), tuple(axes.items()), values
        if key not in self._counts:
            known = dict(consts or {})
            pairs = zip(jaxpr.invars, inputs, strict=True)
            known |= {var: value for var, value in pairs if value is not None}
            total = Count()
            for eqn in jaxpr.eqns:
                known |= fold_eqn(eqn, known)
                rule = LOOPS.get(eqn.primitive.name)
                if rule is not None:
                    total += rule(self, eqn, axes, known)
                elif eqn.primitive.name in RULES:
                    total += RULES[eqn.primitive.name](eqn, axes)
                else:
                    total += self.count_inner(eqn, axes, known)
            self._counts[key] = total
        return self._counts[key]

    def has_loops(self, jaxpr: Jaxpr) -> bool:
        """Whether a `while` or conditional is nested in it."""
        if id(jaxpr) not in self._has_loops:
            self._has_loops[id(jaxpr)] = any(
                (eqn.primitive.name in ("while", "cond") and not is_platform_dependent(eqn))
                or any(map(self.has_loops, inner_jaxprs(eqn)))
                for eqn in jaxpr.eqns
            )
        return self._has_loops[id(jaxpr)]

    def count_inner(self, eqn: JaxprEqn, axes: Axes, known: KnownValues) -> Count:
        """jit, remat, custom derivatives and the like: their body, once."""
        values = [known_value(atom, known) for atom in eqn.invars]
        total = Count()
        for program in inner_programs(eqn):
            jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
            inputs = values if len(values) == len(jaxpr.invars) else [None] * len(jaxpr.invars)
            if isinstance(program, ClosedJaxpr):
                total += self.count_closed(program, axes, inputs)
            else:
                total += self.count_jaxpr(jaxpr, axes, inputs)
        return total

    def shard_map(self, eqn: JaxprEqn, axes: Axes, known: KnownValues) -> Count:
        manual, jaxpr = manual_axis_sizes(eqn), eqn.params["jaxpr"]
        values = [known_value(atom, known) for atom in eqn.invars]
        scalars = [v if v is not None and v.ndim == 0 else None for v in values]
        devices = math.prod(manual.values())
        return self.count_jaxpr(jaxpr, {**axes, **manual}, scalars).on_devices(devices)

    def scan(self, eqn: JaxprEqn, axes: Axes, known: KnownValues) -> Count:
        """Length times body, or step by step where the body has loops or conditionals."""
        length, body = eqn.params["length"], eqn.params["jaxpr"]
        values = [known_value(atom, known) for atom in eqn.invars]
        consts, carries = num_consts_and_carry(eqn)
        if not self.has_loops(body.jaxpr):
            return self.count_closed(body, axes, [None] * len(values)).times(length)
        fixed, carry = values[:consts], values[consts : consts + carries]
        xs = values[consts + carries :]
        total = Count()
        for index in range(length)[:: -1 if eqn.params["reverse"] else 1]:
            inputs = [*fixed, *carry, *(None if x is None else x[index] for x in xs)]
            total += self.count_closed(body, axes, inputs)
            carry = fold_jaxpr(body, inputs)[:carries]
        return total

    def cond(self, eqn: JaxprEqn, axes: Axes, known: KnownValues) -> Count:
        branch_index, *values = (known_value(atom, known) for atom in eqn.invars)
        branches = eqn.params["branches"]
        if is_platform_dependent(eqn):
            branches = list(inner_programs(eqn))
        elif branch_index is not None:
            branches = branches[min(int(branch_index), len(branches) - 1) :][:1]
        counts = [self.count_closed(branch, axes, values) for branch in branches]
        return max(counts, key=lambda count: (count.flops, count.product_bytes))

    def while_(self, eqn: JaxprEqn, axes: Axes, known: KnownValues) -> Count:
        values = [known_value(atom, known) for atom in eqn.invars]
        cond_consts, body_consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        condition, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        cond_fixed, body_fixed = values[:cond_consts], values[cond_consts:][:body_consts]
        initial = carry = values[cond_consts + body_consts :]
        total = Count()
        for _ in range(MAX_TRIP_COUNT):
            (is_true,) = fold_jaxpr(condition, [*cond_fixed, *carry])
            if is_true is None:
                break
            if not is_true:
                return total
            total += self.count_closed(body, axes, [*body_fixed, *carry])
            carry = fold_jaxpr(body, [*body_fixed, *carry])
        once = self.count_closed(body, axes, [*body_fixed, *initial])
        return replace(once, unknown_loops=once.unknown_loops + 1)


# --- rules by primitive --------------------------------------------------------------------------


def _product(eqn: JaxprEqn, flops: float) -> Count:
    return Count(flops, sum(size_in_bytes(var) for var in (*eqn.invars, *eqn.outvars)))


def _dot_general(eqn: JaxprEqn, axes: Axes) -> Count:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = aval_of(eqn.invars[0]).shape
    depth = math.prod(left[i] for i in contracted)
    return _product(eqn, 2.0 * depth * math.prod(aval_of(eqn.outvars[0]).shape))


def _convolution(eqn: JaxprEqn, axes: Axes) -> Count:
    """Each output sums over the kernel's taps and the input features of its feature group."""
    kernel = aval_of(eqn.invars[1]).shape
    out_dimension = eqn.params["dimension_numbers"].rhs_spec[0]
    depth = math.prod(kernel) // kernel[out_dimension]
    return _product(eqn, 2.0 * depth * math.prod(aval_of(eqn.outvars[0]).shape))


def _triangular_solve(eqn: JaxprEqn, axes: Axes) -> Count:
    matrix, right = (aval_of(var).shape for var in eqn.invars)
    return _product(eqn, float(matrix[-1] * math.prod(right)))


def _pallas_call(eqn: JaxprEqn, axes: Axes) -> Count:
    """Its `cost_estimate` if it has one, otherwise the kernel times its grid cells."""
    estimate = eqn.params.get("cost_estimate")
    if estimate is not None:
        return _product(eqn, float(estimate.flops))
    cells = math.prod(size for size in eqn.params["grid_mapping"].grid if isinstance(size, int))
    return _Counter().count_inner(eqn, axes, {}).times(cells)


def _collective(kind: str) -> Callable[[JaxprEqn, Axes], Count]:
    def rule(eqn: JaxprEqn, axes: Axes) -> Count:
        names = eqn.params["axes"] if "axes" in eqn.params else eqn.params["axis_name"]
        names = names if isinstance(names, tuple | list) else (names,)
        group_size = math.prod(axes.get(name, 1) for name in names)
        if group_size == 1:
            return Count()
        size = max(sum(map(size_in_bytes, atoms)) for atoms in (eqn.invars, eqn.outvars))
        return Count(transfers=(Transfer(kind, size, group_size),))

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
LOOPS: dict[str, Callable[[_Counter, JaxprEqn, Axes, KnownValues], Count]] = {
    "scan": _Counter.scan,
    "while": _Counter.while_,
    "cond": _Counter.cond,
    "shard_map": _Counter.shard_map,
}
