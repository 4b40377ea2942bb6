"""Declaration of configuration fields: documentation, limits, and how a change is treated."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any


@dataclass(frozen=True)
class FieldInfo:
    """Metadata of a field, besides its name, type and default.

    doc: its meaning. choices: the allowed strings (of each entry, for a tuple). joined: whether
    several of them may be joined by `+`. minimum, maximum, above, below: numeric limits (inclusive,
    inclusive, exclusive, exclusive) of the value or of each entry; integers have a maximum even
    where none is given, INT_MAX. mutable_on_resume: whether a resumed run may use another value
    than the first run of its work directory. path: a path of this machine; `~` is expanded, and
    runs record the absolute path. omit_default_in_hash: for fields added after runs existed; the
    default is what those runs did (`fingerprint_values`). first_name: the name that a renamed field
    had at first, in its top-level section; files with it are read, and fingerprints use it.
    """

    doc: str
    choices: tuple[str, ...] = ()
    joined: bool = False
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    mutable_on_resume: bool = False
    path: bool = False
    omit_default_in_hash: bool = False
    first_name: str = ""


def declare(default: Any, doc: str, **limits: Any) -> Any:
    """A field of a section, with its FieldInfo."""
    return dataclasses.field(default=default, metadata={"info": FieldInfo(doc, **limits)})


def field_info(field: dataclasses.Field) -> FieldInfo:
    """The FieldInfo of a field of a section."""
    return field.metadata["info"]


def fields_of(section: type) -> dict[str, dataclasses.Field]:
    """Every field of a section by its name, those of nested sections as `mamba2.expand`."""
    result: dict[str, dataclasses.Field] = {}
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(field.type):
            inner: Any = field.type
            result |= {f"{field.name}.{name}": f for name, f in fields_of(inner).items()}
        else:
            result[field.name] = field
    return result


def get_value(section: object, name: str) -> Any:
    """The value of a dotted name."""
    return reduce(getattr, name.split("."), section)


def fingerprint_values(section: object) -> Iterator[tuple[str, str, Any]]:
    """(name, name in fingerprints, value) of the fields that decide the numbers of a run.

    A field that was added later counts only if it differs from its default, so that fingerprints
    of older runs stay valid.
    """
    for name, field in fields_of(type(section)).items():
        info, value = field_info(field), get_value(section, name)
        if not info.mutable_on_resume and not (
            info.omit_default_in_hash and value == field.default
        ):
            yield name, info.first_name or name, value
