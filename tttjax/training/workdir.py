"""The work directory of a run: locked by one process, cleaned up after a failed start."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from tttjax.config.run_info import CONFIG
from tttjax.data.shards import TOKENIZER_DIR
from tttjax.errors import UserError
from tttjax.io.locks import Lock, hold
from tttjax.io.paths import if_reachable, is_bucket, remove_tree
from tttjax.parallel.pod import share_failure
from tttjax.parallel.store import process_count, process_id
from tttjax.runtime.ending import at_sudden_end
from tttjax.training.checkpoints import CHECKPOINT_DIR
from tttjax.training.failed_starts import count_start
from tttjax.training.ledger import STARTS
from tttjax.training.metrics_file import HELD_OUT, JSONL
from tttjax.training.profiler import PROFILE_DIR

# Created before the first step; the configuration is written after it.
CREATED_FILES = {
    CHECKPOINT_DIR,
    TOKENIZER_DIR,
    JSONL,
    HELD_OUT,
    "tensorboard",
    PROFILE_DIR,
    STARTS,
    "wandb",
    "wandb_id.txt",
}


@contextlib.contextmanager
def lock_workdir(workdir: Path, max_failed_starts: int) -> Iterator[Lock]:
    """Creates the work directory if needed; process 0 locks it for all processes.

    Counts the start before it opens the devices, which can fail too. Raises UserError, on every
    process, if the directory is a file, another command holds the lock, or as `count_start` does.
    """
    with contextlib.ExitStack() as exit_stack:
        lock = Lock(workdir)
        lock_error: Exception | None = None
        is_alone = process_count() == 1
        if process_id() == 0:
            try:  # with several processes, JAX has its own handler of SIGTERM
                _check_is_no_file(workdir)
                lock = exit_stack.enter_context(hold(workdir, exit_on_sigterm=is_alone))
                exit_stack.enter_context(count_start(workdir, max_failed_starts))
            except (UserError, OSError) as error:
                share_failure(error)
                lock_error = error  # raised after the other processes know
        has_failed = np.int32(lock_error is not None)
        if not is_alone:  # TPU processes may have another index there than process_id()
            has_failed = multihost_utils.process_allgather(has_failed).any()
        if has_failed:
            raise lock_error or UserError(f"{workdir} cannot be used; see the error of process 0")
        yield lock


def _check_is_no_file(workdir: Path) -> None:
    # In process 0 alone: it creates and removes folders while the others are at the same place.
    nearest = next((path for path in (workdir, *workdir.parents) if path.exists()), None)
    if nearest is not None and not (is_bucket(nearest) or nearest.is_dir()):
        raise UserError(
            f"--workdir={workdir} cannot be a folder, because {nearest} is a file; choose another"
        )


@contextlib.contextmanager
def remove_failed_start(workdir: Path, lock: Lock) -> Iterator[None]:
    """Removes the files created in a new work directory if it ends before the first step.

    Keeps them if another process took the lock over, since they may be that process's.
    """
    if jax.process_index() != 0 or (workdir / CONFIG).exists():
        yield
        return
    before = {path.name for path in workdir.iterdir()}

    def remove() -> None:
        if not lock.lost.is_set() and not (workdir / CONFIG).exists():
            for name in {path.name for path in workdir.iterdir()} & CREATED_FILES - before:
                path = workdir / name
                remove_tree(path) if path.is_dir() else path.unlink()

    try:
        with at_sudden_end(lambda _: remove()):
            yield
    finally:
        with if_reachable(workdir):
            remove()
