"""Checks a ConfigDict into the frozen Config, and turns that into plain values."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from tttjax.config.checks import check_config
from tttjax.config.schema import SECTIONS, Config
from tttjax.config.values import check_value, nearest
from tttjax.errors import UserError


def default_config() -> ConfigDict:
    """All defaults as a ConfigDict, locked: values can be changed, fields not added."""
    config = ConfigDict({name: dataclasses.asdict(cls()) for name, cls in SECTIONS.items()})
    return config.lock()


def from_config_dict(config: ConfigDict | Mapping[str, Any]) -> Config:
    """The checked, frozen configuration of a ConfigDict or of nested dicts (read from JSON).

    Absent fields take their defaults; names of earlier versions are read too. Raises UserError for
    an unknown name (with the nearest spelling), a wrong type, a value out of its limits, or fields
    that contradict each other.
    """
    sections = {}
    for name, values in _with_current_names(config).items():
        if name not in SECTIONS:
            raise UserError(
                f"There is no configuration section {name!r}; the sections are "
                f"{', '.join(SECTIONS)}.{nearest(name, SECTIONS)}"
            )
        if not isinstance(values, ConfigDict | Mapping):
            raise UserError(f"{name} = {values!r} must be a section with fields.")
        checked = {key: check_value(f"{name}.{key}", value) for key, value in values.items()}
        sections[name] = SECTIONS[name](**checked)
    result = Config(**sections)
    check_config(result)
    return result


def _with_current_names(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """The sections with current names of fields and values, and without removed ones."""
    sections = dict(config.items())
    train, mesh, model = (sections.get(name) for name in ("train", "mesh", "model"))
    if isinstance(model, ConfigDict | Mapping) and model.get("ttt_form") in ("dual", "primal"):
        # It chose between two ways to compute the same numbers.
        sections["model"] = {k: v for k, v in model.items() if k != "ttt_form"}
    if isinstance(train, ConfigDict | Mapping) and "nonfinite_limit" in train:
        values = dict(train.items())
        limit = values.pop("nonfinite_limit")
        sections["train"] = {"max_skipped_steps": limit, **values}
    if isinstance(mesh, ConfigDict | Mapping) and mesh.get("gather") == "block":
        sections["mesh"] = {**dict(mesh.items()), "gather": "layer"}
    return sections


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Plain nested dicts, ready for JSON (tuples become lists); `from_config_dict` inverts it."""
    return {
        section: {
            key: list(value) if isinstance(value, tuple) else value for key, value in values.items()
        }
        for section, values in dataclasses.asdict(config).items()
    }


def to_flat_dict(config: Config) -> dict[str, Any]:
    """All values by dotted name: `{"model.vocab_size": 32000, ...}`, tuples as lists."""
    return {
        f"{section}.{key}": value
        for section, values in to_dict(config).items()
        for key, value in values.items()
    }
