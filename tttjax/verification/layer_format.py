"""Reading the `layers` family of reference cases: settings by field, parameters by name and shape.

Both readers remember what they were asked for, so that nothing in a case is passed over in silence:
a setting that nothing asked for is listed, a parameter that nothing asked for is refused.
"""

import math
from collections.abc import Mapping
from typing import Any

from tttjax.errors import UserError
from tttjax.types import Array

# Settings that say how the numbers were made and change none of them.
DESCRIPTIVE = frozenset({"batch", "seq_len", "input_scale", "params", "beta_max"})

_REQUIRED = object()


class Fields:
    """The `config` of a case. Reading raises UserError for a field that is missing or unfit."""

    def __init__(self, values: Any):
        if not isinstance(values, Mapping):
            raise UserError(f"config is {values!r}, not an object of settings")
        self.values = values
        self.asked: set[str] = set()

    def _value(self, name: str, default: Any) -> Any:
        self.asked.add(name)
        if name in self.values:
            return self.values[name]
        if default is _REQUIRED:
            raise UserError(f"the config has no field {name!r}")
        return default

    def whole(self, name: str, default: Any = _REQUIRED) -> int:
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
        """(low, high), or nothing where there is no such field."""
        value = self._value(name, None)
        if value is None:
            return ()
        pair = isinstance(value, list) and len(value) == 2 and all(map(is_number, value))
        if not pair or not value[0] <= value[1]:
            raise UserError(f"config.{name} = {value!r} is no pair of a lower and an upper limit")
        return float(value[0]), float(value[1])

    def require(self, name: str, allowed: tuple[Any, ...], default: Any = _REQUIRED) -> None:
        """Refuses any other value than the allowed ones."""
        value = self._value(name, default)
        if value not in allowed:
            choices = " or ".join(map(repr, allowed))
            raise UserError(f"unsupported setting: config.{name} = {value!r}, not {choices}")

    def unknown(self) -> list[str]:
        """The settings that nothing asked for, as `config.field = value`."""
        known = self.asked | DESCRIPTIVE
        return [f"config.{k} = {v!r}" for k, v in self.values.items() if k not in known]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Stored:
    """A case's arrays whose names begin with `prefix` ("in.", "param.", "param.mixer.").

    Calling it with the rest of a name and a shape (None: any size) gives the array; UserError if
    there is none, or of another shape. It works on traced arrays, so that what is made of them can
    be differentiated.
    """

    def __init__(
        self, arrays: Mapping[str, Array], prefix: str = "", asked: set[str] | None = None
    ):
        self.arrays, self.prefix = arrays, prefix
        self.asked: set[str] = set() if asked is None else asked

    def __call__(self, name: str, *shape: int | None) -> Array:
        name = self.prefix + name
        self.asked.add(name)
        if name not in self.arrays:
            raise UserError(f"the case has no array {name}")
        array = self.arrays[name]
        fits = len(shape) == len(array.shape) and all(
            wanted in (None, size) for wanted, size in zip(shape, array.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise UserError(f"{name} has shape {array.shape}; the config asks for ({wanted})")
        return array

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.arrays

    def below(self, prefix: str) -> "Stored":
        """The arrays under a further prefix such as `mixer.`."""
        return Stored(self.arrays, self.prefix + prefix, self.asked)
