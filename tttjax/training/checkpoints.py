"""Checkpoints: asynchronous saves with Orbax, exact and verified restores.

`checkpoints/<step>/` in the work directory holds three items and their checksums:

    params/         the weights, Params(slow, fast)
    train/          the rest of the train state: optimizer, step, counters (absent for imported
                    weights)
    meta/           JSON: data iterator state, metrics state, resolved configuration
    checksums.json  BLAKE2b of every file of the three, written before the commit

Arrays are stored under their path in the train state (`params/slow/...`), so a restore can compare
every name, shape and dtype, and evaluation can read the weights alone.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from tttjax.errors import UnreachableError, UserError
from tttjax.io.paths import is_bucket, raise_if_unreachable, storage_path
from tttjax.parallel.pod import share_failure
from tttjax.training import checkpoint_format, checkpoint_integrity, going_back
from tttjax.training.checkpoint_integrity import print_once
from tttjax.training.s3_arrays import register_s3_driver
from tttjax.types import PyTree

CHECKPOINT_DIR = "checkpoints"
DAMAGED_PREFIX = "damaged-"  # of the names of checkpoints that were skipped


@dataclasses.dataclass(frozen=True)
class RestoredCheckpoint:
    """A restored checkpoint: the train state on its devices, and the values of `meta`.

    tokenizer: fingerprint of the training data's tokenizer; "" if not known.
    config: the resolved configuration; None if none was saved.
    """

    step: int
    state: PyTree
    data_state: Any
    extra: dict[str, Any]
    tokenizer: str
    config: dict[str, Any] | None = None


def absolute(path: epath.PathLike) -> epath.Path:
    """An absolute path, which Orbax requires."""
    folder: Any = storage_path(path)
    if str(folder).startswith("s3://"):
        register_s3_driver()
    return folder if is_bucket(folder) else epath.Path(folder).resolve()


class Checkpointer:
    """Saves and restores train states under `directory`.

    Keeps the newest `keep` and, with `keep_every`, all of steps that are multiples of it.

    `save` returns as soon as the arrays are copied off the devices; files are written in the
    background, and the checkpoint appears under its name when it is complete. Every process of a
    multi-process run must make the same calls.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        keep: int = 2,
        concurrent_bytes: int = 0,
        keep_every: int = 0,
    ):
        """Opens or creates `directory`; reports and removes incomplete checkpoints.

        concurrent_bytes: bytes of arrays written at a time, which bounds the host memory for
        compressed copies (0: Orbax's default).

        Raises:
          UserError: a process does not see a checkpoint that process 0 sees.
        """
        self.directory = absolute(directory)
        checkpoint_integrity.check_all_see(self.directory)
        self._clear_unfinished()
        policies = ocp.checkpoint_managers
        preserved: list[Any] = [policies.LatestN(keep)]
        if keep_every:
            preserved.append(policies.EveryNSteps(keep_every))
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=(*checkpoint_format.ARRAY_ITEMS, checkpoint_format.META),
            item_handlers=(
                {
                    item: checkpoint_format.array_handler(concurrent_bytes)
                    for item in checkpoint_format.ARRAY_ITEMS
                }
                if concurrent_bytes
                else None
            ),
            options=ocp.CheckpointManagerOptions(
                temporary_path_class=(
                    ocp.path.atomicity.CommitFileTemporaryPath
                    if is_bucket(self.directory)
                    else None
                ),
                preservation_policy=policies.AnyPreservationPolicy(preserved),
                cleanup_tmp_directories=True,
                single_host_load_and_broadcast=True,  # process 0 lists the steps for all
                async_options=ocp.AsyncOptions(
                    barrier_sync_fn=self._barrier,
                    post_finalization_callback=lambda: checkpoint_integrity.seal(self.directory),
                ),
            ),
        )
        self.complete_step = self.newest_step  # the newest one known to be complete

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's barriers of a save in progress, the first when this process's files are written.

        Hashing them there keeps the seal on process 0 from reading the files of all.
        """
        if error := sys.exc_info()[1]:
            share_failure(error)  # of a save: Orbax waits here for processes that wait elsewhere
        if "async_write_complete" in key:
            checkpoint_integrity.write_own_checksums(self.directory)
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def _clear_unfinished(self) -> None:
        """Removes incomplete checkpoints now; Orbax would do so later."""
        unfinished = checkpoint_format.unfinished_steps(self.directory)
        for step in unfinished:
            print_once(
                f"warning: the checkpoint of step {step} in {self.directory} was never completed; "
                "removed"
            )
        if unfinished:
            checkpoint_format.remove_unfinished(self.directory, quiet_s=0)

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        data_state: Any = None,
        extra: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        tokenizer: str = "",
    ) -> None:
        """Starts saving `state`; does nothing if this step is already saved.

        Arguments:
          step: the number of finished updates, the checkpoint's name.
          state: a pytree of arrays with an attribute or key `params`.
          data_state, extra, config: JSON values, returned by `restore` and `load_saved_config`.
          tokenizer: fingerprint of the training data's tokenizer.

        Raises:
          UserError: the disk is full, in this save or the one before it, or `state` is not finite.
        """
        if step in self._manager.all_steps():
            return
        if name := checkpoint_integrity.first_nonfinite(state):
            newest = self.newest_step
            earlier = "there is none before it" if newest is None else f"step {newest} is intact"
            raise UserError(
                f"the state after step {step} is not finite ({name}), so no checkpoint was saved "
                f"({earlier}): lower optim.peak_lr or inner.lr, or set optim.clip or inner.clip; "
                "the same command resumes from before"
            )
        arrays = checkpoint_format.split_items(state)
        meta = {
            "format": checkpoint_format.FORMAT,
            "data_state": data_state,
            "extra": extra or {},
            "config": config,
            "tokenizer": tokenizer,
        }
        items: dict[str, Any] = {k: ocp.args.StandardSave(v) for k, v in arrays.items() if v}
        items[checkpoint_format.META] = ocp.args.JsonSave(meta)
        before = self.newest_step
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
            self.complete_step = before  # its save has ended
        except Exception as e:
            self._explain(e)
            raise

    def wait(self) -> None:
        """Blocks until the save in progress is complete; raises like `save`."""
        try:
            self._manager.wait_until_finished()
            self.complete_step = self.newest_step
        except Exception as e:
            self._explain(e)
            raise

    def _explain(self, error: Exception) -> None:
        """Raises UserError for a full disk, after removing the incomplete checkpoint.

        Raises UnreachableError for a bucket that does not answer.
        """
        if is_bucket(self.directory):
            raise_if_unreachable(self.directory, error)
        if checkpoint_format.is_disk_full(error):
            checkpoint_format.remove_unfinished(self.directory)
            earlier = checkpoint_format.completed_checkpoints(self.directory)
            state = f"step {earlier[-1].name} is intact" if earlier else "no earlier one exists"
            raise UserError(
                f"no space left while saving a checkpoint in {self.directory} ({state}): free "
                "some space and run the same command again, which resumes from there"
            ) from error

    @property
    def newest_step(self) -> int | None:
        """The step of the newest checkpoint, also if its save is in progress."""
        return self._manager.latest_step()

    def restore(
        self, abstract_state: PyTree, from_step: int | None = None
    ) -> RestoredCheckpoint | None:
        """Reads the newest undamaged checkpoint; None if there are no checkpoints.

        Process 0 chooses the checkpoint. Damaged ones, and those whose state is not finite, are
        reported and skipped. They are renamed to `damaged-<step>` only after an older one has been
        read, so repeating a failed restore gives the same error.

        Arguments:
          abstract_state: jax.ShapeDtypeStructs with shardings, in the structure that was saved.
            The mesh and the number of hosts may differ from those of the save.
          from_step: reads the checkpoint of this step instead, unless the run has already gone back
            to it (`go_back_to`).

        Raises:
          UserError: a name, shape or dtype differs from the checkpoint's, it has a later format,
            every checkpoint is damaged, there is none of `from_step`, or the processes see
            different files.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        chosen = going_back.choose_step(self.directory, from_step, steps)
        skipped: list[epath.Path] = []
        for step in steps if chosen is None else [chosen]:
            restored, problem = self._read(step, abstract_state)
            if restored is not None:
                self._rename_damaged(skipped)
                return restored
            if chosen is not None:
                raise UserError(
                    f"--from-step={step}: {self.directory / str(step)} is damaged ({problem}); "
                    "choose another step"
                )
            print_once(
                f"warning: the checkpoint of step {step} is damaged ({problem}); trying the one "
                "before it"
            )
            skipped.append(self.directory / str(step))
        damaged = skipped or [
            path for path in self.directory.iterdir() if path.name.startswith(DAMAGED_PREFIX)
        ]
        if damaged:
            raise UserError(
                f"every checkpoint in {self.directory} is damaged "
                f"({', '.join(sorted(path.name for path in damaged))}): restore the directory from "
                "a copy, or start over in a new work directory"
            )
        return None

    def _read(
        self, step: int, abstract_state: PyTree
    ) -> tuple[RestoredCheckpoint, None] | tuple[None, str]:
        """The checkpoint of a step, or a phrase on its damage."""
        path = self.directory / str(step)
        if problem := checkpoint_integrity.find_damage(path):
            return None, problem
        meta = checkpoint_format.read_meta(path)
        state = checkpoint_format.read_train_state(path, abstract_state)
        if name := checkpoint_integrity.first_nonfinite(state):
            return None, f"{name} is not finite"
        tokenizer = meta.get("tokenizer", "")
        restored = RestoredCheckpoint(
            step, state, meta["data_state"], meta["extra"], tokenizer, meta["config"]
        )
        return restored, None

    def _rename_damaged(self, damaged: list[epath.Path]) -> None:
        if not damaged:
            return
        if jax.process_index() == 0:
            for path in damaged:
                target = path.parent / f"{DAMAGED_PREFIX}{path.name}"
                if target.exists():
                    target.rmtree()
                path.rename(target)
        self._reload("tttjax renamed damaged checkpoints")

    def go_back_to(self, step: int) -> None:
        """Renames the checkpoints after `step` to `abandoned-<step>`, see `going_back`.

        `restore` with this `from_step` does not go back again, so that a command can be repeated.
        """
        if jax.process_index() == 0:
            newer = [other for other in self._manager.all_steps() if other > step]
            going_back.set_aside(self.directory, newer, step)
        self._reload("tttjax went back to an earlier checkpoint")

    def _reload(self, sync_name: str) -> None:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(sync_name)
        self._manager.reload()

    def close(self) -> None:
        """Waits for the save in progress and releases Orbax's threads; raises like `save`."""
        try:
            self.wait()
        finally:
            self._manager.close()


@contextlib.contextmanager
def naming_saved_step(checkpointer: Checkpointer) -> Iterator[None]:
    """Adds to an UnreachableError from where the run will resume."""
    saved = checkpointer.complete_step
    try:
        yield
    except UnreachableError as error:
        origin = "starts over" if saved is None else f"resumes after step {saved}, which is saved"
        raise UnreachableError(f"{error} The run {origin}.") from error
