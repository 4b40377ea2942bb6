"""Single values: their types and limits, and how they are written on the command line."""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any, get_args, get_origin

from tttjax.config.fields import field_info
from tttjax.config.limits import FLOAT_WORDS, INT_MAX, INT_WORDS, fits_float, read_number
from tttjax.config.schema import all_fields, first_names
from tttjax.errors import UserError
from tttjax.io.paths import storage_text

_WORDS = {int: INT_WORDS, float: FLOAT_WORDS, bool: "true or false", str: "a string"}
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def nearest(name: str, names: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest of `names`, or an empty string."""
    names = list(names)
    leaf = name.rpartition(".")[2]
    elsewhere = [n for n in names if "." in n and n.rpartition(".")[2] == leaf]
    close = elsewhere or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def find_field(name: str) -> dataclasses.Field:
    """The field of a dotted name; UserError with the nearest spelling if there is none."""
    fields = all_fields()
    if name in first_names():
        raise UserError(f"{name} is now {first_names()[name]}.")
    if any(field.startswith(f"{name}.") for field in fields):
        raise UserError(f"{name} is a section; set its fields, such as {_first_of(name)}.")
    if name not in fields:
        raise UserError(f"There is no configuration field {name!r}.{nearest(name, fields)}")
    return fields[name]


def _first_of(section: str) -> str:
    return next(name for name in all_fields() if name.startswith(f"{section}."))


def check_value(name: str, value: Any) -> Any:
    """`value` as the type of field `name`, within its limits; UserError otherwise.

    Integers are taken for numbers, lists for tuples, and `~` in paths for the home folder; nothing
    else is converted.
    """
    field = find_field(name)
    if get_origin(field.type) is not tuple:
        value = _scalar(name, value, field.type)
        _check_limits(name, value, field)
        return _expanded(name, value, field)
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise UserError(f"{name} = {value!r} must be a list of values, such as {_example(field)}.")
    kind = get_args(field.type)[0]
    values = tuple(_scalar(name, entry, kind) for entry in value)
    for entry in values:
        _check_limits(name, entry, field)
    return tuple(_expanded(name, entry, field) for entry in values)


def parse_value(name: str, text: str) -> Any:
    """The value of field `name` written as `text` on the command line, checked.

    Lists are written `a,b`, `(a, b)` or `[a, b]`; booleans true or false; numbers in decimal
    notation, `100`, `1_000`, `1e-3`.
    """
    field = find_field(name)
    if get_origin(field.type) is not tuple:
        return check_value(name, _parse_scalar(text, field.type))
    kind = get_args(field.type)[0]
    inside = text.strip()
    if inside[:1] + inside[-1:] in ("()", "[]"):
        inside = inside[1:-1]
    entries = [entry.strip() for entry in inside.split(",")]
    return check_value(name, [_parse_scalar(entry, kind) for entry in entries if entry])


def _parse_scalar(text: str, kind: Any) -> Any:
    """`text` as `kind` if it reads as one; else the text itself, for check_value to refuse."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    if kind is bool:
        return _BOOLEANS.get(text.lower(), text)
    if kind is str:
        return text
    number = read_number(text)
    return text if number is None else number


def _scalar(name: str, value: Any, kind: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and is_number and fits_float(value):
        return float(value)
    if type(value) is kind and kind is not float:
        return value
    actual = "" if kind is float and is_number else f", not {type(value).__name__}"
    raise UserError(f"{name} = {value!r} must be {_WORDS[kind]}{actual}.")


def _expanded(name: str, value: Any, field: dataclasses.Field) -> Any:
    return storage_text(value, name) if field_info(field).path and value else value


def _check_limits(name: str, value: Any, field: dataclasses.Field) -> None:
    info = field_info(field)
    words = str(value).split("+") if info.joined else [value]
    wrong = next((word for word in words if info.choices and word not in info.choices), None)
    if wrong is not None:
        subject = f"{name} = {value!r}" if wrong == value else f"{name} = {value!r}: {wrong!r}"
        several = ", or several joined by +" if info.joined else ""
        raise UserError(
            f"{subject} is not one of {', '.join(info.choices)}{several}."
            f"{nearest(str(wrong), info.choices)}"
        )
    if info.minimum is not None and value < info.minimum:
        raise UserError(f"{name} = {value!r} must be at least {info.minimum}.")
    maximum = INT_MAX if info.maximum is None and type(value) is int else info.maximum
    if maximum is not None and value > maximum:
        raise UserError(f"{name} = {value!r} must be at most {maximum}.")
    if info.above is not None and value <= info.above:
        raise UserError(f"{name} = {value!r} must be greater than {info.above}.")
    if info.below is not None and value >= info.below:
        raise UserError(f"{name} = {value!r} must be less than {info.below}.")


def _example(field: dataclasses.Field) -> str:
    kind = get_args(field.type)[0]
    return {int: "(1, 2)", float: "(0.5, 0.5)", str: '("a", "b")'}[kind]
