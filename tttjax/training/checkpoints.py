"""Checkpoints: asynchronous saves with Orbax, exact and verified restores.

A work directory keeps them in `checkpoints/<step>/`, each with three items and a seal:

    params/         the weights, Params(slow, fast)
    train/          everything else of the train state: optimizer, step, counters (absent where
                    there is nothing else, as for imported weights)
    meta/           JSON: data iterator state, metrics' state, resolved configuration
    checksums.json  BLAKE2b of every file of the three, written before the commit

Arrays are stored under the path they have in the train state (`params/slow/...`), so a restore
can compare every name, shape and dtype, and evaluation can read the weights alone.
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
from tttjax.training import checkpoint_format as io
from tttjax.types import Params, PyTree

CHECKPOINT_DIR = "checkpoints"
DAMAGED_PREFIX = "damaged-"  # how names begin of damaged checkpoints that were passed over


@dataclasses.dataclass(frozen=True)
class RestoredCheckpoint:
    """What a checkpoint gave back: the state on its devices, and what was saved with it.

    tokenizer: the fingerprint of the tokenizer that made the training data; "" if not known.
    config: the resolved configuration that was saved; None if none was.
    """

    step: int
    state: PyTree
    data_state: Any
    extra: dict[str, Any]
    tokenizer: str
    config: dict[str, Any] | None = None


def _is_first() -> bool:
    return jax.process_index() == 0


def _warn(sentence: str) -> None:
    if _is_first():
        print(f"warning: {sentence}", file=sys.stderr, flush=True)


def _absolute(path: epath.PathLike) -> epath.Path:
    """Orbax takes absolute paths only."""
    return epath.Path(local_path(path)).resolve()


class Checkpointer:
    """Saves and restores train states under `directory`, keeping the newest `keep`.

    `save` returns as soon as the arrays are copied off the devices; the files are written in the
    background and the checkpoint appears under its name only when complete. Every process of a
    multi-process run must make the same calls.
    """

    def __init__(self, directory: epath.PathLike, keep: int = 2, concurrent_bytes: int = 0):
        """Opens (and creates) `directory`; reports and removes checkpoints never completed.

        at_once: bytes of arrays that are being written at a time, which bounds the host memory for
        their compressed copies (0: as Orbax likes).
        """
        self.directory = _absolute(directory)
        self._clear_unfinished()
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=(*io.ARRAY_ITEMS, io.META),
            item_handlers=(
                {item: io.array_handler(concurrent_bytes) for item in io.ARRAY_ITEMS}
                if concurrent_bytes
                else None
            ),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(
                    post_finalization_callback=lambda: io.seal_unfinished(self.directory)
                ),
            ),
        )

    def _clear_unfinished(self) -> None:
        """Orbax would remove them too, but some time later."""
        unfinished = io.unfinished_steps(self.directory)
        for step in unfinished:
            _warn(f"the checkpoint of step {step} in {self.directory} was never completed; removed")
        if unfinished:
            io.remove_unfinished(self.directory, quiet_s=0)

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
          data_state, extra, config: anything JSON holds; given back by `restore`, `load_config`.
          tokenizer: the fingerprint of the tokenizer that made the training data.

        Raises:
          UserError: this save or the one before it met a full disk.
        """
        if step in self._manager.all_steps():
            return
        arrays = io.split_items(state)
        meta = {
            "format": io.FORMAT,
            "data_state": data_state,
            "extra": extra or {},
            "config": config,
            "tokenizer": tokenizer,
        }
        items: dict[str, Any] = {k: ocp.args.StandardSave(v) for k, v in arrays.items() if v}
        items[io.META] = ocp.args.JsonSave(meta)
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as e:
            self._explain(e)
            raise

    def wait(self) -> None:
        """Blocks until the save in progress is complete; raises like `save`."""
        try:
            self._manager.wait_until_finished()
        except Exception as e:
            self._explain(e)
            raise

    def _explain(self, error: Exception) -> None:
        """Turns a full disk into a UserError, after removing what was half written."""
        if io.is_disk_full(error):
            io.remove_unfinished(self.directory)
            earlier = io.completed_checkpoints(self.directory)
            kept = f"step {earlier[-1].name} is intact" if earlier else "no earlier one exists"
            raise UserError(
                f"no space left while saving a checkpoint in {self.directory} ({kept}): free some "
                "space and start again with the same command, which continues from there"
            ) from error

    def restore(self, abstract_state: PyTree) -> RestoredCheckpoint | None:
        """Reads the newest undamaged checkpoint, or returns None if there is none at all.

        Arguments:
          abstract_state: jax.ShapeDtypeStructs with shardings, in the structure that was saved.
            The shardings may belong to another mesh or number of hosts than the saved ones.

        Damaged checkpoints are reported and passed over. They are renamed to `damaged-<step>`
        once an older one has been read; until then nothing changes, so that the same command meets
        the same damage again.

        Raises:
          UserError: a name, shape or dtype differs from the checkpoint's, it has a later format,
            or every checkpoint is damaged.
        """
        damaged: list[epath.Path] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            path = self.directory / str(step)
            problem = _agree(io.damage(path) if _is_first() else None)
            if problem is None:
                meta = io.read_meta(path)
                state = io.read_items(path, abstract_state)
                self._set_aside(damaged)
                tokenizer = meta.get("tokenizer", "")
                return RestoredCheckpoint(
                    step, state, meta["data_state"], meta["extra"], tokenizer, meta["config"]
                )
            _warn(f"the checkpoint of step {step} is damaged ({problem}); trying the one before it")
            damaged.append(path)
        left = damaged or [
            path for path in self.directory.iterdir() if path.name.startswith(DAMAGED_PREFIX)
        ]
        if left:
            raise UserError(
                f"every checkpoint in {self.directory} is damaged "
                f"({', '.join(sorted(path.name for path in left))}): restore the directory from a "
                "copy, or start over in a new work directory"
            )
        return None

    def _set_aside(self, damaged: list[epath.Path]) -> None:
        if not damaged:
            return
        if _is_first():
            for path in damaged:
                target = path.parent / f"{DAMAGED_PREFIX}{path.name}"
                if target.exists():
                    target.rmtree()
                path.rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("tttjax set damaged checkpoints aside")
        self._manager.reload()

    def close(self) -> None:
        """Waits for the save in progress and releases Orbax's threads; raises like `save`."""
        try:
            self.wait()
        finally:
            self._manager.close()


def _agree(problem: str | None) -> str | None:
    """Process 0's verdict, on every process."""
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
    if (path / io.META).exists():
        candidates = [path]
    else:
        folder = path / CHECKPOINT_DIR if (path / CHECKPOINT_DIR).exists() else path
        candidates = io.completed_checkpoints(folder)
    if not candidates:
        raise UserError(
            f"{path} holds no checkpoint: give a work directory that `tttjax train` has written, "
            "or one checkpoint in it"
        )
    for candidate in reversed(candidates):
        problem = _agree(io.damage(candidate) if _is_first() else None)
        if problem is None:
            return candidate
        _warn(f"the checkpoint {candidate} is damaged ({problem})")
    raise UserError(f"every checkpoint in {path} is damaged: restore it from a copy")


def load_config(path: epath.PathLike) -> dict[str, Any] | None:
    """The resolved configuration saved in the newest undamaged checkpoint under `path`."""
    return io.read_meta(find_checkpoint(path))["config"]


def load_tokenizer_fingerprint(path: epath.PathLike) -> str:
    """Of the tokenizer whose tokens the newest undamaged checkpoint learned; "" if not known."""
    return io.read_meta(find_checkpoint(path)).get("tokenizer", "")


def restore_params(
    path: epath.PathLike,
    template: Params,
    *,
    allow_missing: tuple[str, ...] = (),
    allow_unexpected: tuple[str, ...] = (),
    concurrent_bytes: int = 0,
) -> Params:
    """Reads weights only, from a work directory (its newest checkpoint) or a checkpoint.

    Arguments:
      template: jax.ShapeDtypeStructs with shardings. Where `allow_missing` lets the checkpoint
        lack an array, the template must hold the array itself, which is returned unchanged.
      allow_missing, allow_unexpected: patterns over paths such as "fast/**" or "slow/*/norm":
        arrays that the checkpoint, or the template, may lack (`*` stays within one part of a
        path, `**` crosses). Everything else must match in name, shape and dtype.
      at_once: bytes of arrays that are being read at a time (0: as Orbax likes).

    Raises:
      UserError: no checkpoint, all damaged, or the differences between the two.
    """
    return io.read_item(
        find_checkpoint(path) / "params",
        template,
        allow_missing=allow_missing,
        allow_unexpected=allow_unexpected,
        concurrent_bytes=concurrent_bytes,
    )
