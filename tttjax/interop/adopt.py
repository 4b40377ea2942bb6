"""Weights from elsewhere as the work directory of a run: what every command that opens one takes.

It holds one checkpoint of the weights alone, the full configuration, the tokenizer if there is one,
and `origin.json`, which says where the weights came from. It appears under its name only when it
is complete.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from tttjax import checkpoint
from tttjax.config import Config, write_run_info
from tttjax.data.shards import TOKENIZER_DIR
from tttjax.data.tokenizers import Tokenizer
from tttjax.errors import UserError
from tttjax.types import Params

ORIGIN = "origin.json"


def check_vacant(workdir: str | os.PathLike) -> Path:
    """UserError unless a work directory can be made there: an empty folder, or nothing yet."""
    path = Path(workdir).expanduser()
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"--workdir={path} cannot be a folder, because {above} is a file.")
    if path.exists() and not path.is_dir():
        raise UserError(f"--workdir={path} is a file; name a folder that is not there yet.")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"--workdir={path} is not empty; name a folder that is not there yet.")
    return path


@contextlib.contextmanager
def new_workdir(workdir: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside `workdir`, which gets its name if nothing goes wrong.

    Else it is removed. Raises UserError as `check_vacant` does.
    """
    path = check_vacant(workdir).absolute()  # also of ".", which has no name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, check_vacant(path))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


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

    step: the number that its checkpoint gets. origin: where the weights come from, anything that
    JSON holds. Arrays are written so that not much more than the largest of them is compressed in
    memory at a time.
    """
    write_run_info(folder, config, with_devices=True)
    if tokenizer:
        tokenizer.save(folder / TOKENIZER_DIR)
    told = {**origin, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    (folder / ORIGIN).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    saver = checkpoint.Checkpointer(
        folder / checkpoint.DIRECTORY, keep=1, at_once=bytes_at_once(params)
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


def bytes_at_once(params: Params) -> int:
    """Room for the largest array, and for some small ones with it."""
    sizes = (x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    return max(sizes) * 9 // 8 + 2**20
