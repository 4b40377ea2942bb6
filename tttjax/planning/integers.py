"""Integers of a jaxpr that follow from its constants: counters, positions, bounds of loops.

Loops over tiles of attention run to bounds computed from a chunk's position, which is known before
anything is run. `evaluate` works such scalars out, and the small index arrays that loops go over.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

LARGEST = 4096  # entries of an array that is worked out
Known = Mapping[Any, np.ndarray]


def array_of(atom: Any) -> Any:
    """Shape and dtype of a variable or literal that is an array."""
    return atom.aval


def known_value(atom: Any, known: Known) -> np.ndarray | None:
    """The integers that a variable or literal holds, if they are known."""
    if isinstance(atom, Literal):
        return _integers(np.asarray(atom.val)) if array_of(atom).dtype.kind in "iub" else None
    return known.get(atom)


def constants(program: ClosedJaxpr) -> dict[Any, np.ndarray]:
    """Those among a program's constants."""
    found = {}
    for var, value in zip(program.jaxpr.constvars, program.consts, strict=True):
        if var.aval.size <= LARGEST and getattr(var.aval.dtype, "kind", "f") in "iub":
            found[var] = np.asarray(value)
    return found


def _integers(array: np.ndarray) -> np.ndarray | None:
    return array if array.dtype.kind in "iub" and array.size <= LARGEST else None


def evaluate(eqn: JaxprEqn, known: Known) -> dict[Any, np.ndarray]:
    """The results of an equation whose inputs are known integers; else nothing."""
    if chooses_by_platform(eqn):
        # Differentiation divides such a choice in two, and hands integers from one to the other.
        default = eqn.params["branches"][-1]
        found = results(default, [known_value(atom, known) for atom in eqn.invars[1:]])
        return {v: x for v, x in zip(eqn.outvars, found, strict=True) if x is not None}
    rule = OPERATIONS.get(eqn.primitive.name)
    is_call = eqn.primitive.name in ("jit", "pjit")
    if (rule is None and not is_call) or not _is_small(eqn):
        return {}
    inputs = [known_value(atom, known) for atom in eqn.invars]
    if any(value is None for value in inputs):
        return {}
    if is_call:
        found = results(eqn.params["jaxpr"], inputs)
        return {v: x for v, x in zip(eqn.outvars, found, strict=True) if x is not None}
    assert rule is not None
    result = rule(eqn.params, *inputs)
    out = eqn.outvars[0]
    return {} if result is None else {out: np.asarray(result, array_of(out).dtype)}


def chooses_by_platform(eqn: JaxprEqn) -> bool:
    """Whether it is `jax.lax.platform_dependent`, which is decided when a program is lowered."""
    return eqn.params.get("branches_platforms") is not None


def _is_small(eqn: JaxprEqn) -> bool:
    return all(
        getattr(getattr(array_of(var), "dtype", None), "kind", "f") in "iub"
        and array_of(var).size <= LARGEST
        for var in eqn.outvars
    )


def results(program: ClosedJaxpr, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray | None]:
    """Those of a program's results that its known inputs decide; None for the others."""
    jaxpr: Jaxpr = program.jaxpr
    known = constants(program)
    known |= {v: x for v, x in zip(jaxpr.invars, inputs, strict=True) if x is not None}
    for eqn in _scalar_equations(jaxpr):
        known |= evaluate(eqn, known)
    return [known_value(atom, known) for atom in jaxpr.outvars]


def _scalar_equations(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """Those that may be worked out; kept, since bodies of loops are asked for often."""
    key = id(jaxpr)
    if key not in _SCALAR:
        _SCALAR[key] = (jaxpr, [eqn for eqn in jaxpr.eqns if _may_be_known(eqn)])
    return _SCALAR[key][1]


_SCALAR: dict[int, tuple[Jaxpr, list[JaxprEqn]]] = {}


def _may_be_known(eqn: JaxprEqn) -> bool:
    if chooses_by_platform(eqn):
        return True
    return eqn.primitive.name in (*OPERATIONS, "jit", "pjit") and _is_small(eqn)


def _divide(params: Mapping[str, Any], x: np.ndarray, y: np.ndarray) -> np.ndarray | None:
    """Towards zero, as XLA does."""
    if np.any(y == 0):
        return None
    return np.sign(x) * np.sign(y) * (np.abs(x) // np.abs(y))


def _remainder(params: Mapping[str, Any], x: np.ndarray, y: np.ndarray) -> np.ndarray | None:
    quotient = _divide(params, x, y)
    return None if quotient is None else x - y * quotient


def _clamp(params: Mapping[str, Any], low: Any, x: Any, high: Any) -> np.ndarray:
    return np.minimum(np.maximum(x, low), high)


def _broadcast(params: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    shape = [1] * len(params["shape"])
    for place, size in zip(params["broadcast_dimensions"], x.shape, strict=True):
        shape[place] = size
    return np.broadcast_to(x.reshape(shape), params["shape"])


def _iota(params: Mapping[str, Any]) -> np.ndarray:
    shape = [1] * len(params["shape"])
    shape[params["dimension"]] = -1
    numbers = np.arange(params["shape"][params["dimension"]]).reshape(shape)
    return np.broadcast_to(numbers, params["shape"])


def _slice(params: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    strides = params["strides"] or (1,) * x.ndim
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return x[tuple(slice(*bound) for bound in bounds)]


def _plain(function: Callable) -> Callable:
    return lambda params, *inputs: function(*inputs)


_NUMPY: dict[str, Callable] = {
    **{"add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative},
    **{"max": np.maximum, "min": np.minimum, "sign": np.sign, "abs": np.abs},
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal},
    **{"gt": np.greater, "ge": np.greater_equal},
    **{"and": np.bitwise_and, "or": np.bitwise_or, "not": np.invert},
    "select_n": lambda which, *cases: np.choose(which.astype(int), cases),
    "convert_element_type": lambda x: x,
    "copy": lambda x: x,
}
OPERATIONS: dict[str, Callable[..., Any]] = {
    **{name: _plain(function) for name, function in _NUMPY.items()},
    "div": _divide,
    "rem": _remainder,
    "clamp": _clamp,
    "iota": _iota,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "squeeze": lambda params, x: np.squeeze(x, params["dimensions"]),
    "reshape": lambda params, x: np.reshape(x, params["new_sizes"]),
    "rev": lambda params, x: np.flip(x, params["dimensions"]),
}
