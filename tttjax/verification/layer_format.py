"""Access to the settings and arrays of reference cases of the `layers` family.

Both classes record what was requested, so that no part of a case is ignored silently: settings that
are never requested are listed, parameters that are never requested are an error.
"""

import math
from collections.abc import Mapping
from typing import Any

from tttjax.errors import UserError
from tttjax.types import Array

# Settings that describe how the numbers were made and do not affect them.
DESCRIPTIVE = frozenset({"batch", "seq_len", "input_scale", "params", "beta_max"})

_REQUIRED = object()


class CaseFields:
    """The `config` of a case. Raises UserError for a missing or invalid field."""

    def __init__(self, values: Any):
        if not isinstance(values, Mapping):
            raise UserError(f"config is {values!r}, not an object of settings")
        self.values = values
        self.requested: set[str] = set()

    def _value(self, name: str, default: Any) -> Any:
        self.requested.add(name)
        if name in self.values:
            return self.values[name]
        if default is _REQUIRED:
            raise UserError(f"the config has no field {name!r}")
        return default

    def positive_int(self, name: str, default: Any = _REQUIRED) -> int:
        """A positive whole number."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"config.{name} = {value!r} is no positive whole number")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """A finite number."""
        value = self._value(name, default)
        if not is_number(value) or not math.isfinite(value):
            raise UserError(f"config.{name} = {value!r} is no finite number")
        return float(value)

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise UserError(f"config.{name} = {value!r} is neither true nor false")
        return value

    def limits(self, name: str) -> tuple[float, ...]:
        """(low, high); empty if the field is absent."""
        value = self._value(name, None)
        if value is None:
            return ()
        pair = isinstance(value, list) and len(value) == 2 and all(map(is_number, value))
        if not pair or not value[0] <= value[1]:
            raise UserError(f"config.{name} = {value!r} is no pair of a lower and an upper limit")
        return float(value[0]), float(value[1])

    def require(self, name: str, allowed: tuple[Any, ...], default: Any = _REQUIRED) -> None:
        """Raises UserError for any value that is not allowed."""
        value = self._value(name, default)
        if value not in allowed:
            choices = " or ".join(map(repr, allowed))
            raise UserError(f"unsupported setting: config.{name} = {value!r}, not {choices}")

    def unknown(self) -> list[str]:
        """The settings that were never requested, as `config.field = value`."""
        known = self.requested | DESCRIPTIVE
        return [f"config.{k} = {v!r}" for k, v in self.values.items() if k not in known]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class CaseArrays:
    """A case's arrays whose names begin with `prefix` ("in.", "param.", "param.mixer.").

    Called with the name after the prefix and a shape (None: any size), it returns the array. Raises
    UserError for a missing array or another shape. Arrays may be traced, so that results can be
    differentiated.
    """

    def __init__(
        self, arrays: Mapping[str, Array], prefix: str = "", requested: set[str] | None = None
    ):
        self.arrays, self.prefix = arrays, prefix
        self.requested: set[str] = set() if requested is None else requested

    def __call__(self, name: str, *shape: int | None) -> Array:
        name = self.prefix + name
        self.requested.add(name)
        if name not in self.arrays:
            raise UserError(f"the case has no array {name}")
        array = self.arrays[name]
        fits = len(shape) == len(array.shape) and all(
            expected in (None, size) for expected, size in zip(shape, array.shape, strict=True)
        )
        if not fits:
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise UserError(f"{name} has shape {array.shape}; the config requires ({expected})")
        return array

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.arrays

    def scoped(self, prefix: str) -> "CaseArrays":
        """The arrays with a further prefix such as `mixer.`."""
        return CaseArrays(self.arrays, self.prefix + prefix, self.requested)
