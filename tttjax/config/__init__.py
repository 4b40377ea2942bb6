"""Configuration: an editable ConfigDict from the user, checked once into frozen dataclasses.

An experiment file returns `default_config()` with its own values; `load_config` runs it, applies
the command line's overrides and checks everything once. Importing this package never imports JAX.
"""

from tttjax.config.build import default_config, from_config_dict, to_dict, to_flat_dict
from tttjax.config.checks import check_mesh, has_fast_weights
from tttjax.config.counts import match_parameters, matched_model, parameter_count
from tttjax.config.files import load_config
from tttjax.config.least_memory import check_memory
from tttjax.config.run_info import (
    check_same_run,
    check_weights_config,
    config_fingerprint,
    read_config,
    with_absolute_paths,
    write_run_info,
)
from tttjax.config.schema import (
    Config,
    DataConfig,
    EvalConfig,
    InnerConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    WatchdogConfig,
)

__all__ = [
    "Config",
    "DataConfig",
    "EvalConfig",
    "InnerConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainConfig",
    "WatchdogConfig",
    "check_memory",
    "check_mesh",
    "check_same_run",
    "check_weights_config",
    "config_fingerprint",
    "default_config",
    "from_config_dict",
    "has_fast_weights",
    "load_config",
    "match_parameters",
    "matched_model",
    "parameter_count",
    "read_config",
    "to_dict",
    "to_flat_dict",
    "with_absolute_paths",
    "write_run_info",
]
