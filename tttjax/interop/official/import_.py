"""Checkpoints of the official TTT-E2E code as a source."""

from collections.abc import Sequence
from typing import Any

from tttjax.config import load_config
from tttjax.interop.official.checkpoint import open_official_checkpoint
from tttjax.interop.official.config import deduce_config
from tttjax.interop.official.names import check_arrays, pieces
from tttjax.interop.source import (
    ImportSource,
    Say,
    describe_config,
    given_tokenizer,
    is_named,
    overridden,
)
from tttjax.models import build_model
from tttjax.runs.origin import OFFICIAL


def open_official(
    path: str,
    *,
    config: str = "",
    overrides: Sequence[str] = (),
    tokenizer: str = "",
    project: str = "",
    say: Say = print,
) -> ImportSource:
    """A checkpoint, compared with the configuration by names and shapes.

    config: experiment file; "": the configuration is told from the arrays. overrides: of either.
    project: of Google Cloud, that pays for reading. Raises UserError for anything wrong with these.
    """
    found = open_official_checkpoint(path, project)
    size = sum(array.nbytes for array in found.arrays.values())
    say(
        f"{found.source}: official TTT-E2E checkpoint, step {found.step}, {len(found.arrays)} "
        f"arrays, {size / 1e9:.2f} GB"
    )
    assumed: dict[str, Any] = {}
    if config:
        resolved = load_config(config, overrides)
    else:
        values, assumed = deduce_config(found.arrays)
        resolved = overridden(values, overrides)
        assumed = {key: value for key, value in assumed.items() if not is_named(key, overrides)}
    check_arrays(found.arrays, build_model(resolved.model, resolved.inner))
    describe_config(resolved, assumed, say)
    return ImportSource(
        config=resolved,
        step=found.step,
        origin={
            "kind": "official TTT-E2E checkpoint",
            "source": found.source,
            "step": found.step,
            "assumed": assumed,
            **OFFICIAL,
        },
        pieces=lambda model: pieces(found.arrays, model),
        tokenizer=given_tokenizer(tokenizer, resolved) if tokenizer else None,
    )
