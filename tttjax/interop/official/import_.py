"""Import of checkpoints of the official TTT-E2E code."""

from collections.abc import Sequence
from typing import Any

from tttjax.config import load_config
from tttjax.interop.official.checkpoint import open_official_checkpoint
from tttjax.interop.official.config import infer_config
from tttjax.interop.official.names import check_arrays, iter_weights
from tttjax.interop.source import (
    ImportSource,
    Log,
    config_with_overrides,
    describe_config,
    is_overridden,
    load_checked_tokenizer,
)
from tttjax.models.transformer import build_model
from tttjax.runs.origin import OFFICIAL


def open_official(
    path: str,
    *,
    config: str = "",
    overrides: Sequence[str] = (),
    tokenizer: str = "",
    project: str = "",
    log: Log = print,
) -> ImportSource:
    """Opens a checkpoint and checks its arrays against the configuration.

    config: experiment file; "": infer the configuration from the arrays. overrides: of either.
    project: Google Cloud project to bill. Raises UserError if any of these is invalid.
    """
    checkpoint = open_official_checkpoint(path, project)
    size = sum(array.nbytes for array in checkpoint.arrays.values())
    log(
        f"{checkpoint.source}: official TTT-E2E checkpoint, step {checkpoint.step}, "
        f"{len(checkpoint.arrays)} arrays, {size / 1e9:.2f} GB"
    )
    assumed: dict[str, Any] = {}
    if config:
        resolved = load_config(config, overrides)
    else:
        values, assumed = infer_config(checkpoint.arrays)
        resolved = config_with_overrides(values, overrides)
        assumed = {
            key: value for key, value in assumed.items() if not is_overridden(key, overrides)
        }
    check_arrays(checkpoint.arrays, build_model(resolved.model, resolved.inner))
    describe_config(resolved, assumed, log)
    return ImportSource(
        config=resolved,
        step=checkpoint.step,
        origin={
            "kind": "official TTT-E2E checkpoint",
            "source": checkpoint.source,
            "step": checkpoint.step,
            "assumed": assumed,
            **OFFICIAL,
        },
        iter_weights=lambda model: iter_weights(checkpoint.arrays, model),
        tokenizer=load_checked_tokenizer(tokenizer, resolved) if tokenizer else None,
    )
