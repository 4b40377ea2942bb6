"""Recipes: the published ones, and configurations from any experiment file.

For example,

    >>> from tttjax import recipes
    >>> config = recipes.get("quickstart:ttt_e2e", {"train.batch_size": 4})
    >>> config.train.batch_size, config.inner.chunk_size
    (4, 32)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tttjax.config import Config, default_config, from_config_dict
from tttjax.config.files import (
    load_config_dict,
    matching_specs,
    recipe_names,
    set_values,
    use_code,
)

__all__ = ["get", "names", "use_code"]


def get(recipe: str | Path | Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Config:
    """The checked configuration of a recipe.

    Arguments:
      recipe: "paper:125m,ttt_e2e,pretrain" or "quickstart:ttt_e2e"; an experiment file with
        `get_config(arg)`, "my.py:arg"; or changes to the defaults.
      changes: values by dotted name, {"train.steps": 20}, or by section, {"train": {"steps": 20}}.

    Raises UserError for an unknown recipe or field, and for values that do not fit.
    """
    if isinstance(recipe, Mapping):
        config = default_config()
        set_values(config, recipe)
    else:
        config = load_config_dict(str(recipe))
    set_values(config, changes or {})
    return from_config_dict(config)


def names() -> list[str]:
    """Every published recipe, as `get` takes it: "quickstart:ttt_e2e", ..."""
    return [spec for name in recipe_names() for spec in matching_specs(f"{name}:*")]
