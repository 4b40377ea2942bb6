"""Going back to an earlier checkpoint (`tttjax train --from-step`). Nothing is deleted.

`checkpoints/went_back` holds the step that the run last went back to, so that a launcher that
repeats the command does not throw away the progress since then.
"""

from etils import epath

from tttjax.errors import UserError
from tttjax.io.atomic import atomic_write
from tttjax.io.paths import storage_path
from tttjax.training.checkpoint_integrity import all_texts, print_once
from tttjax.training.failed_starts import forget_failed_starts
from tttjax.training.metrics_file import HELD_OUT, JSONL

RECORD = "went_back"
ABANDONED_PREFIX = "abandoned-"  # of the names of checkpoints after that step


def choose_step(folder: epath.Path, from_step: int | None, steps: list[int]) -> int | None:
    """`from_step`, if the run has to go back to it; None: the newest step.

    steps: those of the checkpoints, the newest first. Raises UserError if `from_step` is none of
    them, or differs between processes.
    """
    if len(set(all_texts(str(from_step)))) > 1:
        raise UserError("give all processes the same --from-step, or none")
    if from_step is None:
        return None
    if all_texts("yes" if _has_gone_back(folder, from_step) else "")[0]:
        print_once(
            f"note: the run has already gone back to step {from_step}, so it resumes from its "
            f"newest checkpoint; to go back again, remove {folder / RECORD}"
        )
        return None
    if from_step not in steps:
        raise UserError(
            f"--from-step={from_step}: {folder} has no checkpoint of that step; it has "
            f"{', '.join(map(str, reversed(steps))) or 'none'}"
        )
    return from_step


def _has_gone_back(folder: epath.Path, step: int) -> bool:
    """Whether the run of these checkpoints has gone back to this step last."""
    record = folder / RECORD
    return record.exists() and record.read_text().split() == [str(step)]


def set_aside(folder: epath.Path, newer: list[int], step: int) -> None:
    """Renames the checkpoints of the steps `newer` to `abandoned-<step>`, and writes the record.

    The newest one gets copies of the metrics, whose records after `step` are removed on resuming.
    Interrupted, it can be repeated.
    """
    for number in sorted(newer, reverse=True):
        path = folder / str(number)
        if number == max(newer):
            for name in (JSONL, HELD_OUT):
                if (records := folder.parent / name).exists():
                    (path / name).write_bytes(records.read_bytes())
        target, attempt = folder / f"{ABANDONED_PREFIX}{number}", 2
        while target.exists():
            target, attempt = folder / f"{ABANDONED_PREFIX}{number}-{attempt}", attempt + 1
        path.rename(target)
    with atomic_write(folder / RECORD) as temporary:
        temporary.write_text(f"{step}\n")
    forget_failed_starts(storage_path(folder.parent))  # which compare with the newest step
