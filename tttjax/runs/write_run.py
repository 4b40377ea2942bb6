"""Weights from elsewhere as the work directory of a run: what every command that opens one takes.

It holds one checkpoint of the weights alone, the full configuration, the tokenizer if there is one,
and `origin.json`, which says where the weights came from. It appears under its name only when it
is complete.
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
    """Writes everything of an imported run into a work directory.

    step: the number that its checkpoint gets. origin: where the weights come from and under what
    terms, anything that JSON holds. Arrays are written so that not much more than the largest of
    them is compressed in memory at a time.
    """
    write_run_info(folder, config, with_devices=True)
    if tokenizer:
        tokenizer.save(folder / TOKENIZER_DIR)
    told = {**origin, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    (folder / ORIGIN).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    saver = checkpoints.Checkpointer(
        folder / checkpoints.CHECKPOINT_DIR, keep=1, concurrent_bytes=max_concurrent_bytes(params)
    )
    try:
        saver.save(
            step,
            {"params": params},
            config=dataclasses.asdict(config),
            tokenizer=tokenizer.fingerprint() if tokenizer else "",
        )
    finally:
        saver.close()


def max_concurrent_bytes(params: Params) -> int:
    """Room for the largest array, and for some small ones with it."""
    sizes = (x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    return max(sizes) * 9 // 8 + 2**20
