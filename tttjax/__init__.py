"""tttjax: language models with end-to-end test-time training (TTT-E2E, arXiv 2512.23675).

What `dir(tttjax)` lists is the public API; docs/api.md describes it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tttjax import recipes
    from tttjax.api import (
        build_model,
        evaluate,
        forward,
        load,
        plan,
        prepare,
        report,
        train,
        value_and_meta_grad,
    )
    from tttjax.config import Config
    from tttjax.errors import UserError
    from tttjax.runs.loaded_run import LoadedRun, TextSession
    from tttjax.types import Batch, Params

__version__ = "0.1.0"
__all__ = [
    "Batch",
    "Config",
    "LoadedRun",
    "Params",
    "TextSession",
    "UserError",
    "build_model",
    "evaluate",
    "forward",
    "load",
    "plan",
    "prepare",
    "recipes",
    "report",
    "train",
    "value_and_meta_grad",
]
# Where a name is, if not in `api`. Imported when it is used, so that importing tttjax is fast.
_MODULES = {
    "Batch": "tttjax.types",
    "Config": "tttjax.config",
    "LoadedRun": "tttjax.runs.loaded_run",
    "Params": "tttjax.types",
    "TextSession": "tttjax.runs.loaded_run",
    "UserError": "tttjax.errors",
}


def __getattr__(name: str) -> Any:
    if name == "recipes":
        return importlib.import_module("tttjax.recipes")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES.get(name, "tttjax.api")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
