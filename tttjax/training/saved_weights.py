"""The weights and facts of a run's newest checkpoint, or of one checkpoint, without resuming it."""

from typing import Any

from etils import epath

from tttjax.errors import UserError
from tttjax.training import checkpoint_format, checkpoint_integrity
from tttjax.training.checkpoint_integrity import all_texts, print_once
from tttjax.training.checkpoints import CHECKPOINT_DIR, absolute
from tttjax.types import Params


def find_checkpoint(path: epath.PathLike) -> epath.Path:
    """The newest undamaged checkpoint of a work directory, or `path` if it is a checkpoint.

    Process 0 chooses; every process must call this.

    Raises:
      UserError: there is none, or the processes see different files.
    """
    path = absolute(path)
    if (path / checkpoint_format.META).exists():
        candidates = [path]
    else:
        folder = path / CHECKPOINT_DIR if (path / CHECKPOINT_DIR).exists() else path
        candidates = checkpoint_format.completed_checkpoints(folder)
    names = all_texts("\n".join(str(p.relative_to(path)) for p in candidates))[0].splitlines()
    if not names:
        raise UserError(
            f"{path} holds no checkpoint: give a work directory of `tttjax train`, or one "
            "checkpoint in it"
        )
    for candidate in (path / name for name in reversed(names)):
        problem = checkpoint_integrity.find_damage(candidate)
        if problem is None:
            return candidate
        print_once(f"warning: the checkpoint {candidate} is damaged ({problem})")
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
