"""What a traced program does, counted from its jaxpr with the lengths of its loops.

`compiled.cost_analysis()` counts the body of a loop once; here a scan counts its length times. Only
matrix products and convolutions are counted (2 FLOPs per multiply-add), as in `tttjax.flops`, so
that the two can be compared: what the program does beyond the formula is recomputation, masked-out
blocks and second-order terms that were not saved.

A conditional counts as its most expensive branch. A `while` whose number of rounds is not written
in the program counts once and is reported in `open_loops`: the numbers are then lower limits.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal


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
    return _jaxpr(program.jaxpr, {})


def inner_jaxprs(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """The programs inside an equation, whatever it is."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


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


def _jaxpr(jaxpr: Jaxpr, axes: Axes) -> Count:
    total = Count()
    for eqn in jaxpr.eqns:
        total += RULES.get(eqn.primitive.name, _inside)(eqn, axes)
    return total


def _inside(eqn: JaxprEqn, axes: Axes) -> Count:
    """pjit, remat, custom derivatives and the like: what is in them, once."""
    return sum((_jaxpr(jaxpr, axes) for jaxpr in inner_jaxprs(eqn)), Count())


def _shard_map(eqn: JaxprEqn, axes: Axes) -> Count:
    own = mesh_of(eqn)
    return _jaxpr(eqn.params["jaxpr"], {**axes, **own}).on(math.prod(own.values()))


def _scan(eqn: JaxprEqn, axes: Axes) -> Count:
    return _inside(eqn, axes).times(eqn.params["length"])


def _cond(eqn: JaxprEqn, axes: Axes) -> Count:
    branches = [_jaxpr(branch.jaxpr, axes) for branch in eqn.params["branches"]]
    return max(branches, key=lambda found: (found.flops, found.product_bytes))


def _while(eqn: JaxprEqn, axes: Axes) -> Count:
    body = _jaxpr(eqn.params["body_jaxpr"].jaxpr, axes)
    rounds = _rounds(eqn)
    if rounds is None:
        return replace(body, open_loops=body.open_loops + 1)
    return body.times(rounds)


def _rounds(eqn: JaxprEqn) -> int | None:
    """Of a `while i < n: i += 1` with i's start and n written in the program."""
    condition, body = eqn.params["cond_jaxpr"].jaxpr, eqn.params["body_jaxpr"].jaxpr
    if len(condition.eqns) != 1 or condition.eqns[0].primitive.name != "lt":
        return None
    counter, limit = condition.eqns[0].invars
    consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    if isinstance(counter, Literal) or counter not in condition.invars:
        return None
    place = condition.invars.index(counter) - consts[0]
    start = eqn.invars[sum(consts) + place]
    if not isinstance(limit, Literal):
        position = condition.invars.index(limit)
        limit = eqn.invars[position if position < consts[0] else position + consts[1]]
        if position >= consts[0] and not _unchanged(body, consts[1], position - consts[0]):
            return None
    if not isinstance(start, Literal) or not isinstance(limit, Literal):
        return None
    if not _counts_up(body, consts[1] + place, place):
        return None
    return max(0, int(limit.val) - int(start.val))


def _unchanged(body: Jaxpr, consts: int, place: int) -> bool:
    return body.outvars[place] is body.invars[consts + place]


def _counts_up(body: Jaxpr, source: int, place: int) -> bool:
    made_by = {var: eqn for eqn in body.eqns for var in eqn.outvars}
    step = made_by.get(body.outvars[place])  # type: ignore[call-overload]
    if step is None or step.primitive.name != "add" or step.invars[0] is not body.invars[source]:
        return False
    one = step.invars[1]
    return isinstance(one, Literal) and one.val == 1


# --- what is counted ----------------------------------------------------------------------------


def _product(eqn: JaxprEqn, flops: float) -> Count:
    return Count(flops, sum(size_in_bytes(var) for var in (*eqn.invars, *eqn.outvars)))


def _dot_general(eqn: JaxprEqn, axes: Axes) -> Count:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    depth = math.prod(left[i] for i in contracted)
    return _product(eqn, 2.0 * depth * math.prod(eqn.outvars[0].aval.shape))


def _convolution(eqn: JaxprEqn, axes: Axes) -> Count:
    """Each output is a sum over the kernel's taps and input features of its group."""
    kernel, out_features = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec[0]
    depth = math.prod(kernel) // kernel[out_features]
    return _product(eqn, 2.0 * depth * math.prod(eqn.outvars[0].aval.shape))


def _triangular_solve(eqn: JaxprEqn, axes: Axes) -> Count:
    matrix, right = (var.aval.shape for var in eqn.invars)
    return _product(eqn, float(matrix[-1] * math.prod(right)))


def _pallas_call(eqn: JaxprEqn, axes: Axes) -> Count:
    """The kernel for every cell of its grid, or what its author says."""
    said = eqn.params.get("cost_estimate")
    if said is not None:
        return _product(eqn, float(said.flops))
    cells = math.prod(size for size in eqn.params["grid_mapping"].grid if isinstance(size, int))
    return _inside(eqn, axes).times(cells)


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
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
    **dict.fromkeys(("psum", "psum_invariant"), _collective("all-reduce")),
    "all_gather": _collective("all-gather"),
    "reduce_scatter": _collective("reduce-scatter"),
    "all_to_all": _collective("all-to-all"),
    "ppermute": _collective("collective-permute"),
}
