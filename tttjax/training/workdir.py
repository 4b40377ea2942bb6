"""A run's work directory: one process writes it, and a start that fails leaves nothing in it."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from tttjax.config.run_info import CONFIG
from tttjax.data.shards import TOKENIZER_DIR
from tttjax.errors import UserError
from tttjax.io.locks import Lock, hold
from tttjax.training.checkpoints import CHECKPOINT_DIR
from tttjax.training.metrics import JSONL

# Made before the first step, after which the configuration is written.
CREATED_FILES = {
    CHECKPOINT_DIR,
    TOKENIZER_DIR,
    JSONL,
    "tensorboard",
    "profile",
    "wandb",
    "wandb_id.txt",
}


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[Lock]:
    """The work directory, made if need be and locked by the first process for all.

    Raises UserError, on every process, if it is a file or another run's process writes there.
    """
    nearest = next((path for path in (workdir, *workdir.parents) if path.exists()), workdir)
    if nearest.exists() and not nearest.is_dir():
        raise UserError(
            f"--workdir={workdir} cannot be a folder, because {nearest} is a file; choose another"
        )
    if jax.process_count() == 1:
        with hold(workdir) as lock:
            yield lock
        return
    with contextlib.ExitStack() as holding:
        lock = Lock(workdir)
        refusal: Exception | None = None
        if jax.process_index() == 0:
            try:  # JAX has its own handler of SIGTERM here
                lock = holding.enter_context(hold(workdir, ends_on_sigterm=False))
            except (UserError, OSError) as error:  # the others wait to hear of it
                refusal = error
        is_refused = multihost_utils.broadcast_one_to_all(np.int32(refusal is not None))
        if is_refused:
            raise refusal or UserError(f"{workdir} cannot be written; process 0 says why")
        yield lock


@contextlib.contextmanager
def remove_failed_start(workdir: Path, lock: Lock) -> Iterator[None]:
    """Removes what was made in a new work directory, unless its configuration has been written.

    What another process, which took the lock over, may have made stays.
    """
    if jax.process_index() != 0 or (workdir / CONFIG).exists():
        yield
        return
    before = {path.name for path in workdir.iterdir()}
    try:
        yield
    finally:
        if not lock.lost.is_set() and not (workdir / CONFIG).exists():
            for name in {path.name for path in workdir.iterdir()} & CREATED_FILES - before:
                path = workdir / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
