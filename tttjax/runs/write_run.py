"""Writing imported weights as the work directory of a run.

The directory holds one checkpoint with weights alone, the full configuration, the tokenizer if
there is one, and `origin.json`, which records the source of the weights.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax

from tttjax.config import Config, write_run_info
from tttjax.data.shards import TOKENIZER_DIR
from tttjax.data.tokenizers.base import Tokenizer
from tttjax.runs.origin import ORIGIN
from tttjax.training import checkpoints
from tttjax.types import Params


def write_run(
    folder: Path,
    config: Config,
    params: Params,
    *,
    step: int,
    origin: dict[str, Any],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes an imported run into the work directory `folder`.

    step: step number of its checkpoint. origin: source and terms of the weights, as JSON values.
    Writing buffers little more than the largest array in host memory at a time.
    """
    write_run_info(folder, config, with_devices=True)
    if tokenizer:
        tokenizer.save(folder / TOKENIZER_DIR)
    record = {**origin, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    (folder / ORIGIN).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    checkpointer = checkpoints.Checkpointer(
        folder / checkpoints.CHECKPOINT_DIR, keep=1, concurrent_bytes=max_concurrent_bytes(params)
    )
    try:
        checkpointer.save(
            step,
            {"params": params},
            config=dataclasses.asdict(config),
            tokenizer=tokenizer.fingerprint() if tokenizer else "",
        )
    finally:
        checkpointer.close()


def max_concurrent_bytes(params: Params) -> int:
    """The size of the largest array plus one eighth and 1 MiB, for small arrays beside it."""
    sizes = (x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    return max(sizes) * 9 // 8 + 2**20
