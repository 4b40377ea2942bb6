"""Going back to an earlier checkpoint (`tttjax train --from-step`). Nothing is deleted.

`checkpoints/went_back` holds the step that the run last went back to, so that a launcher that
repeats the command does not throw away the progress since then.
"""

from etils import epath

from tttjax.io.atomic import atomic_write
from tttjax.io.paths import storage_path
from tttjax.training.failed_starts import forget_failed_starts
from tttjax.training.metrics_file import HELD_OUT, JSONL

RECORD = "went_back"
ABANDONED_PREFIX = "abandoned-"  # of the names of checkpoints after that step


def has_gone_back(folder: epath.Path, step: int) -> bool:
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
