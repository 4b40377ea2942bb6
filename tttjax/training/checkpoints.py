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

import dataclasses
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from tttjax.errors import UserError
from tttjax.io.paths import local_path
from tttjax.training import checkpoint_format
from tttjax.types import Params, PyTree

CHECKPOINT_DIR = "checkpoints"
DAMAGED_PREFIX = "damaged-"  # of the names of damaged checkpoints that were skipped


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


def _is_process_0() -> bool:
    return jax.process_index() == 0


def _warn(sentence: str) -> None:
    if _is_process_0():
        print(f"warning: {sentence}", file=sys.stderr, flush=True)


def _absolute(path: epath.PathLike) -> epath.Path:
    """An absolute path, which Orbax requires."""
    return epath.Path(local_path(path)).resolve()


class Checkpointer:
    """Saves and restores train states under `directory`, keeping the newest `keep`.

    `save` returns as soon as the arrays are copied off the devices; files are written in the
    background, and the checkpoint appears under its name when it is complete. Every process of a
    multi-process run must make the same calls.
    """

    def __init__(self, directory: epath.PathLike, keep: int = 2, concurrent_bytes: int = 0):
        """Opens or creates `directory`; reports and removes incomplete checkpoints.

        concurrent_bytes: bytes of arrays written at a time, which bounds the host memory for
        compressed copies (0: Orbax's default).
        """
        self.directory = _absolute(directory)
        self._clear_unfinished()
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
                max_to_keep=keep,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(
                    post_finalization_callback=lambda: checkpoint_format.write_checksums(
                        self.directory
                    )
                ),
            ),
        )

    def _clear_unfinished(self) -> None:
        """Removes incomplete checkpoints now; Orbax would do so later."""
        unfinished = checkpoint_format.unfinished_steps(self.directory)
        for step in unfinished:
            _warn(f"the checkpoint of step {step} in {self.directory} was never completed; removed")
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
          UserError: the disk is full, in this save or the one before it.
        """
        if step in self._manager.all_steps():
            return
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
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as e:
            self._raise_if_disk_full(e)
            raise

    def wait(self) -> None:
        """Blocks until the save in progress is complete; raises like `save`."""
        try:
            self._manager.wait_until_finished()
        except Exception as e:
            self._raise_if_disk_full(e)
            raise

    def _raise_if_disk_full(self, error: Exception) -> None:
        """Turns a full disk into a UserError, after removing the incomplete checkpoint."""
        if checkpoint_format.is_disk_full(error):
            checkpoint_format.remove_unfinished(self.directory)
            earlier = checkpoint_format.completed_checkpoints(self.directory)
            state = f"step {earlier[-1].name} is intact" if earlier else "no earlier one exists"
            raise UserError(
                f"no space left while saving a checkpoint in {self.directory} ({state}): free "
                "some space and run the same command again, which resumes from there"
            ) from error

    def restore(self, abstract_state: PyTree) -> RestoredCheckpoint | None:
        """Reads the newest undamaged checkpoint; None if there are no checkpoints.

        Arguments:
          abstract_state: jax.ShapeDtypeStructs with shardings, in the structure that was saved.
            The mesh and the number of hosts may differ from those of the save.

        Damaged checkpoints are reported and skipped. They are renamed to `damaged-<step>` only
        after an older one has been read, so repeating a failed restore gives the same error.

        Raises:
          UserError: a name, shape or dtype differs from the checkpoint's, it has a later format,
            or every checkpoint is damaged.
        """
        damaged: list[epath.Path] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            path = self.directory / str(step)
            problem = _broadcast(checkpoint_format.find_damage(path) if _is_process_0() else None)
            if problem is None:
                meta = checkpoint_format.read_meta(path)
                state = checkpoint_format.read_train_state(path, abstract_state)
                self._rename_damaged(damaged)
                tokenizer = meta.get("tokenizer", "")
                return RestoredCheckpoint(
                    step, state, meta["data_state"], meta["extra"], tokenizer, meta["config"]
                )
            _warn(f"the checkpoint of step {step} is damaged ({problem}); trying the one before it")
            damaged.append(path)
        skipped = damaged or [
            path for path in self.directory.iterdir() if path.name.startswith(DAMAGED_PREFIX)
        ]
        if skipped:
            raise UserError(
                f"every checkpoint in {self.directory} is damaged "
                f"({', '.join(sorted(path.name for path in skipped))}): restore the directory from "
                "a copy, or start over in a new work directory"
            )
        return None

    def _rename_damaged(self, damaged: list[epath.Path]) -> None:
        if not damaged:
            return
        if _is_process_0():
            for path in damaged:
                target = path.parent / f"{DAMAGED_PREFIX}{path.name}"
                if target.exists():
                    target.rmtree()
                path.rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("tttjax renamed damaged checkpoints")
        self._manager.reload()

    def close(self) -> None:
        """Waits for the save in progress and releases Orbax's threads; raises like `save`."""
        try:
            self.wait()
        finally:
            self._manager.close()


def _broadcast(problem: str | None) -> str | None:
    """Process 0's text, on every process."""
    if jax.process_count() == 1:
        return problem
    text = np.zeros(512, np.uint8)
    encoded = (problem or "").encode()[:512]
    text[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    shared = np.asarray(multihost_utils.broadcast_one_to_all(text))
    return bytes(shared).rstrip(b"\0").decode(errors="replace") or None


def find_checkpoint(path: epath.PathLike) -> epath.Path:
    """The newest undamaged checkpoint of a work directory, or `path` if it is a checkpoint.

    Raises:
      UserError: there is none.
    """
    path = _absolute(path)
    if (path / checkpoint_format.META).exists():
        candidates = [path]
    else:
        folder = path / CHECKPOINT_DIR if (path / CHECKPOINT_DIR).exists() else path
        candidates = checkpoint_format.completed_checkpoints(folder)
    if not candidates:
        raise UserError(
            f"{path} holds no checkpoint: give a work directory of `tttjax train`, or one "
            "checkpoint in it"
        )
    for candidate in reversed(candidates):
        problem = _broadcast(checkpoint_format.find_damage(candidate) if _is_process_0() else None)
        if problem is None:
            return candidate
        _warn(f"the checkpoint {candidate} is damaged ({problem})")
    raise UserError(f"every checkpoint in {path} is damaged: restore it from a copy")


def load_saved_config(path: epath.PathLike) -> dict[str, Any] | None:
    """The resolved configuration saved in the newest undamaged checkpoint under `path`."""
    return checkpoint_format.read_meta(find_checkpoint(path))["config"]


def load_tokenizer_fingerprint(path: epath.PathLike) -> str:
    """Fingerprint of the training data's tokenizer, from the newest undamaged checkpoint.

    "" if not known.
    """
    return checkpoint_format.read_meta(find_checkpoint(path)).get("tokenizer", "")


def restore_params(
    path: epath.PathLike,
    template: Params,
    *,
    allow_missing: tuple[str, ...] = (),
    allow_unexpected: tuple[str, ...] = (),
    concurrent_bytes: int = 0,
) -> Params:
    """Reads the weights of a work directory (its newest checkpoint) or of a checkpoint.

    Arguments:
      template: jax.ShapeDtypeStructs with shardings. For arrays that the checkpoint may lack
        (`allow_missing`), the template must hold arrays, which are returned unchanged.
      allow_missing, allow_unexpected: path patterns such as "fast/**" or "slow/*/norm" of arrays
        that the checkpoint, or the template, may lack (`*` matches within one part of a path, `**`
        across parts). Everything else must match in name, shape and dtype.
      concurrent_bytes: bytes of arrays read at a time (0: Orbax's default).

    Raises:
      UserError: no checkpoint, all damaged, or the differences between the two.
    """
    return checkpoint_format.read_item(
        find_checkpoint(path) / "params",
        template,
        allow_missing=allow_missing,
        allow_unexpected=allow_unexpected,
        concurrent_bytes=concurrent_bytes,
    )
