"""How a configuration field is declared: what is known of it beside name, type and default."""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FieldInfo:
    """What is known of a field beside its name, type and default.

    doc: its meaning. choices: the allowed strings (of each entry, for a tuple). joined: whether
    several of them may be joined by `+`. minimum, above, below: numeric limits (inclusive,
    exclusive, exclusive) of the value or of each entry. may_change: whether a resumed run may use
    another value than the work directory's first run.
    """

    doc: str
    choices: tuple[str, ...] = ()
    joined: bool = False
    minimum: float | None = None
    above: float | None = None
    below: float | None = None
    may_change: bool = False


def declare(default: Any, doc: str, **limits: Any) -> Any:
    """A field of a section, with its FieldInfo."""
    return dataclasses.field(default=default, metadata={"info": FieldInfo(doc, **limits)})


def field_info(field: dataclasses.Field) -> FieldInfo:
    """The FieldInfo of a field of a section."""
    return field.metadata["info"]
