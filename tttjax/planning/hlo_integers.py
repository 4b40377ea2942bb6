"""The integers of a compiled program: counters, positions, bounds of loops.

`evaluate` computes small integer arrays and tuples of them, as `constant_folding` does for jaxprs.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tttjax.planning.hlo import Instruction

MAX_ENTRIES = 4096  # size of the largest array that is computed
Value = Any  # an integer array, a tuple of values, or None: unknown

_DTYPES = {"pred": np.dtype(np.bool_)} | {
    f"{sign}{bits}": np.dtype(f"{name}{bits}")
    for sign, name in (("s", "int"), ("u", "uint"))
    for bits in (8, 16, 32, 64)
}


def is_small(instruction: Instruction) -> bool:
    """Whether a result has integers that may be worth computing."""
    return any(
        kind in _DTYPES and math.prod(shape) <= MAX_ENTRIES for kind, _, shape in instruction.arrays
    )


def evaluate(instruction: Instruction, inputs: Sequence[Value]) -> Value:
    """The result of an operation on integers; None if it has another kind of result or inputs that
    are not known."""
    rule = OPERATIONS.get(instruction.opcode)
    if rule is None or not is_small(instruction):
        return None
    if instruction.opcode in ("tuple", "get-tuple-element"):
        return rule(instruction, *inputs)
    if any(value is None or isinstance(value, tuple) for value in inputs):
        return None
    ((kind, _, shape),) = instruction.arrays
    with np.errstate(over="ignore"):  # integers wrap around
        result = rule(instruction, *inputs)
    return None if result is None else np.asarray(result).astype(_DTYPES[kind]).reshape(shape)


def _tuple(instruction: Instruction, *inputs: Value) -> Value:
    return None if all(value is None for value in inputs) else inputs


def _element(instruction: Instruction, value: Value) -> Value:
    return value[int(instruction.attribute(r"index=(\d+)"))] if isinstance(value, tuple) else None


def _constant(instruction: Instruction) -> Value:
    """Large constants are not in the text."""
    words = re.findall(r"-?\d+|true|false", instruction.rest.partition(")")[0])
    values = np.array([int(w == "true") if w in ("true", "false") else int(w) for w in words])
    ((_, _, shape),) = instruction.arrays
    return values if values.size == math.prod(shape) else None


def _iota(instruction: Instruction) -> Value:
    ((_, _, shape),) = instruction.arrays
    axis = int(instruction.attribute(r"iota_dimension=(\d+)"))
    return np.broadcast_to(np.expand_dims(np.arange(shape[axis]), _others(axis, shape)), shape)


def _others(axis: int, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(i for i in range(len(shape)) if i != axis)


def _broadcast(instruction: Instruction, x: np.ndarray) -> Value:
    ((_, _, shape),) = instruction.arrays
    axes = [int(n) for n in instruction.attribute(r"dimensions=\{([\d,]*)\}").split(",") if n]
    expanded = [1] * len(shape)
    for axis, size in zip(axes, x.shape, strict=True):
        expanded[axis] = size
    return np.broadcast_to(x.reshape(expanded), shape)


def _slice(instruction: Instruction, x: np.ndarray) -> Value:
    bounds = re.findall(r"\[(\d+):(\d+)(?::(\d+))?\]", instruction.rest)
    return x[tuple(slice(int(a), int(b), int(step or 1)) for a, b, step in bounds)]


def _window(x: np.ndarray, shape: Sequence[int], starts: Sequence[Any]) -> tuple[slice, ...]:
    """Where a dynamic slice of `shape` is, moved inside as XLA does."""
    bounds = zip(starts, x.shape, shape, strict=True)
    firsts = [min(max(int(start), 0), size - length) for start, size, length in bounds]
    return tuple(slice(i, i + length) for i, length in zip(firsts, shape, strict=True))


def _dynamic_slice(instruction: Instruction, x: np.ndarray, *starts: Value) -> Value:
    ((_, _, shape),) = instruction.arrays
    return x[_window(x, shape, starts)]


def _dynamic_update(
    instruction: Instruction, x: np.ndarray, update: np.ndarray, *starts: Value
) -> Value:
    result = x.copy()
    result[_window(x, update.shape, starts)] = update
    return result


def _divide(instruction: Instruction, x: np.ndarray, y: np.ndarray) -> Value:
    """Rounds towards zero, as XLA does."""
    if np.any(y == 0):
        return None
    return np.sign(x) * np.sign(y) * (np.abs(x) // np.abs(y))


def _remainder(instruction: Instruction, x: np.ndarray, y: np.ndarray) -> Value:
    quotient = _divide(instruction, x, y)
    return None if quotient is None else x - y * quotient


def _shift_right_logical(instruction: Instruction, x: np.ndarray, n: np.ndarray) -> Value:
    unsigned = x.dtype.str.replace("i", "u")
    return (x.astype(unsigned) >> n.astype(unsigned)).astype(x.dtype)


def _compare(instruction: Instruction, x: np.ndarray, y: np.ndarray) -> Value:
    return _COMPARISONS[instruction.attribute(r"direction=(\w+)")](x, y)


def _plain(function: Callable) -> Callable:
    return lambda instruction, *inputs: function(*inputs)


_COMPARISONS = {
    **{"EQ": np.equal, "NE": np.not_equal, "LT": np.less, "LE": np.less_equal},
    **{"GT": np.greater, "GE": np.greater_equal},
}
_NUMPY: dict[str, Callable] = {
    **{"add": np.add, "subtract": np.subtract, "multiply": np.multiply, "negate": np.negative},
    **{"maximum": np.maximum, "minimum": np.minimum, "sign": np.sign, "abs": np.abs},
    **{"and": np.bitwise_and, "or": np.bitwise_or, "not": np.invert, "xor": np.bitwise_xor},
    **{"shift-right-arithmetic": np.right_shift, "shift-left": np.left_shift},
    "select": np.where,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    **dict.fromkeys(("convert", "copy", "bitcast", "reshape"), lambda x: x),
}
OPERATIONS: dict[str, Callable[..., Value]] = {
    **{name: _plain(function) for name, function in _NUMPY.items()},
    "tuple": _tuple,
    "get-tuple-element": _element,
    "constant": _constant,
    "iota": _iota,
    "broadcast": _broadcast,
    "slice": _slice,
    "dynamic-slice": _dynamic_slice,
    "dynamic-update-slice": _dynamic_update,
    "divide": _divide,
    "remainder": _remainder,
    "shift-right-logical": _shift_right_logical,
    "compare": _compare,
}
