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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from tttjax.planning.constant_folding import (
    KnownValues,
    constants,
    fold_eqn,
    fold_jaxpr,
    is_platform_dependent,
    known_value,
)
from tttjax.planning.primitives import FLASH_ATTENTION, RULES, Axes, Count, product

MAX_TRIP_COUNT = 100_000  # of a `while` that is unrolled


def count(program: ClosedJaxpr, platform: str = "") -> Count:
    """Counts `program`, such as `jax.make_jaxpr(f)(x)` or `jitted.trace(x).jaxpr`.

    platform: the one that it is lowered to, "cuda", "tpu" or "cpu": attention by cuDNN is counted
    as that kernel. On other platforms, and without one, library kernels count as XLA's form.
    """
    return _Counter(platform).count_closed(program, {}, [None] * len(program.jaxpr.invars))


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


def _has_flash_attention(jaxpr: Jaxpr) -> bool:
    return any(
        eqn.primitive.name in FLASH_ATTENTION or any(map(_has_flash_attention, inner_jaxprs(eqn)))
        for eqn in jaxpr.eqns
    )


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


def manual_axis_sizes(eqn: JaxprEqn) -> dict[str, int]:
    """Sizes of the mesh axes that a shard_map equation makes manual."""
    shape = dict(eqn.params["mesh"].shape)
    name = "newly_manual_axes" if "newly_manual_axes" in eqn.params else "manual_axes"
    return {axis: size for axis, size in shape.items() if axis in eqn.params[name]}


Inputs = Sequence[np.ndarray | None]  # a program's known integer inputs


class _Counter:
    """Counts nested jaxprs, caching by jaxpr and known inputs."""

    def __init__(self, platform: str) -> None:
        self.platform = platform
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
        for program in self.inner_programs(eqn):
            jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
            inputs = values if len(values) == len(jaxpr.invars) else [None] * len(jaxpr.invars)
            if isinstance(program, ClosedJaxpr):
                total += self.count_closed(program, axes, inputs)
            else:
                total += self.count_jaxpr(jaxpr, axes, inputs)
        return total

    def inner_programs(self, eqn: JaxprEqn) -> list[ClosedJaxpr | Jaxpr]:
        """As the function of this name, but of `platform_dependent` the branch of the platform, if
        it is attention by cuDNN."""
        if is_platform_dependent(eqn):
            choices = zip(eqn.params["branches_platforms"], eqn.params["branches"], strict=True)
            for platforms, branch in choices:
                if self.platform in (platforms or ()) and _has_flash_attention(branch.jaxpr):
                    return [branch]
        return list(inner_programs(eqn))

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
            branches = self.inner_programs(eqn)
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

    def pallas_call(self, eqn: JaxprEqn, axes: Axes, known: KnownValues) -> Count:
        """Its `cost_estimate` if it has one, otherwise the kernel times its grid cells."""
        estimate = eqn.params.get("cost_estimate")
        if estimate is not None:
            return product(eqn, float(estimate.flops))
        grid = (size for size in eqn.params["grid_mapping"].grid if isinstance(size, int))
        return self.count_inner(eqn, axes, {}).times(math.prod(grid))


LOOPS: dict[str, Callable[[_Counter, JaxprEqn, Axes, KnownValues], Count]] = {
    "pallas_call": _Counter.pallas_call,
    "scan": _Counter.scan,
    "while": _Counter.while_,
    "cond": _Counter.cond,
    "shard_map": _Counter.shard_map,
}
