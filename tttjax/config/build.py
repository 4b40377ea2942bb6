"""Checks a ConfigDict into the frozen Config, and turns that into plain values."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

from tttjax.config.checks import check_config
from tttjax.config.fields import get_value
from tttjax.config.schema import SECTIONS, Config, all_fields, first_names
from tttjax.config.values import check_value, nearest
from tttjax.errors import UserError

if TYPE_CHECKING:  # slow to import, and not needed for `tttjax COMMAND --help`
    from ml_collections import ConfigDict


def default_config() -> "ConfigDict":
    """All defaults as a ConfigDict, locked: values can be changed, fields not added."""
    from ml_collections import ConfigDict

    config = ConfigDict({name: dataclasses.asdict(cls()) for name, cls in SECTIONS.items()})
    return config.lock()


def from_config_dict(config: "ConfigDict | Mapping[str, Any]") -> Config:
    """The checked, frozen configuration of a ConfigDict or of nested dicts (read from JSON).

    Absent fields take their defaults; names of earlier versions are read too. Raises UserError for
    an unknown name (with the nearest spelling), a wrong type, a value out of its limits, or fields
    that contradict each other.
    """
    values: dict[str, Any] = {}
    for name, section in _with_current_values(config).items():
        if name not in SECTIONS:
            raise UserError(
                f"There is no configuration section {name!r}; the sections are "
                f"{', '.join(SECTIONS)}.{nearest(name, SECTIONS)}"
            )
        if not _is_section(section):
            raise UserError(f"{name} = {section!r} must be a section with fields.")
        for key, value in _flat(section, f"{name}."):
            current = first_names().get(key, key)
            if current in values and values[current] != value:
                raise UserError(f"{current} is given twice, once by its earlier name; set it once.")
            values[current] = value
    values = {name: check_value(name, value) for name, value in values.items()}
    result = replace_values(Config(), values)
    if "custom" not in (result.inner.rule, result.inner.loss):  # of a file that is not used
        result = replace_values(result, {"inner.code": ""})
    check_config(result)
    return result


def replace_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The configuration with other values by dotted name, which are not checked."""
    return _replaced(config, unflatten(values))


def _replaced(section: Any, values: Mapping[str, Any]) -> Any:
    changes = {
        name: _replaced(getattr(section, name), value) if isinstance(value, dict) else value
        for name, value in values.items()
    }
    return dataclasses.replace(section, **changes)


def _is_section(value: Any) -> "TypeGuard[ConfigDict | Mapping[str, Any]]":
    """Whether a value of a ConfigDict or of nested dicts has values of its own."""
    from ml_collections import ConfigDict

    return isinstance(value, ConfigDict | Mapping)


def _flat(section: "ConfigDict | Mapping[str, Any]", prefix: str) -> Iterator[tuple[str, Any]]:
    """The values of a section and those nested in it, by dotted name."""
    for key, value in section.items():
        if _is_section(value):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _with_current_values(config: "ConfigDict | Mapping[str, Any]") -> dict[str, Any]:
    """The sections without a removed field, and with a value's current name."""
    sections: dict[str, Any] = dict(config.items())
    mesh, model, inner = (sections.get(name) for name in ("mesh", "model", "inner"))
    if _is_section(model) and model.get("ttt_form") in ("dual", "primal"):
        # It chose between two ways to compute the same numbers.
        sections["model"] = {k: v for k, v in model.items() if k != "ttt_form"}
    if _is_section(inner) and inner.get("trajectory") == "store":
        # It stored what "rewind" computes.
        sections["inner"] = {**dict(inner.items()), "trajectory": "rewind"}
    if _is_section(mesh) and mesh.get("gather") == "block":
        sections["mesh"] = {**dict(mesh.items()), "gather": "layer"}
    return sections


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Plain nested dicts, ready for JSON (tuples become lists); `from_config_dict` inverts it."""
    return unflatten(to_flat_dict(config))


def to_flat_dict(config: Config) -> dict[str, Any]:
    """All values by dotted name: `{"model.vocab_size": 32000, ...}`, tuples as lists."""
    values = {name: get_value(config, name) for name in all_fields()}
    return {n: list(value) if isinstance(value, tuple) else value for n, value in values.items()}


def unflatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of values by dotted name."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        *sections, key = name.split(".")
        inner = result
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = value
    return result
