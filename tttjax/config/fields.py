"""Declaration of configuration fields: documentation, limits, and how a change is treated."""

import dataclasses
from dataclasses import dataclass
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
    default is what those runs did (`unset_additions`).
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


def declare(default: Any, doc: str, **limits: Any) -> Any:
    """A field of a section, with its FieldInfo."""
    return dataclasses.field(default=default, metadata={"info": FieldInfo(doc, **limits)})


def field_info(field: dataclasses.Field) -> FieldInfo:
    """The FieldInfo of a field of a section."""
    return field.metadata["info"]


def unset_additions(section: Any) -> set[str]:
    """Names of a section's fields that were added later and hold their defaults.

    Fingerprints omit them, so that those of older runs stay valid.
    """
    return {
        field.name
        for field in dataclasses.fields(section)
        if field_info(field).omit_default_in_hash and getattr(section, field.name) == field.default
    }
