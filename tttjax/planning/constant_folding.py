"""Constant folding of the integers of a jaxpr: counters, positions, loop bounds.

Loops over tiles of attention have bounds computed from a chunk's position, which is a constant of
the program. `fold_eqn` evaluates such scalars and the small index arrays that loops run over.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

MAX_ENTRIES = 4096  # size of the largest array that is folded
KnownValues = Mapping[Any, np.ndarray]


def aval_of(atom: Any) -> Any:
    """Shape and dtype of a variable or literal that is an array."""
    return atom.aval


def known_value(atom: Any, known: KnownValues) -> np.ndarray | None:
    """The integers that a variable or literal holds; None if unknown."""
    if isinstance(atom, Literal):
        return _integers(np.asarray(atom.val)) if aval_of(atom).dtype.kind in "iub" else None
    return known.get(atom)


def constants(program: ClosedJaxpr) -> dict[Any, np.ndarray]:
    """The small integer constants of a program."""
    values = {}
    for var, value in zip(program.jaxpr.constvars, program.consts, strict=True):
        if var.aval.size <= MAX_ENTRIES and getattr(var.aval.dtype, "kind", "f") in "iub":
            values[var] = np.asarray(value)
    return values


def _integers(array: np.ndarray) -> np.ndarray | None:
    return array if array.dtype.kind in "iub" and array.size <= MAX_ENTRIES else None


def fold_eqn(eqn: JaxprEqn, known: KnownValues) -> dict[Any, np.ndarray]:
    """The outputs of an equation whose inputs are known integers; otherwise empty."""
    if is_platform_dependent(eqn):
        # Differentiation splits such a choice in two and passes integers from one to the other.
        default = eqn.params["branches"][-1]
        outputs = fold_jaxpr(default, [known_value(atom, known) for atom in eqn.invars[1:]])
        return {v: x for v, x in zip(eqn.outvars, outputs, strict=True) if x is not None}
    rule = OPERATIONS.get(eqn.primitive.name)
    is_call = eqn.primitive.name in ("jit", "pjit")
    if (rule is None and not is_call) or not _is_small(eqn):
        return {}
    inputs = [known_value(atom, known) for atom in eqn.invars]
    if any(value is None for value in inputs):
        return {}
    if is_call:
        outputs = fold_jaxpr(eqn.params["jaxpr"], inputs)
        return {v: x for v, x in zip(eqn.outvars, outputs, strict=True) if x is not None}
    assert rule is not None
    result = rule(eqn.params, *inputs)
    out = eqn.outvars[0]
    return {} if result is None else {out: np.asarray(result, aval_of(out).dtype)}


def is_platform_dependent(eqn: JaxprEqn) -> bool:
    """Whether it is a `jax.lax.platform_dependent`, which lowering resolves."""
    return eqn.params.get("branches_platforms") is not None


def _is_small(eqn: JaxprEqn) -> bool:
    return all(
        getattr(getattr(aval_of(var), "dtype", None), "kind", "f") in "iub"
        and aval_of(var).size <= MAX_ENTRIES
        for var in eqn.outvars
    )


def fold_jaxpr(
    program: ClosedJaxpr, inputs: Sequence[np.ndarray | None]
) -> list[np.ndarray | None]:
    """A program's outputs that its known inputs determine; None for the others."""
    jaxpr: Jaxpr = program.jaxpr
    known = constants(program)
    known |= {v: x for v, x in zip(jaxpr.invars, inputs, strict=True) if x is not None}
    for eqn in _foldable_eqns(jaxpr):
        known |= fold_eqn(eqn, known)
    return [known_value(atom, known) for atom in jaxpr.outvars]


def _foldable_eqns(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """The equations that can be folded; cached, since loop bodies are folded many times."""
    key = id(jaxpr)
    if key not in _FOLDABLE_EQNS:
        _FOLDABLE_EQNS[key] = (jaxpr, [eqn for eqn in jaxpr.eqns if _is_foldable(eqn)])
    return _FOLDABLE_EQNS[key][1]


_FOLDABLE_EQNS: dict[int, tuple[Jaxpr, list[JaxprEqn]]] = {}


def _is_foldable(eqn: JaxprEqn) -> bool:
    if is_platform_dependent(eqn):
        return True
    return eqn.primitive.name in (*OPERATIONS, "jit", "pjit") and _is_small(eqn)


def _divide(params: Mapping[str, Any], x: np.ndarray, y: np.ndarray) -> np.ndarray | None:
    """Rounds towards zero, as XLA does."""
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
    for index, size in zip(params["broadcast_dimensions"], x.shape, strict=True):
        shape[index] = size
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
